"""The shape of a draft's layers, from its target's config: shown by dump before a store is started,
and built by train.

Legend: H hidden size. "Text config": the part of a config.json that describes the language model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, overload

from dspark.cache.errors import UsageError

# Width of a head if the target's own cannot be used.
HEAD_DIM = 128
# FlashAttention, which serves drafts, supports heads of at most this width.
WIDEST_HEAD = 256
# MLP width in hidden sizes if the target has none that fits: Qwen3-8B's, and that of published
# drafts of MoE targets (SpecForge's configs/qwen3.5-35b-a3b-dflash.json: 6,144 for a hidden size of
# 2,048).
MLP_RATIO = 3
DEFAULT_ROPE_BASE = 1_000_000.0
DEFAULT_MAX_POSITIONS = 32768

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERT_WIDTHS = ("moe_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size")
# Targets whose attention vLLM runs only in the target: their drafts take 128-wide heads of the same
# total width, as the published Qwen3.5 DSpark drafts do (SpecForge's
# configs/qwen3.5-4b-dspark.json: 32 heads of 128 for 16 of 256).
RESHAPED_HEADS = ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next")


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What the user (or a preset) fixes about a draft's shape. None = derived from the target."""

    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftShape:
    """A draft's layers. ``notes``: what differs from the target's own value, and why."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return (
            f"hidden {self.hidden_size}, {self.num_heads} heads of {self.head_dim}, "
            f"{self.num_kv_heads} key-value heads, "
            f"MLP {self.intermediate_size}"
        )

    def parameters(self, num_layers: int, aux_layers: int) -> int:
        """Count the weights of the layers and of ``fc``, which are all trained; not embedding, head
        and Markov factors.
        """
        h, inner = self.hidden_size, self.head_dim * (self.num_heads + self.num_kv_heads)
        return num_layers * (2 * h * inner + 3 * h * self.intermediate_size) + aux_layers * h * h


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the text part of a ``config.json`` (``config`` itself if it has no parts)."""
    for name in ("text_config", "llm_config", "language_config", "thinker_config"):
        if isinstance(config.get(name), Mapping):
            return text_config(config[name])
    return config


