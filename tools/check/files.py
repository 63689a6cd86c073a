"""``dspark-tools check``: find what is wrong with a draft before it is served, from its files and
its target's config.

A draft that is served wrongly does not fail: fewer of its tokens are accepted. Others shipped
drafts with 1 % acceptance because of a flag (vLLM #47093, #48639, #56792). Every finding says
whether it is certain:

- ``error``: two pieces of evidence contradict each other, or a reader cannot read the file. The
  record of training is in the header of the weights (``export.trained_as``) and, beside the draft,
  in store.json and training.json.
- ``suspicion``: the draft runs, but something looks like a known mistake.
  ``dspark.tools.check.symptoms`` adds those that only decoding shows.
- ``note``: nothing is wrong; says what could not be judged, or what a server will do. Only the
  draft's own tensors are loaded here; ``check`` in ``dspark.tools.check.command`` adds the target
  and the real server.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark.cache.errors import DraftError, UsageError
from dspark.cache.target.shape import rope_base, text_config
from dspark.tools import records
from dspark.tools.shapes import Optional, require
from dspark.train.draft import scaling
from dspark.train.draft.config import DraftConfig
from dspark.train.draft.saved import folder as export
from dspark.train.draft.saved.speculators import MARK, NON_CAUSAL, to_flat
from dspark.train.draft.saved.spelling import flat_of
from dspark.train.draft.saved.vocabulary import faults, ids_of
from dspark.train.draft.types import TYPES, DrafterType, drafter, type_of

# What is known about servers, and from where. "Checked here" means: the served-parity test and
# bench/serve_parity.py ran on it.
VLLM = {
    "compared_token_for_token": ["0.32.0"],
    # 100 prompts each, on an H100 and on a CPU (docs/log/2026-11-22-served-h100.md)
    "served_losslessly": ["0.26.0", "0.32.0"],
    "sources": [
        "vllm #46995 (method dspark)",
        "vllm #47093 (speculators format)",
        "vllm #48524 (fc's width)",
        "the source of 0.25.1, 0.26.0, 0.27.0",
    ],
    "needs": "the V2 model runner; vLLM has the vanilla Markov head only",
}


def vllm_at_least(config: DraftConfig, form: str) -> tuple[str, str]:
    """Return the first vLLM that reads this draft correctly, and why not an earlier one."""
    if config.layer_types or config.is_causal is not None:
        return (
            "0.32.0",
            (
                "its windows were compared block by block in that version; earlier ones were "
                "not tested"
            ),
        )
    if form == "speculators":
        return "0.27.0", (
            "0.25.1 and 0.26.0 treat the anchor of every speculators checkpoint as a bonus "
            "token, whatever sample_from_anchor says, and draft from the wrong slots "
            "without an error. They read the flat format correctly"
        )
    if len(config.target_layer_ids) != config.num_layers:
        return "0.27.0", (
            f"0.25.1 and 0.26.0 size fc by the draft's own {config.num_layers} layers, not by "
            f"the {len(config.target_layer_ids)} of the target "
            "that it reads, and fail to load it"
        )
    return "0.25.1", "it introduced method dspark"


# Keys that vLLM prefers to target_layer_ids in a flat config, and keys that change the attention or
# the mask token.
OVERRIDES = (
    "dspark_target_layer_ids",
    "eagle_aux_hidden_state_layer_ids",
    "dflash_config",
    "use_swa",
    "logit_scale",
)
NORMS = ("norm.weight", "hidden_norm.weight")


# What the judges below compute with; a value of the wrong type, such as from an editing slip,
# cannot be judged at all.
_ROPE = {"rope_theta": Optional(float)}
_READ = _ROPE | {
    "target_layer_ids": Optional([int]),
    "aux_hidden_state_layer_ids": Optional([int]),
    "block_size": Optional(int),
    "max_position_embeddings": Optional(int),
    "rope_parameters": Optional(_ROPE | {"full_attention": Optional(_ROPE)}),
    "speculators_config": Optional(
        {"proposal_methods": Optional([{"speculative_tokens": Optional(int)}])}
    ),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """``level``: error, suspicion or note; ``name``: which mistake (layout-flag, layer-ids, norm,
    mask-token, vocabulary, rope, tensors, head, block-size, config, ...); ``text``: what was found,
    what was expected, what to do.
    """

    level: str
    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Files:
    """A draft folder: config.json as written, its flat form, the tensors, and what training left
    beside them.
    """

    folder: Path
    raw: dict[str, Any]
    flat: dict[str, Any]
    tensors: dict[str, Tensor]
    trained: DraftConfig | None
    store: dict[str, Any]
    training: dict[str, Any]

    @property
    def layout(self) -> dict[str, bool]:
        """``sample_from_anchor`` as the weights were trained: true for ours, whatever config.json
        says; for others, what it says.
        """
        return {
            "sample_from_anchor": self.trained is not None
            or self.flat.get("sample_from_anchor") is not False
        }

    @property
    def speculators(self) -> bool:
        return MARK in self.raw

    @property
    def kind(self) -> DrafterType:
        """The drafter type that config.json describes; the first one if it describes none."""
        try:
            return type_of(self.flat)
        except UsageError:
            return drafter(next(iter(TYPES)))

    def described(self) -> DraftConfig | None:
        """The draft that config.json describes, ignoring its layout flag and keys for servers; None
        if it describes none.
        """
        own = {k: v for k, v in self.flat.items() if k not in OVERRIDES or k in self.kind.own_keys}
        try:
            return DraftConfig.from_flat(own | self.layout)
        except DraftError:
            return None

    @classmethod
    def read(cls, folder: str) -> Files:
        """Read a draft folder. Raises DraftError only if there is nothing to judge."""
        raw = export.read_config(folder)
        trained = export.trained_as(folder)
        flat = to_flat(_readable(raw, folder)) if MARK in raw else dict(raw)
        # another program's: its form is not an error, but contradictions in it are
        if trained is None:
            flat = flat_of(raw)
        _readable(flat, folder)
        return cls(
            Path(folder), raw, flat, export.read_tensors(folder), trained,
            records.store(Path(folder)), records.training(Path(folder)),
        )  # fmt: skip


def _readable(config: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return ``config`` if every key used in computations has the right type. Raises DraftError."""
    remedy = (
        "expected the config of a draft; correct that key first, since nothing else can "
        "be judged without it"
    )
    require(config, _READ, Path(folder) / export.CONFIG, remedy)
    return config


