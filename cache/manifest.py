"""The manifest: what a store is, as frozen dataclasses with an exact JSON form. Specified in docs/format.md.

It lives in the root group's ``zarr.json`` under ``attributes.dspark``, with a crc32c over its canonical JSON. Unknown keys and
unknown versions are refused: a reader that guesses at a field it does not know is silently wrong.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dspark.cache.errors import DamagedCacheError, FormatVersionError, MismatchError
from dspark.cache.settings import DEFAULT_PACKING

FORMAT_VERSION = 1
LAYER_CONVENTION = "output of decoder layer i, 0-based"
LAST_ROWS_RULE = "loss_mask[p] and loss_mask[p+1], within one sample"

Json = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetInfo:
    """The model whose states these are. ``config``: its ``config.json`` whole (text model's where it is wrapped)."""

    id: str
    revision: str | None
    config: Json
    hidden_size: int
    vocab_size: int
    num_layers: int
    mask_token_id: (
        int  # the id a draft embeds in slots 1..B-1; chosen once so that every draft of this store agrees
    )
    eos_token_ids: list[int]
    weights_sha256: str  # of target/model.safetensors


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldInfo:
    """How one field of states is stored. ``params`` is what the codec needs to decode, beside its name and bits; ``pack``: how its arrays are kept."""

    codec: str
    bits: int
    params: Json = field(default_factory=dict)
    pack: str = DEFAULT_PACKING


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerInfo:
    """sha256 of ``tokenizer.json`` and of the chat template's text (None: rows came tokenised)."""

    sha256: str | None
    chat_template_sha256: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceInfo:
    """Where the rows came from: file name or data set id, its sha256 (None for a data set on a hub), and the limit on rows."""

    id: str
    sha256: str | None
    limit: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class DumpInfo:
    """How rows became tokens and tokens became states; equal on resume except ``engine_version``."""

    engine: str
    engine_version: str
    dtype: str  # the dtype the target ran in
    seq_length: int
    min_supervised: int
    assistant_pattern: str | None
    mask_rule: str  # "generation-tag", "render-difference", "assistant-pattern" or "given"
    part_tokens: int
    turns: str = "auto"  # how a chat's answers became samples: auto, each, last or whole
    template_kwargs: Json = field(default_factory=dict)  # handed to the chat template
    template_date: str | None = None  # what a template that writes the date took for today


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
    """Everything a reader needs to know before it opens a part."""

    target: TargetInfo
    layers: list[int]
    aux: FieldInfo
    last: FieldInfo
    tokenizer: TokenizerInfo
    source: SourceInfo
    dump: DumpInfo
    last_after_final_norm: bool = True
    layer_convention: str = LAYER_CONVENTION
    last_rows_rule: str = LAST_ROWS_RULE
    format_version: int = FORMAT_VERSION
    counts: Counts = field(default_factory=Counts)
    complete: bool = False
    quality: Json = field(default_factory=dict)  # SNR of the stored code by layer, measured at dump time

    @property
    def target_layer_ids(self) -> list[int]:
        """The same layers in vLLM's convention: the state *entering* layer j, so j = i + 1."""
        return [i + 1 for i in self.layers]

    def to_json(self) -> Json:
        out = dataclasses.asdict(self)
        out["target_layer_ids"] = self.target_layer_ids
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> Manifest:
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise FormatVersionError(
                f"{where}: found format version {version!r}, this release reads {FORMAT_VERSION}. "
                "Use the dspark release that wrote it, or dump again."
            )
        fields = dict(data)
        both = fields.pop("target_layer_ids", None)
        nested = {
            "target": TargetInfo,
            "aux": FieldInfo,
            "last": FieldInfo,
            "tokenizer": TokenizerInfo,
            "source": SourceInfo,
            "dump": DumpInfo,
            "counts": Counts,
        }
        for name, kind in nested.items():
            if name not in fields:
                raise DamagedCacheError(f"{where}: the manifest has no {name!r}")
            fields[name] = build(kind, fields[name], f"{where}: {name}")
        out = build(cls, fields, where)
        if both != out.target_layer_ids:
            raise DamagedCacheError(f"{where}: target_layer_ids {both} are not layers {out.layers} plus one")
        return out

    def same_plan(self, other: Manifest, where: str) -> None:
        """Raise MismatchError, naming every differing field, unless ``other`` would write the same store.

        ``other`` may come from a run that has read no weights, so their hash is not compared.
        """
        ignore = {"counts", "complete", "quality"}
        diffs = [
            f"{path}: store has {_short(a)}, this run has {_short(b)}"
            for path, a, b in _differences(self.to_json(), other.to_json())
            if path.split(".")[0] not in ignore
            and path not in ("dump.engine_version", "target.weights_sha256")
        ]
        if diffs:
            raise MismatchError(
                f"{where}: this run would not continue the same store.\n  "
                + "\n  ".join(diffs[:8] + ([f"and {len(diffs) - 8} more"] if len(diffs) > 8 else []))
                + "\nUse the flags the store was begun with, another --output, or --overwrite."
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _differences(a: Any, b: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        out: list[tuple[str, Any, Any]] = []
        keys = a.keys() | b.keys()
        if "params" in keys and (a.get("codec"), a.get("bits")) != (b.get("codec"), b.get("bits")):
            keys -= {"params"}  # of another codec: nothing to compare
        for key in sorted(keys):
            out += _differences(a.get(key), b.get(key), f"{path}.{key}" if path else key)
        return out
    return [] if a == b else [(path, a, b)]


def build(kind: type[T], data: Any, where: str) -> T:
    """Make dataclass ``kind`` from a JSON object; missing and unknown keys are damage, named."""
    if not isinstance(data, Mapping):
        raise DamagedCacheError(f"{where}: found {type(data).__name__}, expected an object")
    known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(known))
    required = {
        n
        for n, f in known.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(data))
    if unknown or missing:
        raise DamagedCacheError(f"{where}: unknown keys {unknown}, missing keys {missing}")
    return kind(**dict(data))


def canonical(data: Mapping[str, Any]) -> bytes:
    """JSON with sorted keys and no spaces, UTF-8: what checksums are taken over."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def crc32c(data: bytes | bytearray | memoryview, value: int = 0) -> int:
    """CRC-32C (Castagnoli), as Zarr's crc32c codec uses; ``value`` continues an earlier one."""
    import google_crc32c

    return int(google_crc32c.extend(value, bytes(data)))


def sealed(data: Mapping[str, Any]) -> Json:
    """``data`` with its own ``crc32c`` added."""
    return {**data, "crc32c": crc32c(canonical(data))}


def unseal(data: Any, where: str) -> Json:
    """Check and strip the ``crc32c`` that ``sealed`` added."""
    if not isinstance(data, dict) or "crc32c" not in data:
        raise DamagedCacheError(f"{where}: no checksummed record found")
    body = {k: v for k, v in data.items() if k != "crc32c"}
    computed = crc32c(canonical(body))
    if computed != data["crc32c"]:
        raise DamagedCacheError(f"{where}: stored crc32c {data['crc32c']}, computed {computed}")
    return body
