"""The shape of a draft, validated on construction: derived from a target's config, and written to
config.json.

Legend: H hidden size, L aux layers, V target vocabulary, Vd draft vocabulary, B block size, r
Markov rank.

config.json is the flat layout that DeepSpec writes and vLLM's ``Qwen3DSparkModel`` reads (method
``dspark``): Qwen3 keys at top level plus the draft's own. Whatever affects serving is always
written, even if a reader has a default, because readers' defaults differ (``sample_from_anchor``:
true in vLLM for this layout, false in others).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from dspark.cache.errors import DraftError, UsageError
from dspark.cache.target.shape import (
    DEFAULT_ROPE_BASE,
    Asked,
    count,
    rope_base,
    shape_for,
    text_config,
)
from dspark.train.draft import scaling, sight
from dspark.train.draft.types import DEFAULT_TYPE, drafter, type_of

if TYPE_CHECKING:
    from dspark.train.ops.rope import Turning

# Far above any draft's, so that a damaged config.json is refused before anything is allocated for
# it.
MOST = {
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 22,
    "num_layers": 256,
    "num_heads": 1 << 14,
    "num_kv_heads": 1 << 14,
    "head_dim": 1 << 14,
    "vocab_size": 1 << 25,
    "num_target_layers": 1 << 13,
    "block_size": 1 << 12,
    "markov_rank": 1 << 18,
}
NUM_LAYERS = 5  # by default
MARKOV_TYPES = ("vanilla", "gated", "rnn")


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftConfig:
    """``target_layer_ids`` are outputs of decoder layers, 0-based (-1: embeddings), in the order of
    the aux axis.

    ``hidden_size`` equals the target's, since embedding and lm_head are the target's own, frozen.
    ``draft_vocab_size`` below ``vocab_size`` predicts only some tokens. ``block_size`` is the
    number of drafted tokens: slot 0 is the anchor and already predicts (anchor-first layout). RoPE
    is neox half-split, and plain whatever the target's scaling, unless ``rope_scaling`` is given.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int
    draft_vocab_size: int
    speculator_type: str = DEFAULT_TYPE
    num_layers: int = NUM_LAYERS
    block_size: int = 7
    markov_rank: int = 256
    markov_head_type: str = "vanilla"
    enable_confidence_head: bool = True
    confidence_head_with_markov: bool = True
    rope_theta: float = DEFAULT_ROPE_BASE
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    stage_ends: tuple[int, ...] = ()
    """For ``spd``: how many of the target's layers a token has passed at the end of each stage,
    rising.
    """
    rope_scaling: Mapping[str, Any] | None = field(default=None, hash=False)
    """``rope_type`` and its numbers (``scaling.KINDS``), without the base; None: plain RoPE."""
    layer_types: tuple[str, ...] = ()
    """Per layer ``full_attention`` or ``sliding_attention``; () where all attend fully."""
    sliding_window: int | None = None
    """Tokens that a query of a sliding layer sees, itself among them; None if and only if there is
    no such layer.
    """
    is_causal: bool | None = None
    """Of all layers, whether a slot sees the later ones of its block. None: full layers do, sliding
    ones do not.
    """
    bonus_anchor: bool = False
    """Slot 0 predicts nothing and slot k its own position, as others train (``sample_from_anchor``
    false): a slot more than drafts.
    """

    def __post_init__(self) -> None:
        sizes = (
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "vocab_size",
            "num_target_layers",
            "draft_vocab_size",
            "block_size",
            "max_position_embeddings",
        )
        for name in sizes:
            value = getattr(self, name)
            self._require(
                isinstance(value, int) and value > 0,
                f"{name} is {value!r}; expected a positive integer",
            )
        for name, most in MOST.items():
            self._require(
                getattr(self, name) <= most,
                f"{name} is {getattr(self, name)}; expected at most {most}",
            )
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            self._require(
                math.isfinite(value) and value > 0,
                f"{name} is {value!r}; expected a finite number above 0",
            )
        self._require(
            self.head_dim % 2 == 0, f"head_dim is {self.head_dim}; RoPE needs an even number"
        )
        self._require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}",
        )
        self._require(
            self.draft_vocab_size <= self.vocab_size,
            f"draft_vocab_size {self.draft_vocab_size} is larger than the target's vocabulary "
            f"{self.vocab_size}",
        )
        self._require(
            0 <= self.mask_token_id < self.vocab_size,
            f"mask_token_id {self.mask_token_id} is outside the vocabulary of {self.vocab_size}",
        )
        ids = self.target_layer_ids
        self._require(len(ids) > 0, "target_layer_ids is empty; expected at least one layer")
        self._require(
            all(-1 <= i < self.num_target_layers for i in ids) and list(ids) == sorted(set(ids)),
            f"target_layer_ids {list(ids)} must increase strictly within "
            f"-1..{self.num_target_layers - 1}",
        )
        self._check_attention()
        drafter(self.speculator_type).check(self)

    def _check_attention(self) -> None:
        kinds, window = self.layer_types, self.sliding_window
        self._require(
            not kinds or len(kinds) == self.num_layers,
            f"layer_types names {len(kinds)} layers, num_layers is {self.num_layers}",
        )
        self._require(
            kinds == sight.canonical(sight.layer_kinds(kinds, "layer_types")),
            "layer_types names no sliding layer; expected () if all layers attend fully",
        )
        positive = isinstance(window, int) and not isinstance(window, bool) and window > 0
        self._require(
            positive if kinds else window is None,
            f"sliding_window is {window!r} for layer_types {list(kinds)}; expected a number of "
            "tokens if there are sliding layers, else none",
        )
        known = drafter(self.speculator_type)
        plain = not kinds and self.is_causal is None
        self._require(
            known.windows or plain, f"{known.name} drafts have no sliding or causal layers"
        )
        object.__setattr__(self, "rope_scaling", scaling.checked(self.rope_scaling))

    @staticmethod
    def _require(holds: bool, message: str) -> None:
        if not holds:
            raise UsageError(message)

    @property
    def slots(self) -> int:
        """Return the tokens of a block that run through the layers: one per draft, plus the
        anchor's if it predicts nothing.
        """
        return self.block_size + self.bonus_anchor

    @property
    def sights(self) -> tuple[sight.Sight, ...]:
        """Return what the queries of each layer see."""
        return sight.sights(self.num_layers, self.layer_types, self.sliding_window, self.is_causal)

    @property
    def turning(self) -> Turning:
        """Return what RoPE's tables are made from."""
        from dspark.train.ops.rope import Turning

        return Turning(
            self.head_dim, self.rope_theta, tuple(sorted((self.rope_scaling or {}).items()))
        )

    @property
    def reduced_vocab(self) -> bool:
        return self.draft_vocab_size < self.vocab_size

    @property
    def servable_by_vllm(self) -> bool:
        """Tell whether vLLM serves the draft as saved."""
        return drafter(self.speculator_type).servable_by_vllm(self)

    @classmethod
    def sized_for(
        cls,
        target: Mapping[str, Any],
        *,
        target_layer_ids: tuple[int, ...],
        mask_token_id: int,
        speculator_type: str = DEFAULT_TYPE,
        num_layers: int = NUM_LAYERS,
        draft_vocab_size: int | None = None,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        intermediate_size: int | None = None,
        sliding_window: int | None = None,
        layer_types: tuple[str, ...] = (),
        rope_scaling: Mapping[str, Any] | None = None,
        **given: Any,
    ) -> DraftConfig:
        """Make a Qwen3-style draft for the target whose HF ``config.json`` is ``target``.
        ``given``: other fields; the rest have their defaults.

        Layers are sized by ``cache.target.shape.shape_for``; sizes given here take precedence. The
        type drops what it does not have.
        """
        text = text_config(target)
        missing = [key for key in ("num_hidden_layers", "vocab_size") if count(text, key) is None]
        if missing:
            raise UsageError(
                f"the target's config.json has no {', '.join(missing)}; cannot size a draft for it"
            )
        asked = Asked(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=intermediate_size,
        )
        shape = shape_for(target, asked)
        scaled, longest = scaling.checked(rope_scaling), shape.max_position_embeddings
        if scaling.reach(scaled, longest) < longest:
            raise UsageError(
                f"--rope-scaling reaches {scaling.reach(scaled, longest)} positions (factor "
                f"times the original ones), but the target takes {longest}: vLLM's table "
                "for the draft would be too short; raise factor"
            )
        return drafter(speculator_type).sized(
            speculator_type=speculator_type,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_layers=num_layers,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            vocab_size=int(text["vocab_size"]),
            draft_vocab_size=draft_vocab_size or int(text["vocab_size"]),
            mask_token_id=mask_token_id,
            target_layer_ids=tuple(target_layer_ids),
            num_target_layers=int(text["num_hidden_layers"]),
            rope_theta=shape.rope_theta,
            rms_norm_eps=shape.rms_norm_eps,
            max_position_embeddings=shape.max_position_embeddings,
            rope_scaling=scaled,
            layer_types=sight.asked(num_layers, sliding_window, layer_types),
            sliding_window=sliding_window,
            **given,
        )

    def to_flat(self) -> dict[str, Any]:
        """Return the contents of config.json."""
        return drafter(self.speculator_type).to_flat(self)

    def flat_fields(self) -> dict[str, Any]:
        """Return every field under its name in config.json; a type replaces what its readers need
        in another form.
        """
        return {
            "architectures": ["Qwen3DSparkModel"],
            "model_type": "qwen3",
            "speculator_type": self.speculator_type,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "rms_norm_eps": self.rms_norm_eps,
            # Both spellings: transformers 4 reads the first, transformers 5 and vLLM the second.
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default"}
            | dict(self.rope_scaling or {})
            | {"rope_theta": self.rope_theta},
            "max_position_embeddings": self.max_position_embeddings,
            "initializer_range": self.initializer_range,
            "tie_word_embeddings": False,
            "vocab_size": self.vocab_size,
            "draft_vocab_size": self.draft_vocab_size,
            **sight.written(self.num_layers, self.layer_types, self.sliding_window, self.is_causal),
            "block_size": self.slots,
            "mask_token_id": self.mask_token_id,
            "sample_from_anchor": not self.bonus_anchor,
            "markov_rank": self.markov_rank,
            "markov_head_type": self.markov_head_type,
            "enable_confidence_head": self.enable_confidence_head,
            "confidence_head_with_markov": self.confidence_head_with_markov,
            "target_layer_ids": list(self.target_layer_ids),
            "target_hidden_size": self.hidden_size,
            "num_target_layers": self.num_target_layers,
            "dtype": "bfloat16",
        }

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> DraftConfig:
        """Read config.json, ours or DeepSpec's. Refuses with ``DraftError`` what this package would
        compute wrongly.
        """
        try:
            return type_of(flat).from_flat(flat)
        except UsageError as wrong:
            raise DraftError(f"config.json describes no usable draft: {wrong}") from wrong

    @classmethod
    def of_backbone(cls, flat: Mapping[str, Any], own: Mapping[str, Any]) -> Self:
        """Return the Qwen3 backbone that a flat config describes, with a type's ``own`` fields.
        Errors as ``from_flat``.
        """
        for key, allowed in _HONOURED.items():
            if flat.get(key) not in (None, *allowed):
                raise DraftError(
                    f"config.json has {key} = {flat[key]!r}; this package computes only "
                    f"{allowed[0]!r}"
                )
        shown, scaled = sight.read(flat), scaling.read(flat)
        wide = flat.get("target_hidden_size")
        if wide is not None and wide != flat.get("hidden_size"):
            raise DraftError(
                f"config.json has target_hidden_size {wide}, hidden_size "
                f"{flat.get('hidden_size')}: not equal"
            )
        try:
            bonus = flat.get("sample_from_anchor") is False
            return cls(
                hidden_size=int(flat["hidden_size"]),
                intermediate_size=int(flat["intermediate_size"]),
                num_layers=int(flat["num_hidden_layers"]),
                num_heads=int(flat["num_attention_heads"]),
                num_kv_heads=int(flat["num_key_value_heads"]),
                head_dim=int(flat["head_dim"]),
                vocab_size=int(flat["vocab_size"]),
                draft_vocab_size=int(flat.get("draft_vocab_size") or flat["vocab_size"]),
                mask_token_id=int(flat["mask_token_id"]),
                target_layer_ids=tuple(int(i) for i in flat["target_layer_ids"]),
                num_target_layers=int(flat["num_target_layers"]),
                block_size=int(flat["block_size"]) - bonus,
                bonus_anchor=bonus,
                rope_theta=rope_base(flat, DEFAULT_ROPE_BASE),
                rms_norm_eps=float(flat["rms_norm_eps"]),
                max_position_embeddings=int(flat["max_position_embeddings"]),
                initializer_range=float(flat.get("initializer_range", 0.02)),
                rope_scaling=scaled,
                **shown,
                **own,
            )
        except KeyError as missing:
            raise DraftError(
                f"config.json has no {missing.args[0]!r}; is this a DSpark draft?"
            ) from missing
        except (UsageError, TypeError, ValueError) as wrong:
            raise DraftError(f"config.json describes no usable draft: {wrong}") from wrong


# What a config may say about things that are not parameters here; absent means the first value.
_HONOURED: dict[str, tuple[Any, ...]] = {
    "architectures": (["Qwen3DSparkModel"],),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "sample_from_anchor": (True, False),
    "is_neox_style": (True,),
    "rope_is_neox_style": (True,),
    "logit_scale": (1.0,),
    "dflash_config": ({},),
}