Judge = Callable[[Files, Mapping[str, Any]], Iterator[Finding]]


def judge(files: Files, target: Mapping[str, Any], drafts: int | None = None) -> list[Finding]:
    """Return the findings from the files alone. ``target``: the target's text config; ``drafts``:
    the planned num_speculative_tokens.
    """
    found = [f for rule in RULES for f in rule(files, target)]
    found += block_size(files, drafts)
    if files.trained is None:
        found.append(
            Finding(
                "note",
                "record",
                "the weights carry no record of their training (another program wrote them): "
                "layer ids, mask token, RoPE and layout can be judged only by the "
                "draft's behaviour",
            )
        )
    return found


def layout(files: Files, target: Mapping[str, Any]) -> Iterator[Finding]:
    flag = files.raw.get("sample_from_anchor")
    if "sample_from_anchor" not in files.kind.stated:
        return
    if flag is None:
        told = (
            "false (the anchor predicts nothing)"
            if files.speculators
            else "true, llama.cpp and others false"
        )
        yield Finding(
            "error",
            "layout-flag",
            f"config.json has no sample_from_anchor; vLLM then assumes {told}. Write true for a "
            "draft whose slot 0 predicts, as this package and DeepSpec train them",
        )
    elif flag is False and files.trained is None:
        yield Finding(
            "note",
            "layout-flag",
            "config.json has sample_from_anchor = false: the anchor is a bonus token and slot 0 "
            f"predicts nothing, but block_size {files.flat.get('block_size')} counts it: "
            "serve with one speculative token less",
        )
    elif flag is not True:
        trained = (
            "" if files.trained is None else "; the weights record that they were trained with true"
        )
        yield Finding(
            "error",
            "layout-flag",
            f"config.json has sample_from_anchor = {flag!r}{trained}. Every slot of these "
            "drafts predicts, slot 0 "
            "too: with false a server shifts every token by one and accepts almost nothing",
        )


