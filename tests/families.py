"""Tiny random checkpoints of the families people serve, made on the spot: same code paths as the
real ones, a few thousand weights.

Weights are large and norms random, so that a wrong layer, norm, factor or cap shows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCAB = 256
LAYERS = 6
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MOE: dict[str, Any] = {
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
}
MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    # Published configs of these families say so; vLLM looks for the gate's bias only then.
    "topk_method": "noaux_tc",
}


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**BASE, tie_word_embeddings=True))


def _qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**BASE, tie_word_embeddings=False))


def _qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    more = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    }
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
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
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
        "sliding_window": 16,
        "final_logit_softcapping": 8.0,
        "hidden_size_per_layer_input": 0,
        "global_head_dim": 32,
        "vocab_size_per_layer_input": VOCAB,
        "tie_word_embeddings": True,
        "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2,
    }
    return Gemma4ForCausalLM(Gemma4TextConfig(**BASE, **more))


def _glm4_moe() -> Any:
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    return Glm4MoeForCausalLM(
        Glm4MoeConfig(**BASE, **MOE, use_qk_norm=True, tie_word_embeddings=False)
    )


def _glm4_moe_lite() -> Any:
    from transformers import Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM

    sizes = {k: v for k, v in (BASE | MOE | MLA).items() if k != "head_dim"}
    return Glm4MoeLiteForCausalLM(Glm4MoeLiteConfig(**sizes, tie_word_embeddings=False))


def _glm_moe_dsa() -> Any:
    """Sixteen index heads: with two, a quarter of all scores are exactly 0 behind their ReLU, and
    which of equals the top-k takes depends on padding.
    """
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


def _llama4() -> Any:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    more = {
        "intermediate_size_mlp": 96,
        "num_local_experts": 4,
        "attention_chunk_size": 128,
        "tie_word_embeddings": False,
    }
    return Llama4ForCausalLM(Llama4TextConfig(**(BASE | {"intermediate_size": 32}), **more))


LINEAR: dict[str, Any] = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": (["linear_attention"] * 2 + ["full_attention"]) * 2,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}


def _qwen3_next() -> Any:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    return Qwen3NextForCausalLM(
        Qwen3NextConfig(**BASE, **LINEAR, **EXPERTS, tie_word_embeddings=False)
    )


def _qwen3_5() -> Any:
    """As published: a wrapper with a vision tower, whose text model is dumped."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    text = BASE | LINEAR | {"tie_word_embeddings": True}
    vision = {k: v for k, v in QWEN_VISION.items() if k != "deepstack_visual_indexes"}
    return Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True)
    )


def _qwen3_5_moe() -> Any:
    """As published: no ``intermediate_size`` in its config."""
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

    text = {k: v for k, v in (BASE | LINEAR | EXPERTS).items() if k != "intermediate_size"}
    vision = {k: v for k, v in QWEN_VISION.items() if k != "deepstack_visual_indexes"}
    return Qwen3_5MoeForConditionalGeneration(
        Qwen3_5MoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    )


def _gpt_oss() -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    more = {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "tie_word_embeddings": False,
    }
    return GptOssForCausalLM(GptOssConfig(**BASE, **more))


def _deepseek_v3() -> Any:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = {k: v for k, v in (BASE | MOE | MLA).items() if k != "head_dim"}
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **sizes,
            n_group=1,
            topk_group=1,
            num_nextn_predict_layers=1,
            tie_word_embeddings=False,
        )
    )


def _deepseek_v32() -> Any:
    from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

    more = {
        "index_topk": 16,
        "index_head_dim": 32,
        "index_n_heads": 16,
        "head_dim": 16,
        "n_group": 1,
        "topk_group": 1,
    }
    return DeepseekV32ForCausalLM(
        DeepseekV32Config(**(BASE | MOE | MLA | more), tie_word_embeddings=False)
    )


def _minimax_m2() -> Any:
    from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

    sizes = BASE | {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
    # As published configs have them; vLLM reads them.
    sizes |= {"rotary_dim": BASE["head_dim"], "scoring_func": "sigmoid"}
    return MiniMaxM2ForCausalLM(MiniMaxM2Config(**sizes, tie_word_embeddings=False))


def _mistral3() -> Any:
    """A wrapper that is no causal LM to transformers."""
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        MistralConfig,
        PixtralVisionConfig,
    )

    vision = PixtralVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    return Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config=MistralConfig(**BASE).to_dict(),
            vision_config=vision.to_dict(),
            tie_word_embeddings=False,
        )
    )


