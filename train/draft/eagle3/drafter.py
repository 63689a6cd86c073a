"""EAGLE-3 and P-EAGLE: one Llama layer that reads a fusion of three of the target's layers beside
the embedding of the next token.

The row of position p is made from the target's states at p and the token x[p + 1], and predicts x[p
+ 2]. EAGLE-3 continues from its own state and the token it drafted, so training unrolls it:
``--block-size`` is the number of such steps ("test-time steps"). P-EAGLE drafts them all at once:
later rows use the mask token and a learned state. The output matrix is the target's, frozen, as for
the other types.

vLLM serves both with method ``eagle3``, the second with ``parallel_drafting``; SGLang reads the
same tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dspark.cache.errors import DraftError, UsageError
from dspark.cache.target.taps import AUX
from dspark.train.draft.config import DraftConfig
from dspark.train.draft.types import DrafterType

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dspark.train.config import TrainConfig
    from dspark.train.draft.decoding import Decoder
    from dspark.train.draft.model import DraftModel, TargetWeights
    from dspark.train.objective.config import ObjectiveConfig

LOSS = '{"kl": 1.0}'
DECAY = 4.48142  # exp(-1 / DECAY) = 0.8, the weight of a step relative to the one before it
ARCHITECTURE = "LlamaForCausalLMEagle3"
_NOT_OURS = (
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "confidence_head_with_markov",
    "sample_from_anchor",
    "layer_types",
)
_NONE = {"markov_rank": 0, "enable_confidence_head": False, "confidence_head_with_markov": False}


class Eagle3(DrafterType):
    name = "eagle3"
    summary = "one layer that reads three aux layers, unrolled"
    servers = "vLLM and SGLang (method eagle3)"
    method = "eagle3"
    spelled_by_speculators = False
    windows = False
    sharded = False
    own_keys = ("eagle_aux_hidden_state_layer_ids",)
    stated: tuple[str, ...] = ("eagle_aux_hidden_state_layer_ids", "draft_vocab_size")
    masks = False

    @property
    def defaults(self) -> Mapping[str, Any]:
        return {
            "num_layers": 1,
            "markov_rank": 0,
            "confidence_head_alpha": 0.0,
            "decay": DECAY,
            "loss_fn": LOSS,
        }

    def check(self, config: DraftConfig) -> None:
        if config.num_layers != 1:
            raise UsageError(f"an {self.name} draft has one layer, not {config.num_layers}")
        if config.markov_rank or config.enable_confidence_head:
            raise UsageError(f"an {self.name} draft has no Markov head and no confidence head")
        if len(config.target_layer_ids) != AUX:
            raise UsageError(
                f"an {self.name} draft reads {AUX} layers, not {list(config.target_layer_ids)}"
            )

    def recognises(self, flat: Mapping[str, Any]) -> bool:
        return flat.get("architectures") == [ARCHITECTURE] and not flat.get("parallel_drafting")

    def from_flat(self, flat: Mapping[str, Any]) -> DraftConfig:
        if flat.get("architectures") != [ARCHITECTURE]:
            raise DraftError(
                f"config.json has architectures = {flat.get('architectures')!r}; expected "
                f"{[ARCHITECTURE]!r}"
            )
        for key in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"):
            if flat.get(key):
                raise DraftError(
                    f"config.json has {key}; this package supports only drafts without it"
                )
        ids = flat.get("eagle_aux_hidden_state_layer_ids")
        if not isinstance(ids, list):
            raise DraftError("config.json has no eagle_aux_hidden_state_layer_ids")
        own: dict[str, Any] = {"target_layer_ids": [i - 1 for i in ids], "architectures": None}
        own |= {"mask_token_id": flat.get("mask_token_id", 0), "sample_from_anchor": True}
        return DraftConfig.of_backbone({**flat, **own}, {"speculator_type": self.name, **_NONE})

    def to_flat(self, config: DraftConfig) -> dict[str, Any]:
        flat = {
            name: value for name, value in config.flat_fields().items() if name not in _NOT_OURS
        }
        ids = [i + 1 for i in config.target_layer_ids]  # vLLM's: the state entering a layer
        # SGLang reads only the ids in eagle_config, as outputs of layers, and vLLM only how many
        # there are. SGLang takes the target's output matrix only where no size of a vocabulary is
        # given, which both understand as the whole one.
        return flat | {
            "architectures": [ARCHITECTURE],
            "model_type": "llama",
            "eagle_aux_hidden_state_layer_ids": ids,
            "eagle_config": {
                "eagle_aux_hidden_state_layer_ids": list(config.target_layer_ids),
                "use_aux_hidden_state": True,
            },
            "mlp_bias": False,
            "draft_vocab_size": config.draft_vocab_size if config.reduced_vocab else None,
        }

    def servable_by_vllm(self, config: DraftConfig) -> bool:
        return True

    def servable_by_sglang(self, config: DraftConfig) -> bool:
        return True  # LlamaForCausalLMEagle3

    def sized(self, **fields: Any) -> DraftConfig:
        return super().sized(**fields | _NONE)

    def network(
        self,
        config: DraftConfig,
        target: TargetWeights,
        draft_ids: Tensor | None,
        *,
        frozen_dtype: torch.dtype | None = None,
    ) -> DraftModel:
        from dspark.train.draft.eagle3.model import Eagle3Model

        parallel = config.speculator_type == "peagle"
        return Eagle3Model(config, target, draft_ids, frozen_dtype=frozen_dtype, parallel=parallel)

    def objective(self, settings: TrainConfig) -> ObjectiveConfig:
        from dspark.train.config import TrainConfig
        from dspark.train.objective.config import ObjectiveConfig

        unsaid = settings.loss_fn == TrainConfig(cache="").loss_fn  # the default of the other types
        return ObjectiveConfig.from_json(
            LOSS if unsaid else settings.loss_fn, confidence=0.0, decay=settings.decay
        )

    def decoder(self, draft: DraftModel) -> Decoder:
        from dspark.train.draft.eagle3.decoding import Eagle3Decoder
        from dspark.train.draft.eagle3.model import Eagle3Model

        assert isinstance(draft, Eagle3Model)
        return Eagle3Decoder(draft)


class Peagle(Eagle3):
    name = "peagle"
    summary = "eagle3 that drafts all its tokens at once"
    servers = "vLLM (method eagle3 with parallel_drafting)"
    stated = (*Eagle3.stated, "mask_token_id")
    masks = True

    def recognises(self, flat: Mapping[str, Any]) -> bool:
        return flat.get("architectures") == [ARCHITECTURE] and bool(flat.get("parallel_drafting"))

    def to_flat(self, config: DraftConfig) -> dict[str, Any]:
        return super().to_flat(config) | {"parallel_drafting": True}

    def servable_by_sglang(self, config: DraftConfig) -> bool:
        return False  # no parallel drafting there

    def serving(self, config: DraftConfig) -> dict[str, Any]:
        return super().serving(config) | {"parallel_drafting": True}


EAGLE3, PEAGLE = Eagle3(), Peagle()