def attention(files: Files, target: Mapping[str, Any]) -> Iterator[Finding]:
    """Check what servers make of sliding layers."""
    ours, nested = files.described(), files.raw.get("dflash_config")
    if ours is None or ours.sliding_window is None:
        return
    if files.speculators:
        if files.raw.get(NON_CAUSAL) and "is_causal" not in files.raw["transformer_layer_config"]:
            yield Finding(
                "error",
                "attention",
                f"config.json has {NON_CAUSAL} = true, which vLLM 0.32 reads for dflash drafts "
                "only: there, no slot of a sliding layer sees a later one, unlike in "
                "training. dspark-tools export writes is_causal = false, which vLLM obeys",
            )
        return
    kept = isinstance(nested, dict) and nested.get("swa_window_size") is not None
    if files.flat.get("use_sliding_window") is not True and not kept:
        yield Finding(
            "error",
            "attention",
            "config.json has sliding layers but not use_sliding_window = true: transformers "
            "then drops the window, and vLLM refuses the draft. Set it to true",
        )


def config(files: Files, target: Mapping[str, Any]) -> Iterator[Finding]:
    """Check that this package's own reader accepts it, and find keys that a server obeys but this
    package never trained.
    """
    for key in (k for k in OVERRIDES if k not in files.kind.own_keys):
        if files.flat.get(key) not in (None, {}, False, 1.0):
            yield Finding(
                "error",
                "override",
                f"config.json has {key} = {files.flat[key]!r}, which vLLM uses before (or in "
                "addition to) the keys that training wrote; remove it",
            )
    for key in files.kind.stated:
        if key not in files.flat and key != "sample_from_anchor":
            yield Finding(
                "error", "config", f"config.json has no {key}; readers disagree on its default"
            )
    try:
        ours = DraftConfig.from_flat(files.flat | files.layout)
    except DraftError as wrong:
        yield Finding("error", "config", str(wrong))
        return
    kind = files.kind
    if not ours.servable_by_vllm and kind.method is None:
        yield Finding("note", "server", f"{kind.name}: {kind.servers}")
    elif not ours.servable_by_vllm:
        elsewhere = kind.servable_by_sglang(ours)
        yield Finding(
            "note" if elsewhere else "error",
            "markov-head",
            f"not for vLLM, which does not report the difference: {kind.not_served(ours)}. "
            + (
                "SGLang loads it unchanged (--speculative-algorithm DSPARK; from reading "
                "0.5.23, not run)"
                if elsewhere
                else "No server supports it"
            ),
        )


# Field of DraftConfig -> the name of the mistake it would be.
_RECORDED = {
    "target_layer_ids": "layer-ids",
    "mask_token_id": "mask-token",
    "rope_theta": "rope",
    "block_size": "block-size",
    "rms_norm_eps": "norm",
    "num_heads": "config",
    "num_kv_heads": "config",
    "head_dim": "config",
    "num_layers": "config",
    "vocab_size": "vocabulary",
    "draft_vocab_size": "vocabulary",
    "markov_rank": "markov-head",
    "markov_head_type": "markov-head",
    "rope_scaling": "rope",
    "sliding_window": "attention",
    "layer_types": "attention",
    "is_causal": "attention",
    "max_position_embeddings": "rope",
    "confidence_head_with_markov": "config",
}


