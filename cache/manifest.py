"""The manifest: what a store is, as frozen dataclasses with an exact JSON form. Specified in
docs/format.md.

It lives in the root group's ``zarr.json`` under ``attributes.dspark``, with a crc32c over its
canonical JSON. Unknown keys and unknown versions are refused: a reader that guesses at an unknown
field is silently wrong. The plan is the part of the manifest that never changes: everything that
determines the bytes of a sample. Every part contains the whole plan, with its digest, so the
manifest can be rebuilt from the parts.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dspark.cache.canonical import canonical
from dspark.cache.errors import DamagedCacheError, FormatVersionError, MismatchError
from dspark.cache.json_text import Json
from dspark.cache.settings import DEFAULT_PACKING, rotated_name
from dspark.cache.typed_json import build, short

FORMAT_VERSION = 2
READ_VERSIONS = (1, 2)
LAYER_CONVENTION = "output of decoder layer i, 0-based"
LAST_ROWS_RULE = "loss_mask[p] and loss_mask[p+1], within one sample"


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetInfo:
    """The model that produced the states. ``config``: its whole ``config.json`` (the text model's,
    if wrapped).
    """

    id: str
    revision: str | None
    config: Json
    hidden_size: int
    vocab_size: int
    num_layers: int
    mask_token_id: (
        # the id a draft embeds in slots 1..B-1; chosen once so that every draft of this store
        # agrees
        int
    )
    eos_token_ids: list[int]
    weights_sha256: str  # of target/model.safetensors


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldInfo:
    """How one field of states is stored in a store of version 1. ``params``: what decoding needs
    beside name and bits; ``pack``: how its arrays are stored.
    """

    codec: str
    bits: int
    params: Json = field(default_factory=dict)
    pack: str = DEFAULT_PACKING


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecInfo:
    """How states are stored: a codec by its full name, its parameters, and the sha256 of its
    calibration file (None = no calibration).
    """

    name: str
    params: Json = field(default_factory=dict)
    pack: str = DEFAULT_PACKING
    calibration_sha256: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerInfo:
    """sha256 of ``tokenizer.json`` and of the chat template's text (None = rows were already
    tokenised).
    """

    sha256: str | None
    chat_template_sha256: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceInfo:
    """Where rows came from: file name or data set id, its sha256 (None = not a single file), and
    the limit on rows. Only the limit is compared on resume. ``rows``: their number, in a store that
    one of several dumps has finished with (None in a complete store, whose parts tell).
    """

    id: str
    sha256: str | None
    limit: int | None
    rows: int | None = None

    def to_json(self) -> Json:
        out = dataclasses.asdict(self)
        if self.rows is None:
            del out["rows"]
        return out


@dataclass(frozen=True, kw_only=True, slots=True)
class DumpInfo:
    """How rows became tokens and tokens became states. ``block_rows``: source rows per part, 0 in a
    store of version 1.

    All fields except ``engine_version`` belong to the plan.
    """

    engine: str
    engine_version: str
    dtype: str  # the dtype the target ran in
    seq_length: int
    min_supervised: int
    assistant_pattern: str | None
    mask_rule: str  # "generation-tag", "render-difference", "assistant-pattern" or "given"
    block_rows: int
    turns: str = "auto"  # how a chat's answers became samples: auto, each, last or whole
    template_kwargs: Json = field(default_factory=dict)  # handed to the chat template
    template_date: str | None = None  # the date that a template which writes one saw as today


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Totals over the committed parts; filled in when the dump finishes."""

    parts: int = 0
    samples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    last_rows: int = 0
    rows_read: int = 0
    truncated: int = 0  # samples cut at seq_length; kept
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Everything a reader needs to know before it opens a part. ``fields``: aux and last, only in
    stores of version 1.
    """

    target: TargetInfo
    layers: list[int]
    codec: CodecInfo
    tokenizer: TokenizerInfo
    sources: list[SourceInfo]
    dump: DumpInfo
    last_after_final_norm: bool = True
    layer_convention: str = LAYER_CONVENTION
    last_rows_rule: str = LAST_ROWS_RULE
    format_version: int = FORMAT_VERSION
    counts: Counts = field(default_factory=Counts)
    complete: bool = False
    # SNR of the stored code by layer, measured at dump time
    quality: Json = field(default_factory=dict)
    fields: tuple[FieldInfo, FieldInfo] | None = None

    @property
    def target_layer_ids(self) -> list[int]:
        """The same layers in vLLM's convention: the state *entering* layer j, so j = i + 1."""
        return [i + 1 for i in self.layers]

    @property
    def source(self) -> SourceInfo:
        """The first source."""
        return self.sources[0]

    def plan(self) -> Json:
        """The part that never changes and that every part contains."""
        run = dataclasses.asdict(self.dump)
        del run["engine_version"]
        return {
            "target": dataclasses.asdict(self.target),
            "layers": list(self.layers),
            "target_layer_ids": self.target_layer_ids,
            "layer_convention": self.layer_convention,
            "last_after_final_norm": self.last_after_final_norm,
            "last_rows_rule": self.last_rows_rule,
            "tokenizer": dataclasses.asdict(self.tokenizer),
            "codec": dataclasses.asdict(self.codec),
            "run": run,
        }

    def digest(self) -> str:
        """sha256 of the plan."""
        return plan_digest(self.plan())

    def to_json(self) -> Json:
        assert self.format_version == FORMAT_VERSION, "version 1 stores can be read but not written"
        return {
            "format_version": self.format_version,
            "plan": self.plan(),
            "plan_sha256": self.digest(),
            "sources": [s.to_json() for s in self.sources],
            "counts": dataclasses.asdict(self.counts),
            "state": {
                "complete": self.complete,
                "quality": self.quality,
                "engine_version": self.dump.engine_version,
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> Manifest:
        version = data.get("format_version")
        if version not in READ_VERSIONS:
            raise FormatVersionError(
                f"{where}: found format version {version!r}, but this release reads "
                f"{' and '.join(map(str, READ_VERSIONS))}. Use the dspark release that "
                "wrote it, or dump again."
            )
        if version == 1:
            return _from_version_1(data, where)
        keys = {"format_version", "plan", "plan_sha256", "sources", "counts", "state"}
        _same_keys(data, keys, where)
        if plan_digest(data["plan"]) != data["plan_sha256"]:
            raise DamagedCacheError(f"{where}: the plan does not match plan_sha256")
        _same_keys(data["state"], {"complete", "quality", "engine_version"}, f"{where}: state")
        return from_plan(
            data["plan"],
            where,
            sources=[
                build(SourceInfo, s, f"{where}: sources") for s in _some(data["sources"], where)
            ],
            counts=build(Counts, data["counts"], f"{where}: counts"),
            **data["state"],
        )

    def same_plan(self, other: Manifest, where: str) -> None:
        """Raise MismatchError, naming every differing field, unless ``other`` would write the same
        store.

        ``other`` may come from a run that has not read weights or calibrated, so unknown hashes are
        not compared.
        """
        if self.format_version != FORMAT_VERSION:
            raise MismatchError(
                f"{where}: a store of format version {self.format_version}, which this release "
                "reads but cannot continue. Finish it with the release that started it, "
                f"or convert it: dspark-tools recode {where} NEW"
            )
        # Further sources may follow those that the store has.
        same = dataclasses.replace(other, sources=other.sources[: len(self.sources)])
        mine, theirs = self._compared(), same._compared()
        diffs = [
            f"{path}: store has {short(a)}, this run has {short(b)}"
            for path, a, b in differences(mine, theirs)
            if b or path not in ("target.weights_sha256", "codec.calibration_sha256")
        ]
        if diffs:
            raise MismatchError(
                f"{where}: this run would not continue the same store.\n  "
                + "\n  ".join(
                    diffs[:8] + ([f"and {len(diffs) - 8} more"] if len(diffs) > 8 else [])
                )
                + "\nUse the flags the store was started with, another --output, or --overwrite."
            )

    def _compared(self) -> Json:
        sources = [{"id": s.id, "limit": s.limit} for s in self.sources]
        return {**self.plan(), "source": sources[0] if len(sources) == 1 else sources}


def plan_digest(plan: Mapping[str, Any]) -> str:
    """Return the sha256 of a plan's canonical JSON."""
    return hashlib.sha256(canonical(plan)).hexdigest()


def from_plan(
    plan: Any,
    where: str,
    *,
    sources: list[SourceInfo],
    counts: Counts,
    complete: bool,
    quality: Json,
    engine_version: str,
) -> Manifest:
    """Make a manifest from the plan that it or any part of the store holds."""
    known = {
        "target",
        "layers",
        "target_layer_ids",
        "layer_convention",
        "last_after_final_norm",
        "last_rows_rule",
        "tokenizer",
        "codec",
        "run",
    }
    _same_keys(plan, known, f"{where}: plan")
    target = build(TargetInfo, plan["target"], f"{where}: target")
    if not (isinstance(plan["layers"], list) and all(type(i) is int for i in plan["layers"])):
        raise DamagedCacheError(
            f"{where}: layers are {short(plan['layers'])}, expected a list of numbers"
        )
    if not (type(complete) is bool and isinstance(quality, dict) and isinstance(plan["run"], dict)):
        raise DamagedCacheError(f"{where}: complete, quality or run has a value of the wrong type")
    out = Manifest(
        target=target,
        layers=plan["layers"],
        codec=build(CodecInfo, plan["codec"], f"{where}: codec"),
        tokenizer=build(TokenizerInfo, plan["tokenizer"], f"{where}: tokenizer"),
        sources=sources,
        dump=build(DumpInfo, {**plan["run"], "engine_version": engine_version}, f"{where}: run"),
        last_after_final_norm=plan["last_after_final_norm"],
        layer_convention=plan["layer_convention"],
        last_rows_rule=plan["last_rows_rule"],
        counts=counts,
        complete=complete,
        quality=quality,
    )
    _check_layer_ids(plan["target_layer_ids"], out, where)
    return out


def _from_version_1(data: Mapping[str, Any], where: str) -> Manifest:
    fields = dict(data)
    both = fields.pop("target_layer_ids", None)
    nested = {
        "target": TargetInfo,
        "aux": FieldInfo,
        "last": FieldInfo,
        "tokenizer": TokenizerInfo,
        "source": SourceInfo,
        "counts": Counts,
    }
    for name, kind in nested.items():
        if name not in fields:
            raise DamagedCacheError(f"{where}: the manifest has no {name!r}")
        fields[name] = build(kind, fields[name], f"{where}: {name}")
    dump = dict(fields.get("dump") or {})
    if "part_tokens" not in dump:
        raise DamagedCacheError(f"{where}: the manifest's dump has no 'part_tokens'")
    del dump["part_tokens"]
    fields["dump"] = build(DumpInfo, {**dump, "block_rows": 0}, f"{where}: dump")
    aux, last = fields.pop("aux"), fields.pop("last")
    fields["fields"] = aux, last
    fields["codec"] = CodecInfo(name=rotated_name(aux.bits, last.bits), pack=aux.pack)
    fields["sources"] = [fields.pop("source")]
    out = build(Manifest, fields, where)
    _check_layer_ids(both, out, where)
    return out


def _check_layer_ids(both: Any, manifest: Manifest, where: str) -> None:
    if both != manifest.target_layer_ids:
        raise DamagedCacheError(
            f"{where}: target_layer_ids {both} are not layers {manifest.layers} plus one"
        )


def _same_keys(data: Any, keys: set[str], where: str) -> None:
    found = set(data) if isinstance(data, Mapping) else set()
    if found != keys:
        raise DamagedCacheError(
            f"{where}: unknown keys {sorted(found - keys)}, missing keys {sorted(keys - found)}"
        )


def _some(sources: Any, where: str) -> list[Any]:
    if not isinstance(sources, list) or not sources:
        raise DamagedCacheError(f"{where}: sources is {short(sources)}, expected a list of some")
    return sources


def differences(a: Any, b: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Yield where two plans differ: dotted name, and both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        out: list[tuple[str, Any, Any]] = []
        keys = a.keys() | b.keys()
        if "params" in keys and a.get("name") != b.get("name"):
            keys -= {"params"}  # of another codec: nothing to compare
        for key in sorted(keys):
            out += differences(a.get(key), b.get(key), f"{path}.{key}" if path else key)
        return out
    return [] if a == b else [(path, a, b)]