def _kimi_k25() -> Any:
    from transformers import DeepseekV3Config, Kimi_K25Config, Kimi_K25ForConditionalGeneration

    sizes = {k: v for k, v in (BASE | MOE | MLA).items() if k != "head_dim"}
    text = DeepseekV3Config(**sizes, n_group=1, topk_group=1)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_heads": 2,
        "depth": 2,
    }
    return Kimi_K25ForConditionalGeneration(
        Kimi_K25Config(
            text_config=text.to_dict(),
            vision_config=vision,
            projection_hidden_size=32,
            tie_word_embeddings=False,
        )
    )


def _qwen3_vl() -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text = BASE | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 4, 4]}
    }
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=text, vision_config=QWEN_VISION, tie_word_embeddings=False)
    )


def _nemotron_h() -> Any:
    """Its number of layers is a property, and the kind of each is listed."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    sizes = {k: v for k, v in BASE.items() if k != "num_hidden_layers"}
    more = {
        "layers_block_type": ["mamba", "mlp", "attention"] * 2,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 16,
        "use_mamba_kernels": False,
        "tie_word_embeddings": False,
    }
    return NemotronHForCausalLM(NemotronHConfig(**sizes, **more))


def _longcat_flash() -> Any:
    """Counts two cache layers per decoder layer as its hidden layers."""
    from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

    drop = ("head_dim", "num_hidden_layers", "intermediate_size")
    sizes = {k: v for k, v in (BASE | MLA).items() if k not in drop}
    more = {
        "num_layers": LAYERS,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "moe_topk": 2,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "head_dim": 16,
        "tie_word_embeddings": False,
    }
    return LongcatFlashForCausalLM(LongcatFlashConfig(**sizes, **more))


def _deepseek_v4() -> Any:
    """Refused: what its layers hand on are several streams."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    sizes = {k: v for k, v in BASE.items() if k not in ("intermediate_size", "num_key_value_heads")}
    more = {
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "q_lora_rank": 32,
        "o_lora_rank": 16,
        "o_groups": 2,
        "hc_mult": 2,
        "index_n_heads": 4,
        "index_head_dim": 32,
        "index_topk": 16,
        "num_key_value_heads": 1,
    }
    return DeepseekV4ForCausalLM(DeepseekV4Config(**sizes, **more))


MAKERS: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "llama4": _llama4,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "qwen3_next": _qwen3_next,
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": _qwen3_5_moe,
    "qwen3_vl": _qwen3_vl,
    "gemma3": _gemma3,
    "gemma3_wrapped": _gemma3_wrapped,
    "gemma4": _gemma4,
    "gpt_oss": _gpt_oss,
    "deepseek_v3": _deepseek_v3,
    "deepseek_v32": _deepseek_v32,
    "kimi_k25": _kimi_k25,
    "glm4_moe": _glm4_moe,
    "glm4_moe_lite": _glm4_moe_lite,
    "glm_moe_dsa": _glm_moe_dsa,
    "minimax_m2": _minimax_m2,
    "mistral3": _mistral3,
    "nemotron_h": _nemotron_h,
    "longcat_flash": _longcat_flash,
}
REFUSED: dict[str, Callable[[], Any]] = {"deepseek_v4": _deepseek_v4}
# Published checkpoints of these carry a predictor of their own, with an embedding's and norm's
# names.
MTP = {
    "mtp.norm.weight": (64,),
    "mtp.embed_tokens.weight": (VOCAB, 64),
    "mtp.fc.weight": (64, 128),
}
NEXT = f"model.layers.{LAYERS}"  # DeepSeek's: a layer behind the last
WITH_MTP: dict[str, dict[str, tuple[int, ...]]] = {
    "qwen3_5": MTP,
    "qwen3_5_moe": MTP,
    "deepseek_v3": {
        f"{NEXT}.enorm.weight": (64,),
        f"{NEXT}.embed_tokens.weight": (VOCAB, 64),
        f"{NEXT}.eh_proj.weight": (64, 128),
        f"{NEXT}.shared_head.norm.weight": (64,),
        f"{NEXT}.shared_head.head.weight": (VOCAB, 64),
    },
}


def build(kind: str) -> Any:
    """A random model of family ``kind`` in float32."""
    import torch

    torch.manual_seed(0)
    out = (MAKERS | REFUSED)[kind]().float().eval()
    with torch.no_grad():
        for name, parameter in out.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return out


def save(folder: Path, kind: str) -> Path:
    """A checkpoint without tokenizer."""
    build(kind).save_pretrained(folder)
    if kind in WITH_MTP:
        add_tensors(folder, WITH_MTP[kind])
    return folder


def add_tensors(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Put more tensors, all zero, into a checkpoint of one file."""
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    save_file(
        load_file(path) | {n: torch.zeros(s) for n, s in shapes.items()},
        path,
        metadata={"format": "pt"},
    )
