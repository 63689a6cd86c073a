"""SPD, speculative pipeline decoding: a head that drafts one token at a time beside a target that
runs as a pipeline of stages.

n tokens of one sequence are in flight: the newest has passed no stage yet, the one before it one
stage, and so on. The head predicts the token after the newest from what exists before a step, so it
can run in parallel with that step. The format is "v10", with fixed stages.

The stages end at the store's layers, the last one at the target's last layer whatever is stored:
``dspark-dump --layers 14,30,46`` of 47 layers gives three, which end after 15, 31 and 47. No server
supports such a head; ``dspark-tools eval`` decodes with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.cache.errors import DraftError, UsageError
from dspark.cache.target.shape import count, text_config
from dspark.train.draft.config import DraftConfig
from dspark.train.draft.types import DrafterType

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dspark.train.config import TrainConfig
    from dspark.train.draft.decoding import Decoder
    from dspark.train.draft.model import DraftModel, TargetWeights
    from dspark.train.objective.config import ObjectiveConfig
    from dspark.train.objective.states import SlotStates

LOSS = '{"kl": 1.0}'
ARCHITECTURE = "SpeculationHeadV10"
# Name of a parameter here -> in the file, by how it begins.
NAMES = {"layers.": "spec_layers.", "head.": "lm_head."}
_NOT_OURS = (
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "confidence_head_with_markov",
    "sample_from_anchor",
    "layer_types",
    "mask_token_id",
)


class Spd(DrafterType):
    name = "spd"
    summary = "pipeline head, one token at a time"
    servers = "no server supports it; dspark-tools eval decodes with it"
    method = None
    spelled_by_speculators = False
    windows = False
    masks = False
    sharded = False
    stated = ("stage_ends", "tap_norm", "draft_vocab_size")
    compiled = False

    @property
    def defaults(self) -> Mapping[str, Any]:
        return {
            "num_layers": 1,
            "block_size": 1,
            "markov_rank": 0,
            "confidence_head_alpha": 0.0,
            "lr": 1e-4,
            "loss_fn": LOSS,
        }

    # Config

    def check(self, config: DraftConfig) -> None:
        ends = config.stage_ends
        if config.block_size != 1:
            raise UsageError(
                "an spd head drafts one token at a time: block_size must be 1, not "
                f"{config.block_size}"
            )
        if config.markov_rank or config.enable_confidence_head:
            raise UsageError("an spd head has no Markov head and no confidence head")
        if len(ends) < 2 or list(ends) != sorted(set(ends)) or ends[0] < 1:
            raise UsageError(
                f"stage_ends {list(ends)}: expected at least two stages with increasing "
                "ends, from 1"
            )
        if ends[-1] != config.num_target_layers:
            raise UsageError(
                f"stage_ends {list(ends)}: the last stage must end at the target's "
                f"{config.num_target_layers} layers"
            )
        if config.target_layer_ids[0] < 0:
            raise UsageError(
                f"target_layer_ids {list(config.target_layer_ids)}: the embeddings are not a "
                "layer to store, since every row has them"
            )

    def recognises(self, flat: Mapping[str, Any]) -> bool:
        return bool(flat.get("stage_ends"))

    def from_flat(self, flat: Mapping[str, Any]) -> DraftConfig:
        if flat.get("architectures") not in (None, [ARCHITECTURE]):
            raise DraftError(
                f"config.json has architectures = {flat['architectures']!r}; expected "
                f"{[ARCHITECTURE]!r}"
            )
        ends = flat.get("stage_ends")
        if not isinstance(ends, list) or not all(isinstance(end, int) for end in ends):
            raise DraftError(
                f"config.json has stage_ends {ends!r}; expected a list of layer numbers"
            )
        own = {
            "speculator_type": self.name,
            "markov_rank": 0,
            "enable_confidence_head": False,
            "confidence_head_with_markov": False,
            "stage_ends": tuple(ends),
        }
        return DraftConfig.of_backbone({**flat, "architectures": None, "mask_token_id": 0}, own)

    def to_flat(self, config: DraftConfig) -> dict[str, Any]:
        flat = {
            name: value for name, value in config.flat_fields().items() if name not in _NOT_OURS
        }
        return flat | {
            "architectures": [ARCHITECTURE],
            "stage_ends": list(config.stage_ends),
            "tap_rows": tap_rows(config),
            "tap_norm": "none",
        }

    def servable_by_vllm(self, config: DraftConfig) -> bool:
        return False

    def not_served(self, config: DraftConfig) -> str:
        return "it is an spd head, which no server supports"

    def sized(self, **fields: Any) -> DraftConfig:
        taps, layers = fields["target_layer_ids"], fields["num_target_layers"]
        ends = (*(i + 1 for i in taps[:-1]), layers)
        own = {
            "block_size": 1,
            "markov_rank": 0,
            "enable_confidence_head": False,
            "confidence_head_with_markov": False,
            "mask_token_id": 0,
        }
        return super().sized(**fields | own | {"stage_ends": ends})

    def configure(
        self,
        settings: TrainConfig,
        target: Mapping[str, Any],
        stored: Sequence[int],
        mask_token_id: int,
        draft_vocab_size: int | None,
    ) -> DraftConfig:
        text = text_config(target)
        heads, width = settings.num_heads, settings.head_dim
        kv_heads = settings.num_kv_heads
        if count(text, "kv_lora_rank") is not None:
            # Latent attention: the head reads the target's config as plain attention, while other
            # drafts use heads of 128.
            heads = heads or count(text, "num_attention_heads")
            kv_heads = kv_heads or count(text, "num_key_value_heads") or heads
            width = width or count(text, "head_dim", "qk_rope_head_dim")
        return DraftConfig.sized_for(
            target,
            target_layer_ids=self.layers(stored, target, settings.layers),
            mask_token_id=0,
            speculator_type=self.name,
            num_layers=settings.num_layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=width,
            intermediate_size=settings.intermediate_size,
            draft_vocab_size=draft_vocab_size,
            **settings.attention,
        )

    # Network and objective

    def network(
        self,
        config: DraftConfig,
        target: TargetWeights,
        draft_ids: Tensor | None,
        *,
        frozen_dtype: torch.dtype | None = None,
    ) -> DraftModel:
        from dspark.train.draft.spd.head import SpdHead

        return SpdHead(config, target, draft_ids, frozen_dtype=frozen_dtype)

    def objective(self, settings: TrainConfig) -> ObjectiveConfig:
        from dspark.train.config import TrainConfig
        from dspark.train.objective.config import ObjectiveConfig

        unsaid = settings.loss_fn == TrainConfig(cache="").loss_fn  # the default of the other types
        return ObjectiveConfig.from_json(
            LOSS if unsaid else settings.loss_fn, confidence=0.0, decay=0.0
        )

    def block_states(self, states: SlotStates) -> Tensor:
        assert states.z is not None
        return states.z

    # Files

    def served(
        self, tensors: dict[str, Tensor], config: DraftConfig, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        return {_renamed(name, NAMES): tensor for name, tensor in tensors.items()}

    def learnt(self, stored: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
        back = {theirs: ours for ours, theirs in NAMES.items()}
        return {_renamed(name, back): tensor for name, tensor in stored.items()}

    def packed(
        self, folder: Path, config: DraftConfig, tensors: Mapping[str, Tensor], target: str
    ) -> tuple[str, ...]:
        from dspark.train.draft.spd.files import write_skippy

        return write_skippy(folder, config, tensors, target)

    # Decoding

    def stages(self, config: DraftConfig) -> int:
        return len(config.stage_ends)

    def decoder(self, draft: DraftModel) -> Decoder:
        from dspark.train.draft.spd.decoding import SpdDecoder
        from dspark.train.draft.spd.head import SpdHead

        assert isinstance(draft, SpdHead)
        return SpdDecoder(draft)


def taps_at(config: DraftConfig, depth: int) -> int:
    """Count the stored layers that a token has passed after ``depth`` stages: those at or below
    that stage's end.
    """
    return sum(i + 1 <= config.stage_ends[depth - 1] for i in config.target_layer_ids)


def tap_rows(config: DraftConfig) -> list[list[int]]:
    """Return the hidden states that each feature is made of, deepest first, numbered as in
    transformers: 0 the embedding, i the output of layer i - 1.
    """
    ids = [0, *(i + 1 for i in config.target_layer_ids)]
    return [ids[: 1 + taps_at(config, depth)] for depth in range(len(config.stage_ends), 0, -1)]


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    found = next((old for old in prefixes if name.startswith(old)), None)
    return name if found is None else prefixes[found] + name[len(found) :]


SPD = Spd()
