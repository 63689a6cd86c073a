"""Sizing from target configs, and both directions of config.json."""

from __future__ import annotations

import json
from typing import Any

import pytest

from core_cases import small_config
from dspark.cache.errors import DraftError, UsageError
from dspark.train.draft.config import DraftConfig

QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 36,
    "vocab_size": 151936,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
}
GLM_LIKE = {
    "hidden_size": 6144,
    "intermediate_size": 12288,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "head_dim": 64,
    "kv_lora_rank": 512,
    "num_hidden_layers": 78,
    "vocab_size": 154880,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
}


def test_sizes_follow_the_target() -> None:
    c = DraftConfig.sized_for(QWEN3_4B, target_layer_ids=(1, 9, 17, 25, 33), mask_token_id=151669)
    assert (c.num_heads, c.num_kv_heads, c.head_dim, c.intermediate_size) == (32, 8, 128, 9728)
    assert (c.draft_vocab_size, c.num_target_layers, c.rope_theta) == (151936, 36, 1e6)
    nested = DraftConfig.sized_for(
        {"text_config": QWEN3_4B}, target_layer_ids=(1, 9, 17, 25, 33), mask_token_id=151669
    )
    assert nested == c


def test_latent_attention_gives_the_published_draft_shape() -> None:
    """GLM-5.2's published draft: 64 heads of 128, 64 key heads, intermediate 12,288."""
    c = DraftConfig.sized_for(
        GLM_LIKE, target_layer_ids=(7, 22, 38, 54, 69), mask_token_id=0, block_size=8
    )
    assert (c.num_heads, c.num_kv_heads, c.head_dim, c.intermediate_size) == (64, 64, 128, 12288)


def test_dflash_has_neither_head() -> None:
    c = DraftConfig.sized_for(
        QWEN3_4B, target_layer_ids=(1,), mask_token_id=3, speculator_type="dflash"
    )
    assert c.markov_rank == 0
    assert not c.enable_confidence_head


def test_a_target_without_sizes_is_named() -> None:
    with pytest.raises(UsageError, match="vocab_size"):
        DraftConfig.sized_for(
            {**QWEN3_4B, "vocab_size": None}, target_layer_ids=(1,), mask_token_id=3
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_kv_heads": 3},
        {"head_dim": 15},
        {"mask_token_id": 50},
        {"mask_token_id": -1},
        {"draft_vocab_size": 51},
        {"target_layer_ids": ()},
        {"target_layer_ids": (2, 0)},
        {"target_layer_ids": (0, 4)},
        {"block_size": 0},
        {"markov_rank": 0},
        {"markov_head_type": "lstm"},
        {"speculator_type": "eagle3"},
        {"speculator_type": "dflash"},
    ],
)
def test_validation(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        small_config(**wrong)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"markov_head_type": "gated", "draft_vocab_size": 20},
        {"confidence_head_with_markov": False},
        {"speculator_type": "dflash", "markov_rank": 0, "enable_confidence_head": False},
        {"target_layer_ids": (-1, 3)},
    ],
)
def test_round_trip_through_json(changes: dict[str, Any]) -> None:
    c = small_config(**changes)
    flat = json.loads(json.dumps(c.to_flat()))
    assert DraftConfig.from_flat(flat) == c
    assert flat["sample_from_anchor"] is True
    assert flat["architectures"] == ["Qwen3DSparkModel"]
    assert flat["layer_types"] == ["full_attention"] * c.num_layers
    assert flat["markov_rank"] > 0  # vLLM builds a Markov head whatever the draft is


def test_transformers_reads_it() -> None:
    from transformers import Qwen3Config

    c = small_config()
    hf = Qwen3Config.from_dict(c.to_flat())
    assert (hf.head_dim, hf.num_key_value_heads, hf.num_hidden_layers) == (16, 2, 2)
    assert hf.rope_parameters["rope_theta"] == c.rope_theta
    assert hf.target_layer_ids == [0, 2]


