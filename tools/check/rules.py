"""What files and config of a draft show, rule by rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dspark.cache.errors import DraftError
from dspark.cache.target.shape import rope_base, text_config
from dspark.tools.check.files import OVERRIDES, Files, Finding
from dspark.tools.check.tensor_rules import tensors, vocabulary
from dspark.train.draft import scaling
from dspark.train.draft.config import DraftConfig
from dspark.train.draft.saved.speculators import NON_CAUSAL

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