def record(files: Files, target: Mapping[str, Any]) -> Iterator[Finding]:
    """Compare config.json with what training wrote into the weights, store.json and
    training.json.
    """
    ours = files.described()
    if ours is None:
        return
    if files.trained is not None:
        for field, name in _RECORDED.items():
            now, then = getattr(ours, field), getattr(files.trained, field)
            if now != then:
                yield Finding(
                    "error",
                    name,
                    f"config.json says {field} = {_plain(now)}, but the weights were trained "
                    f"with {_plain(then)}{_shift(now, then)}",
                )
    layers = files.store.get("layers")
    if layers is not None and not set(ours.target_layer_ids) <= set(layers):
        yield Finding(
            "error",
            "layer-ids",
            f"config.json says target_layer_ids = {list(ours.target_layer_ids)} (outputs of "
            "layers), but the draft was trained on a store of layers "
            f"{layers}{_shift(ours.target_layer_ids, tuple(layers))}",
        )
    size = files.training.get("block_size")
    if size is not None and size != ours.block_size:
        yield Finding(
            "error",
            "block-size",
            f"config.json says block_size = {ours.block_size}, but training.json says {size}",
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shift(now: Any, then: Any) -> str:
    if isinstance(now, tuple) and len(now) == len(then):
        for by, what in (
            (1, "vLLM's ids (the state entering layer j) in a key that means outputs"),
            (-1, "one was subtracted twice"),
        ):
            if [i - by for i in now] == list(then):
                return f": off by one, {what}"
    return ""


def against_target(files: Files, target: Mapping[str, Any]) -> Iterator[Finding]:
    """Compare sizes, positions, RoPE and layer range with the target's config."""
    flat = files.flat
    layers = target["num_hidden_layers"]
    for key in ("hidden_size", "vocab_size"):
        if flat.get(key) != target[key]:
            yield Finding(
                "error",
                "target",
                f"{key} is {flat.get(key)}, but the target's is {target[key]}: the draft is for "
                "another model",
            )
    nested = files.raw.get("dflash_config")
    stated = "num_target_layers" in {**files.raw, **(nested if isinstance(nested, dict) else {})}
    if stated and flat.get("num_target_layers") not in (None, layers) and not files.speculators:
        yield Finding(
            "error",
            "target",
            f"num_target_layers is {flat['num_target_layers']}, but the target has {layers}",
        )
    ids = flat.get("target_layer_ids") or []
    if any(not -1 <= i < layers for i in ids):
        yield Finding(
            "error",
            "layer-ids",
            f"target_layer_ids {ids} (outputs of layers) are outside the target's 0..{layers - 1}",
        )
    longest = target.get("max_position_embeddings")
    if longest and (flat.get("max_position_embeddings") or longest) < longest:
        yield Finding(
            "error",
            "rope",
            f"max_position_embeddings is {flat['max_position_embeddings']}, but the target takes "
            f"{longest}: vLLM sizes the draft's RoPE table by it, and fails (or drafts "
            "noise) beyond it",
        )
    ours = files.described()
    reach = (
        longest if ours is None else scaling.reach(ours.rope_scaling, ours.max_position_embeddings)
    )
    if longest and ours and ours.rope_scaling and reach < longest:
        yield Finding(
            "error",
            "rope",
            f"the scaled RoPE reaches {reach} positions (factor times the original ones), but "
            f"the target takes {longest}: vLLM's table for the draft ends there",
        )
    own, theirs = rope_base(flat), rope_base(text_config(target))
    if own is None:
        yield Finding(
            "error",
            "rope",
            "config.json has no rope_theta (nor rope_parameters): vLLM then assumes 1,000,000",
        )
    elif theirs is not None and own != theirs and files.trained is None:
        yield Finding(
            "suspicion",
            "rope",
            f"rope_theta is {own:g}, but the target's is {theirs:g}; drafts are usually trained "
            "with the target's",
        )


def tensors(files: Files, target: Mapping[str, Any]) -> Iterator[Finding]:
    """Check names, shapes, dtypes and values of the tensors."""
    stored = files.tensors
    prefixed = [n for n in stored if n.startswith("model.")]
    if prefixed:
        yield Finding(
            "error",
            "tensors",
            (
                f"{len(prefixed)} tensor names begin with `model.` ({prefixed[0]}): vLLM adds "
                "that prefix itself"
            ),
        )
    described = files.described()
    if described is None:
        return
    wanted = export.trained_shapes(described)
    missing = sorted(set(wanted) - set(stored))
    for name in missing:
        kind = "norm" if "norm" in name else "tensors"
        yield Finding(
            "error",
            kind,
            f"model.safetensors lacks {name}; a server would run it with its initial values, or "
            "refuse the draft",
        )
    known = {*wanted, *export.FROZEN, "d2t", "t2d"}
    for name in sorted(set(stored) - known):
        hint = (
            " (vLLM treats every name that contains lm_head as the output matrix)"
            if "lm_head" in name
            else ""
        )
        yield Finding(
            "error",
            "tensors",
            f"model.safetensors has {name}, which the config does not describe{hint}",
        )
    for name, shape in wanted.items():
        if name in stored and tuple(stored[name].shape) != shape:
            yield Finding(
                "error",
                "tensors",
                f"{name} is {list(stored[name].shape)}, but the config describes {list(shape)}",
            )
    dtypes = {str(t.dtype).removeprefix("torch.") for n, t in stored.items() if n in wanted}
    if len(dtypes) > 1:
        yield Finding(
            "suspicion", "tensors", f"the trained tensors have several dtypes: {sorted(dtypes)}"
        )
    for name, value in stored.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            yield Finding("error", "tensors", f"{name} has values that are not finite")
    for name in NORMS:
        if name in stored and bool((stored[name] == 1).all()):
            yield Finding(
                "suspicion",
                "norm",
                (
                    f"{name} is all ones: it was never trained, or was lost and replaced by "
                    "its initial value"
                ),
            )


def vocabulary(files: Files, target: Mapping[str, Any]) -> Iterator[Finding]:
    """Check d2t, t2d and the output matrix of a reduced vocabulary."""
    size, whole = (
        files.flat.get("draft_vocab_size") or files.flat.get("vocab_size"),
        files.flat.get("vocab_size"),
    )
    if isinstance(size, int) and isinstance(whole, int):
        for wrong in faults(files.tensors, size, whole):
            yield Finding("error", "vocabulary", wrong)


def block_size(files: Files, drafts: int | None) -> list[Finding]:
    size = files.flat.get("block_size")
    if isinstance(size, int) and not files.layout["sample_from_anchor"]:
        size -= 1  # the anchor's own slot predicts nothing
    out = []
    methods = (files.raw.get("speculators_config") or {}).get("proposal_methods") or [{}]
    told = methods[0].get("speculative_tokens", size)
    for name, value in (
        ("speculative_tokens of config.json", told),
        ("num_speculative_tokens", drafts or size),
    ):
        if value != size:
            more = (
                "more than the draft was trained for"
                if isinstance(value, int) and value > (size or 0)
                else "a shorter block than the draft was trained for"
            )
            out.append(
                Finding(
                    "error",
                    "block-size",
                    f"{name} is {value}, block_size {size}: {more} (slots attend to each other "
                    "in both directions)",
                )
            )
    return out


RULES: tuple[Judge, ...] = (layout, attention, config, record, against_target, tensors, vocabulary)


def frozen(files: Files, target: Any) -> list[Finding]:
    """Compare included matrices with the target's: ``target`` has ``embed_tokens`` and ``lm_head``
    [V, H].
    """
    out = []
    size, offsets = files.flat.get("draft_vocab_size"), files.tensors.get("d2t")
    embed, head = files.tensors.get("embed_tokens.weight"), files.tensors.get("lm_head.weight")
    if embed is not None and not export.same_matrix(embed, target.embed_tokens):
        out.append(
            Finding(
                "error",
                "head",
                "embed_tokens.weight is not the target's; the draft was trained for another model",
            )
        )
    if head is None:
        return out
    rows = target.lm_head
    if isinstance(size, int) and offsets is not None and offsets.shape == (size,):
        ids = ids_of(offsets)
        if int(ids.min()) < 0 or int(ids.max()) >= rows.shape[0]:
            return out
        rows = rows[ids.to(rows.device)]
    if not export.same_matrix(head, rows):
        out.append(_wrong_head(head, rows, target.lm_head, offsets is not None))
    return out


def _wrong_head(head: Tensor, rows: Tensor, whole: Tensor, reduced: bool) -> Finding:
    """Tell whether the rows are the target's under other ids (d2t is wrong), or another model's (or
    an untied copy).
    """
    if reduced and head.shape == rows.shape:
        narrow, wide = head.to(torch.bfloat16), whole.detach().cpu().to(torch.bfloat16)
        bad = int((narrow != rows.detach().cpu().to(torch.bfloat16)).any(1).nonzero()[0, 0])
        at = (wide == narrow[bad]).all(1).nonzero().flatten()
        if at.numel():
            return Finding(
                "error",
                "vocabulary",
                f"row {bad} of lm_head is the target's row {int(at[0])}, but d2t maps it to "
                "another token: d2t is wrong",
            )
    return Finding(
        "error",
        "head",
        "lm_head.weight is not the target's (the embedding and the head are frozen): the head "
        "was trained, untied or taken from another model",
    )


def to_json(findings: list[Finding]) -> list[dict[str, str]]:
    return [dataclasses.asdict(f) for f in findings]
