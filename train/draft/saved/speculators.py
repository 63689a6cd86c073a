"""The other spelling of a draft's config.json: the speculators format (vllm-project/speculators),
to and from the flat one.

Both describe the same tensors under the same names. The differences, which have caused bugs
elsewhere:

- layer ids: ``aux_hidden_state_layer_ids`` are states *entering* layer j, so j = i + 1 of the flat
  ``target_layer_ids``;
- ``sample_from_anchor``: absent means false here (vLLM 0.32 ``update_dspark``), true in a flat
  config;
- ``sliding_window_non_causal`` true lets the slots of a sliding layer see later ones: ``is_causal``
  false of the flat layout. vLLM 0.32 reads the former for dflash drafts only, the latter, in the
  backbone, for all;
- ``block_size`` counts the anchor's slot too if ``sample_from_anchor`` is false; with true it is
  the number of drafts in both;
- the backbone's keys sit in ``transformer_layer_config``, and the number of drafts to ask for in
  ``speculators_config``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark.cache.errors import DraftError

MARK = "speculators_model_type"
NON_CAUSAL = "sliding_window_non_causal"
# Keys of the flat layout that are the draft's own; everything else describes the backbone.
_OWN = (
    "draft_vocab_size",
    "block_size",
    "mask_token_id",
    "sample_from_anchor",
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "confidence_head_with_markov",
    "target_hidden_size",
    "num_target_layers",
    "speculator_type",
    "vllm_servable",
)
_REPLACED = ("architectures", "target_layer_ids", "dtype", "sglang_servable")


def to_speculators(
    flat: Mapping[str, Any], verifier: str, verifier_architectures: list[str]
) -> dict[str, Any]:
    """config.json in the speculators format. ``verifier``: id or folder of the target, as it will
    be given to a server.
    """
    backbone = {k: v for k, v in flat.items() if k not in (*_OWN, *_REPLACED)}
    return {
        "architectures": ["DSparkSpeculator"],
        MARK: "dspark",
        "dtype": flat["dtype"],
        "transformer_layer_config": backbone,
        **{k: flat[k] for k in _OWN if k in flat},
        "aux_hidden_state_layer_ids": [i + 1 for i in flat["target_layer_ids"]],
        "tie_word_embeddings": False,
        "speculators_config": {
            "algorithm": "dspark",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": flat["block_size"] - (not flat["sample_from_anchor"]),
                }
            ],
            "verifier": {"name_or_path": verifier, "architectures": verifier_architectures},
        },
    }


def to_flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flat form of a speculators config, which ``DraftConfig.from_flat`` then checks."""
    if config[MARK] != "dspark":
        raise DraftError(f"config.json has {MARK} = {config[MARK]!r}; expected 'dspark'")
    backbone, aux = config.get("transformer_layer_config"), config.get("aux_hidden_state_layer_ids")
    if not isinstance(backbone, Mapping):
        raise DraftError("config.json in the speculators format has no transformer_layer_config")
    if not isinstance(aux, list) or not aux:
        raise DraftError("config.json in the speculators format has no aux_hidden_state_layer_ids")
    flat = {
        **backbone,
        **{k: config[k] for k in _OWN if k in config},
        "architectures": ["Qwen3DSparkModel"],
        "target_layer_ids": [i - 1 for i in aux],
        "sample_from_anchor": config.get("sample_from_anchor", False),
        "dtype": config.get("dtype"),
    }
    if flat.get("is_causal") is None and config.get(NON_CAUSAL):
        flat["is_causal"] = False
    # Not part of the format; no server needs it. The fewest layers a target with these ids can
    # have.
    flat.setdefault("num_target_layers", max(1, *aux))
    return flat