def shape_for(config: Mapping[str, Any], asked: Asked | None = None) -> DraftShape:
    """The shape of a draft for the target with this ``config.json``; ``asked`` takes precedence.
    Sizes are the target's if it has them, so that a draft layer has the arithmetic of a target
    layer. Exceptions, each in ``notes``: latent attention (heads of 128, as many key as query
    heads), heads that serving does not support (128 wide, same total width), an MLP that only an
    expert has or that is narrower than H (3 H). Raises UsageError if the config has no hidden size,
    and for impossible shapes.
    """
    text, asked = text_config(config), asked or Asked()
    hidden = count(text, "hidden_size")
    if hidden is None:
        raise UsageError("the target's config.json has no hidden_size; cannot size a draft for it")
    notes: list[str] = []
    heads, kv_heads, head_dim = _heads(text, hidden, notes)
    if asked.head_dim is not None and asked.num_heads is None and asked.head_dim != head_dim:
        # The same total width, so that a new head size alone does not change the arithmetic.
        heads, kv_heads = (max(n * head_dim // asked.head_dim, 1) for n in (heads, kv_heads))
    head_dim = asked.head_dim or head_dim
    if asked.num_heads is not None:
        kv_heads = (
            asked.num_heads if kv_heads == heads else largest_divisor(asked.num_heads, kv_heads)
        )
        heads = asked.num_heads
    kv_heads = asked.num_kv_heads or kv_heads
    if heads % kv_heads:
        raise UsageError(
            f"the draft would have {heads} heads and {kv_heads} key-value heads; expected a "
            "multiple. Give --num-heads and --num-kv-heads."
        )
    return DraftShape(
        hidden_size=hidden,
        intermediate_size=asked.intermediate_size or _mlp(text, hidden, notes),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=rope_base(text, DEFAULT_ROPE_BASE),
        rms_norm_eps=_number(text, "rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps") or 1e-6,
        max_position_embeddings=count(text, "max_position_embeddings") or DEFAULT_MAX_POSITIONS,
        notes=tuple(notes),
    )


def _heads(text: Mapping[str, Any], hidden: int, notes: list[str]) -> tuple[int, int, int]:
    """Return query heads, key-value heads and width of a head."""
    heads = count(text, "num_attention_heads", "n_head", "num_heads")
    if heads is None:
        heads = max(hidden // HEAD_DIM, 1)
        notes.append(f"the target's config states no number of heads: using {heads} of {HEAD_DIM}")
        return heads, heads, HEAD_DIM
    if count(text, "kv_lora_rank") is not None:
        notes.append(
            f"the target has latent attention: using heads of {HEAD_DIM} and one "
            "key-value head per query head"
        )
        return heads, heads, HEAD_DIM
    kv_heads = min(count(text, "num_key_value_heads") or heads, heads)
    if heads % kv_heads:
        kv_heads = largest_divisor(heads, kv_heads)
        notes.append(
            f"the target's key-value heads do not divide its {heads} heads: using {kv_heads} "
            "key-value heads"
        )
    width = count(text, "head_dim") or max(hidden // heads, 2)
    reshaped = str(text.get("model_type")) in RESHAPED_HEADS and width > HEAD_DIM
    if reshaped or width > WIDEST_HEAD or width % 2:
        heads, kv_heads = (max(n * width // HEAD_DIM, 1) for n in (heads, kv_heads))
        kv_heads = largest_divisor(heads, kv_heads)
        why = (
            "vLLM serves no draft with this target's own head shape"
            if reshaped
            else "no server supports such heads"
        )
        notes.append(
            f"the target's heads are {width} wide and {why}: using {heads} heads of {HEAD_DIM}"
        )
        width = HEAD_DIM
    return heads, kv_heads, width


def _mlp(text: Mapping[str, Any], hidden: int, notes: list[str]) -> int:
    """Return the width of the draft's MLP: the target's dense one, else three hidden sizes."""
    own = count(text, "intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim")
    experts = count(text, *EXPERT_COUNTS) or 0
    only_experts = (
        experts > 1 and count(text, *EXPERT_WIDTHS) is None and own is not None and own < 2 * hidden
    )
    if own is not None and own >= hidden and not only_experts:
        return own
    out = MLP_RATIO * hidden
    what = (
        "the target's config has no intermediate_size"
        if own is None
        else f"the target's intermediate_size is {own}"
    )
    why = (
        ", an expert's"
        if only_experts
        else ""
        if own is None
        else f", narrower than its hidden size {hidden}"
    )
    notes.append(f"{what}{why}: MLP of {MLP_RATIO} x {hidden} = {out}")
    return out


@overload
def rope_base(config: Mapping[str, Any], default: float) -> float: ...
@overload
def rope_base(config: Mapping[str, Any], default: None = None) -> float | None: ...
def rope_base(config: Mapping[str, Any], default: float | None = None) -> float | None:
    """Return the RoPE base in a config of a target or a draft; ``default`` if it has none. It may
    be nested under ``rope_parameters`` (transformers 5) or flat (transformers 4), and nested once
    more by layer type (Gemma): a draft attends fully, so it uses full attention's base.
    """
    for name in ("rope_parameters", "rope_scaling"):
        nested = config.get(name)
        if not isinstance(nested, Mapping):
            continue
        full = nested.get("full_attention", nested)
        if isinstance(full, Mapping) and full.get("rope_theta") is not None:
            return float(full["rope_theta"])
    value = config.get("rope_theta")
    return default if value is None else float(value)


def count(config: Mapping[str, Any], *names: str) -> int | None:
    """Return the first of ``names`` that is a positive whole number in ``config``; for a list by
    layer, the largest.
    """
    for name in names:
        value = config.get(name)
        if isinstance(value, list) and value and all(isinstance(x, int) for x in value):
            value = max(value)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _number(config: Mapping[str, Any], *names: str) -> float | None:
    return next((float(config[n]) for n in names if isinstance(config.get(n), int | float)), None)


def largest_divisor(whole: int, at_most: int) -> int:
    """Return the largest divisor of ``whole`` that is at most ``at_most``."""
    return next(n for n in range(max(min(at_most, whole), 1), 0, -1) if whole % n == 0)
