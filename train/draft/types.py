"""Drafter types: one object per type owns everything in which it differs, and one table names the
objects.

A new type is a module with an object that derives from ``DrafterType`` (or from another type's
class) and a line in ``TYPES``. Nothing else branches on a draft's type. The objects are imported
when needed, so that listing the types does not import torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.cache.errors import MismatchError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dspark.train.config import TrainConfig
    from dspark.train.data.batch import Batch
    from dspark.train.draft.config import DraftConfig
    from dspark.train.draft.decoding import Decoder
    from dspark.train.draft.model import DraftModel, TargetWeights
    from dspark.train.objective.config import ObjectiveConfig
    from dspark.train.objective.slots import SlotInputs
    from dspark.train.objective.states import SlotStates

DEFAULT_TYPE = "dspark"
# Name of a type -> where its object is.
TYPES = {
    "dspark": "dspark.train.draft.dspark:DSPARK",
    "dflash": "dspark.train.draft.dflash:DFLASH",
    "spd": "dspark.train.draft.spd.drafter:SPD",
    "eagle3": "dspark.train.draft.eagle3.drafter:EAGLE3",
    "peagle": "dspark.train.draft.eagle3.drafter:PEAGLE",
}


class DrafterType(ABC):
    """What one type of draft determines. The default methods suit drafts that predict blocks with
    the target's output matrix.
    """

    name: str
    """As in ``TYPES``, ``--speculator-type`` and config.json."""
    summary: str
    """What it is, for ``--help``: a few words."""

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Return this type's default training settings (``TrainConfig``), used if neither the user
        nor a recipe sets them.
        """
        return {}

    servers: str = "vLLM (method dspark)"
    """Which server takes it, in words, for the line that training prints at its end."""
    method: str | None = "dspark"
    """vLLM's name of the method that decodes with it; None where it has none."""
    spelled_by_speculators: bool = True
    """Whether the speculators format describes it."""
    windows: bool = True
    """Whether its layers may be sliding or causal ones."""
    masks: bool = True
    """Whether it embeds the target's mask token."""
    sharded: bool = True
    """Whether ``--strategy fsdp2`` can train it."""
    own_keys: tuple[str, ...] = ()
    """Keys of config.json that it writes, and that a server would obey before the keys of another
    type.
    """
    stated: tuple[str, ...] = (
        "sample_from_anchor",
        "confidence_head_with_markov",
        "enable_confidence_head",
        "draft_vocab_size",
        "mask_token_id",
    )
    """Keys that its config.json must have, because readers differ on their default or cannot do
    without.
    """
    compiled: bool = True
    """Whether ``torch.compile`` is the default on a GPU."""

    # Config

    @abstractmethod
    def check(self, config: DraftConfig) -> None:
        """Raise UsageError unless ``config`` is one of this type. Sizes shared by all types have
        been checked already.
        """

    @abstractmethod
    def recognises(self, flat: Mapping[str, Any]) -> bool:
        """Tell whether a config.json that names no type describes a draft of this one."""

    @abstractmethod
    def from_flat(self, flat: Mapping[str, Any]) -> DraftConfig:
        """Return the config that a config.json describes. Raises DraftError for what would be
        computed wrongly.
        """

    @abstractmethod
    def to_flat(self, config: DraftConfig) -> dict[str, Any]:
        """The contents of config.json."""

    @abstractmethod
    def servable_by_vllm(self, config: DraftConfig) -> bool:
        """Tell whether vLLM serves it (written to config.json as ``vllm_servable``)."""

    def servable_by_sglang(self, config: DraftConfig) -> bool:
        """Tell whether SGLang serves it (``sglang_servable`` in config.json), from reading 0.5.23:
        Markov heads of every kind, no reduced vocabulary. False also for what was not examined
        there.
        """
        plain = not config.sliding_window and not config.rope_scaling
        return (
            self.method == "dspark"
            and plain
            and not config.reduced_vocab
            and not config.bonus_anchor
        )

    def serving(self, config: DraftConfig) -> dict[str, Any]:
        """Return the keys of vLLM's ``speculative_config`` beside model, number of tokens and
        sampling of drafts.
        """
        return {"method": self.method}

    def not_served(self, config: DraftConfig) -> str:
        """Say why ``servable_by_vllm`` is false."""
        return (
            f"its Markov head is {config.markov_head_type}, and vLLM supports only the vanilla one"
        )

    def sized(self, **fields: Any) -> DraftConfig:
        """Return the config with these ``fields``, which ``DraftConfig.sized_for`` computed for a
        target. Drop or change what this type lacks.
        """
        from dspark.train.draft.config import DraftConfig

        return DraftConfig(**fields)

    def layers(
        self, stored: Sequence[int], target: Mapping[str, Any], asked: Sequence[int] | None = None
    ) -> tuple[int, ...]:
        """Return which of the ``stored`` layers (outputs, 0-based, ascending) the draft reads,
        limited to those ``asked`` for if any, on a target with this HF config. Raises
        MismatchError, naming what the store lacks.
        """
        from dspark.cache.target import taps
        from dspark.cache.target.shape import count, text_config

        missing = [i for i in asked or () if i not in stored]
        if missing:
            raise MismatchError(
                f"--layers {','.join(map(str, asked or ()))}: the store has {list(stored)} but "
                f"not {missing}"
            )
        number = count(text_config(target), "num_hidden_layers") or max(stored, default=0) + 1
        return taps.chosen(self.name, tuple(asked or stored), number)

    def configure(
        self,
        settings: TrainConfig,
        target: Mapping[str, Any],
        stored: Sequence[int],
        mask_token_id: int,
        draft_vocab_size: int | None,
    ) -> DraftConfig:
        """Return the draft that ``settings`` describe, on a store with the target's HF config and
        the ``stored`` layers.
        """
        from dspark.train.draft.config import DraftConfig

        return DraftConfig.sized_for(
            target,
            target_layer_ids=self.layers(stored, target, settings.layers),
            mask_token_id=mask_token_id,
            speculator_type=self.name,
            num_layers=settings.num_layers,
            num_heads=settings.num_heads,
            num_kv_heads=settings.num_kv_heads,
            head_dim=settings.head_dim,
            intermediate_size=settings.intermediate_size,
            **settings.attention,
            block_size=settings.block_size,
            markov_rank=settings.markov_rank,
            markov_head_type=settings.markov_head_type,
            enable_confidence_head=settings.confidence_head_alpha > 0,
            draft_vocab_size=draft_vocab_size,
        )

    def starts_from(self, other: DrafterType) -> bool:
        """Tell whether a draft of this type can start from the tensors of one of type ``other``
        (``--init-from``).
        """
        return other.name == self.name

    # Network and objective

    def network(
        self,
        config: DraftConfig,
        target: TargetWeights,
        draft_ids: Tensor | None,
        *,
        frozen_dtype: torch.dtype | None = None,
    ) -> DraftModel:
        """Return the untrained draft: ``forward(batch, plan) -> SlotStates``, ``trained()``,
        ``frozen_head``, as ``DraftModel`` has them.
        """
        from dspark.train.draft.model import DraftModel

        return DraftModel(config, target, draft_ids, frozen_dtype=frozen_dtype)

    def objective(self, settings: TrainConfig) -> ObjectiveConfig:
        """Return the weights of the loss's terms."""
        from dspark.train.objective.config import ObjectiveConfig

        return ObjectiveConfig.from_json(
            settings.loss_fn, confidence=settings.confidence_head_alpha, decay=settings.decay
        )

    def judging(self, decay: float) -> ObjectiveConfig:
        """Return the terms whose means validation and ``score`` report, whatever training
        weighs.
        """
        from dspark.train.objective.config import ObjectiveConfig

        return ObjectiveConfig(decay=decay)

    def slots(self, batch: Batch, states: SlotStates, decay: float) -> SlotInputs:
        """Return the slots that the objective scores, with their weights and target rows."""
        from dspark.train.objective.slots import SlotInputs

        return SlotInputs.gather(batch, states, decay)

    def block_states(self, states: SlotStates) -> Tensor:
        """Return what ``drafted`` reads of a forward pass, [A, B, H]."""
        return states.h

    def drafted(self, model: DraftModel, h: Tensor, anchor_ids: Tensor) -> Tensor:
        """Return the tokens int64[n, B] (target ids) that the draft greedily proposes for blocks
        with states ``h`` [n, B, H], each conditioned on its own previous tokens.
        """
        from dspark.train.draft.decoding import chained

        return chained(model, h, anchor_ids, lambda logits: logits.argmax(-1))

    # Files

    def served(
        self, tensors: dict[str, Tensor], config: DraftConfig, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Return name -> tensor of model.safetensors, from the trained tensors in ``dtype``. Works
        on the meta device too, for shapes.
        """
        return tensors

    def learnt(self, stored: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
        """The inverse of ``served``: the trained tensors in a checkpoint at ``path``. Raises
        DraftError if it contradicts the type.
        """
        return stored

    def packed(
        self, folder: Path, config: DraftConfig, tensors: Mapping[str, Tensor], target: str
    ) -> tuple[str, ...]:
        """Write what this type's servers need beside config.json and model.safetensors into the
        export ``folder``; returns the files' names.
        """
        return ()

    def written(self, folder: Path, model: DraftModel) -> None:  # noqa: B027 (nothing is right for most)
        """Called when config.json and model.safetensors are in ``folder``: write what readers of
        this type need beside them.
        """

    # Decoding

    def stages(self, config: DraftConfig) -> int:
        """Return the number of stages of the target's pipeline that the draft runs beside
        (``tools/decode/pipeline.py``); 0 for drafts of blocks.
        """
        return 0

    def decoder(self, draft: DraftModel) -> Decoder:
        """Return a new decoder of one sequence."""
        from dspark.train.draft.decoding import BlockDecoder

        return BlockDecoder(draft)


@cache
def drafter(name: str) -> DrafterType:
    """Return the type of this name."""
    if name not in TYPES:
        raise UsageError(f"speculator_type is {name!r}; expected one of {', '.join(TYPES)}")
    module, attribute = TYPES[name].split(":")
    found: DrafterType = getattr(import_module(module), attribute)
    return found


def type_of(flat: Mapping[str, Any]) -> DrafterType:
    """Return the type of the draft that a config.json describes: the one it names, or the first
    that recognises it.
    """
    named = flat.get("speculator_type")
    if named:
        return drafter(str(named))
    return next((t for t in map(drafter, TYPES) if t.recognises(flat)), drafter(next(iter(TYPES))))
