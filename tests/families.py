"""Tiny random checkpoints of the families people serve, made on the spot: same code paths as the real ones, a few thousand weights.

Weights are large and norms random, so that a wrong layer, norm, factor or cap shows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCAB = 256
LAYERS = 6
BASE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "initializer_range": 0.2,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
MOE: dict[str, Any] = {
    "moe_intermediate_size": 32, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 1,
}  # fmt: skip
MLA: dict[str, Any] = {
    "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 48, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32,
}  # fmt: skip


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**BASE, tie_word_embeddings=True))


def _qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**BASE, tie_word_embeddings=False))


def _qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**BASE, **more, tie_word_embeddings=False))


def _gemma3() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    more = {"sliding_window": 16, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}
    return Gemma3ForCausalLM(Gemma3TextConfig(**BASE, **more))


def _gemma3_wrapped() -> Any:
    """Text model inside a multimodal wrapper, with a vision tower of as many layers."""
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )

    text = Gemma3TextConfig(**BASE, sliding_window=16, query_pre_attn_scalar=32)
    vision = SiglipVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=2, image_size=28, patch_size=14
    )  # fmt: skip
    more = {
        "mm_tokens_per_image": 1,
        "boi_token_index": 250,
        "eoi_token_index": 251,
        "image_token_index": 252,
    }
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text.to_dict(), vision_config=vision.to_dict(), **more)
    )


def _gemma4() -> Any:
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    more = {
        "sliding_window": 16, "final_logit_softcapping": 8.0, "hidden_size_per_layer_input": 0, "global_head_dim": 32,
        "vocab_size_per_layer_input": VOCAB, "tie_word_embeddings": True, "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2,
    }  # fmt: skip
    return Gemma4ForCausalLM(Gemma4TextConfig(**BASE, **more))


def _glm4_moe() -> Any:
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    return Glm4MoeForCausalLM(Glm4MoeConfig(**BASE, **MOE, use_qk_norm=True, tie_word_embeddings=False))


def _glm4_moe_lite() -> Any:
    from transformers import Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM

    sizes = {k: v for k, v in (BASE | MOE | MLA).items() if k != "head_dim"}
    return Glm4MoeLiteForCausalLM(Glm4MoeLiteConfig(**sizes, tie_word_embeddings=False))


def _glm_moe_dsa() -> Any:
    """Sixteen index heads: with two, a quarter of all scores are exactly 0 behind their ReLU, and which of equals the top-k takes depends on padding."""
    from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM

    sizes = {k: v for k, v in (BASE | MOE | MLA).items() if k != "head_dim"}
    more = {
        "index_topk": 16,
        "index_head_dim": 32,
        "index_n_heads": 16,
        "head_dim": 16,
        "tie_word_embeddings": False,
    }
    return GlmMoeDsaForCausalLM(GlmMoeDsaConfig(**sizes, **more))


MAKERS: dict[str, Callable[[], Any]] = {
    "llama": _llama, "qwen3": _qwen3, "qwen3_moe": _qwen3_moe, "gemma3": _gemma3, "gemma3_wrapped": _gemma3_wrapped,
    "gemma4": _gemma4, "glm4_moe": _glm4_moe, "glm4_moe_lite": _glm4_moe_lite, "glm_moe_dsa": _glm_moe_dsa,
}  # fmt: skip


def build(kind: str) -> Any:
    """A random model of family ``kind`` in float32."""
    import torch

    torch.manual_seed(0)
    out = MAKERS[kind]().float().eval()
    with torch.no_grad():
        for name, parameter in out.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return out


def save(folder: Path, kind: str) -> Path:
    """A checkpoint without tokenizer."""
    build(kind).save_pretrained(folder)
    return folder