@pytest.mark.parametrize(
    "foreign",
    [
        {"sample_from_anchor": False, "block_size": 1},
        {"attention_bias": True},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"architectures": ["Gemma4DSparkModel"]},
        {"target_hidden_size": 64},
        {"block_size": "seven"},
        {"markov_rank": None},
        {"markov_rank": "x"},
        {"markov_rank": []},
        {"layer_types": -1},
        {"rope_parameters": "plain"},
        {"rope_theta": 0, "rope_parameters": {"rope_theta": 0}},
        {"rms_norm_eps": float("nan")},
        {"initializer_range": -1},
        {"head_dim": 15},
    ],
)
def test_what_would_be_computed_wrongly_is_refused(foreign: dict[str, Any]) -> None:
    with pytest.raises(DraftError):
        DraftConfig.from_flat(small_config().to_flat() | foreign)


def test_missing_key_is_named() -> None:
    flat = small_config().to_flat()
    del flat["target_layer_ids"]
    with pytest.raises(DraftError, match="target_layer_ids"):
        DraftConfig.from_flat(flat)


# hidden size, what the config has, and the draft's heads, key-value heads, head size, MLP
SHAPES = {
    "qwen3_5_moe": (
        2048,
        {
            "model_type": "qwen3_5_moe_text",
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "num_experts": 256,
            "moe_intermediate_size": 512,
        },
        (32, 4, 128, 6144),
    ),
    "qwen3_5_dense": (
        2560,
        {
            "model_type": "qwen3_5_text",
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "intermediate_size": 9216,
        },
        (32, 8, 128, 9216),
    ),
    "minimax_m2": (
        3072,
        {
            "num_attention_heads": 48,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "num_local_experts": 256,
            "intermediate_size": 1536,
        },
        (48, 8, 128, 9216),
    ),
    "gemma4_moe": (
        2816,
        {
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "num_experts": 128,
            "moe_intermediate_size": 704,
            "intermediate_size": 2112,
        },
        (16, 8, 256, 8448),
    ),
    "gpt_oss": (
        2880,
        {
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 128,
            "intermediate_size": 2880,
        },
        (64, 8, 64, 8640),
    ),
    "mixtral": (
        4096,
        {
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "intermediate_size": 14336,
        },
        (32, 8, 128, 14336),
    ),
    "wide_heads": (
        4096,
        {
            "num_attention_heads": 64,
            "num_key_value_heads": 1,
            "head_dim": 512,
            "moe_intermediate_size": 2048,
            "n_routed_experts": 256,
        },
        (256, 4, 128, 12288),
    ),
    "by_layer": (
        4096,
        {
            "num_attention_heads": [32, 16],
            "num_key_value_heads": [8, 4],
            "intermediate_size": [8192, 4096],
        },
        (32, 8, 128, 8192),
    ),
    "nothing": (1024, {}, (8, 8, 128, 3072)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_draft_is_sized_where_the_target_has_no_fitting_sizes(name: str) -> None:
    hidden, more, expected = SHAPES[name]
    target = {"hidden_size": hidden, "vocab_size": 1000, "num_hidden_layers": 8, **more}
    c = DraftConfig.sized_for({"text_config": target}, target_layer_ids=(1,), mask_token_id=3)
    assert (c.num_heads, c.num_kv_heads, c.head_dim, c.intermediate_size) == expected
    assert c.intermediate_size >= hidden


def test_sizes_that_are_asked_for_win() -> None:
    def sized(**asked: int) -> tuple[int, int, int, int]:
        c = DraftConfig.sized_for(QWEN3_4B, target_layer_ids=(1,), mask_token_id=3, **asked)
        return c.num_heads, c.num_kv_heads, c.head_dim, c.intermediate_size

    assert sized() == (32, 8, 128, 9728)
    # narrower than the hidden size: asked for
    assert sized(intermediate_size=512) == (32, 8, 128, 512)
    assert sized(head_dim=64) == (64, 16, 64, 9728)
    assert sized(num_heads=12) == (12, 6, 128, 9728)
    assert sized(num_heads=12, num_kv_heads=4, head_dim=64) == (12, 4, 64, 9728)
    with pytest.raises(UsageError, match="--num-heads and --num-kv-heads"):
        sized(num_heads=12, num_kv_heads=5)
