"""Drafts as other projects publish them: config.json in the form each documents, around a draft of
any size with random weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dspark.train.draft.model import DraftModel
from dspark.train.draft.saved.folder import save_draft

FULL, SLIDING = "full_attention", "sliding_attention"
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
# Form -> fields of the DraftConfig that it must be read as, beside what all have.
SHAPES: dict[str, dict[str, Any]] = {
    "deepspec": {},
    "specforge": {},
    "speculators": {"bonus_anchor": True},
    "glm": {
        "bonus_anchor": True,
        "num_layers": 3,
        "layer_types": (SLIDING,) * 3,
        "sliding_window": 6,
    },
    "both-ways": {
        "bonus_anchor": True,
        "layer_types": (SLIDING, FULL),
        "sliding_window": 3,
        "is_causal": False,
    },
    "z-lab": {"bonus_anchor": True},
    "swa": {
        "bonus_anchor": True,
        "layer_types": (SLIDING,) * 2,
        "sliding_window": 5,
        "is_causal": False,
        "rope_scaling": YARN,
    },
}
FORMS = tuple(SHAPES)
# Of these the Markov and confidence heads are missing; vLLM serves them by its method dflash, and
# ours repacked by dspark.
PLAIN = ("z-lab", "swa")
ANCHOR_FIRST = ("deepspec", "specforge")


def shape(form: str) -> dict[str, Any]:
    """The fields of the DraftConfig of such a draft, beside sizes."""
    bare = {"speculator_type": "dflash", "markov_rank": 0, "enable_confidence_head": False}
    return SHAPES[form] | (bare if form in PLAIN else {})


def config(form: str, draft: DraftModel, verifier: str = "random/tiny") -> dict[str, Any]:
    """config.json of ``draft``, which is of ``shape(form)``, in that form."""
    c = draft.config
    backbone: dict[str, Any] = {
        "model_type": "qwen3",
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": c.max_position_embeddings,
        "vocab_size": c.vocab_size,
        "sliding_window": None,
        "use_sliding_window": False,
        "max_window_layers": c.num_layers,
        "use_cache": True,
        "tie_word_embeddings": False,
        "layer_types": [FULL] * c.num_layers,
    }
    heads = {
        "markov_rank": c.markov_rank,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    }
    ids, slots = list(c.target_layer_ids), c.slots
    if form == "deepspec":
        return (
            backbone
            | heads
            | {
                "architectures": ["Qwen3DSparkModel"],
                "block_size": slots,
                "mask_token_id": c.mask_token_id,
                "target_layer_ids": ids,
                "num_target_layers": c.num_target_layers,
                "target_hidden_size": c.hidden_size,
                "draft_vocab_size": c.vocab_size,
                "sample_from_anchor": True,
                "num_anchors": 512,
            }
        )
    if form == "specforge":
        nested = {
            "mask_token_id": c.mask_token_id,
            "target_layer_ids": ids,
            "markov_rank": c.markov_rank,
            "attention_mode": "gqa",
        }
        return (
            backbone
            | heads
            | {
                "architectures": ["DSparkDraftModel"],
                "block_size": slots,
                "projector_type": "dspark",
                "attention_mode": "gqa",
                "dflash_config": nested,
            }
        )
    if form in PLAIN:
        out = backbone | {
            "architectures": ["DFlashDraftModel"],
            "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
            "block_size": slots,
            "num_target_layers": c.num_target_layers,
            "dflash_config": {"mask_token_id": c.mask_token_id, "target_layer_ids": ids},
        }
        if form == "swa":
            out["dflash_config"] |= {
                "use_swa": True,
                "swa_window_size": c.sliding_window,
                "causal": None,
            }
            out |= {"rope_scaling": YARN, "rope_parameters": YARN | {"rope_theta": c.rope_theta}}
        return out
    own: dict[str, Any] = {"layer_types": list(c.layer_types) or [FULL] * c.num_layers}
    if c.sliding_window:
        own |= {
            "sliding_window": c.sliding_window,
            "use_sliding_window": True,
            "max_window_layers": 0,
        }
        own |= {"rope_parameters": {"rope_theta": c.rope_theta, "rope_type": "default"}}
    return heads | {
        "architectures": ["DSparkDraftModel"],
        "speculators_model_type": "dspark",
        "block_size": slots,
        "mask_token_id": c.mask_token_id,
        "aux_hidden_state_layer_ids": [i + 1 for i in ids],
        "draft_vocab_size": c.vocab_size,
        "transformer_layer_config": backbone | own,
        "sliding_window_non_causal": form == "both-ways",
        "max_anchors": 1024,
        "target_hidden_size": None,
        "speculators_config": {
            "algorithm": "dspark",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": c.block_size}],
            "verifier": {"name_or_path": verifier, "architectures": ["Qwen3ForCausalLM"]},
        },
    }


def write(
    folder: Path, form: str, draft: DraftModel, verifier: str = "random/tiny", **changes: Any
) -> Path:
    """A folder as that program leaves it: its config, the tensors without our record."""
    save_draft(folder, draft, dtype=torch.float32)
    (folder / "config.json").write_text(json.dumps(config(form, draft, verifier) | changes))
    tensors = load_file(folder / "model.safetensors")
    if form in PLAIN:
        tensors = {n: t for n, t in tensors.items() if not n.startswith("markov")}
    save_file(tensors, folder / "model.safetensors")
    return folder
