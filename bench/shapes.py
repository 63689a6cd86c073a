"""A target of a known model's shapes with random weights: what speed depends on, without a
download.

    python bench/shapes.py --kind qwen3-4b --tokenizer DIR --out DIR [--device cuda]

``glm-dsa``: GLM-5.2's attention and experts at their real head sizes, which its kernels need, in
four narrow layers.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch

KINDS = ("smollm2", "qwen3-4b", "glm-dsa")


def config_of(kind: str) -> Any:
    from transformers import GlmMoeDsaConfig, LlamaConfig, Qwen3Config

    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if kind == "smollm2":
        return LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            initializer_range=0.04,
            **ends,
        )
    if kind == "qwen3-4b":
        return Qwen3Config(
            vocab_size=151936,
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40960,
            tie_word_embeddings=True,
            **ends,
        )
    return GlmMoeDsaConfig(
        vocab_size=49152,
        hidden_size=1024,
        intermediate_size=2048,
        moe_intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=64,
        num_key_value_heads=64,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        kv_lora_rank=512,
        q_lora_rank=512,
        qk_nope_head_dim=192,
        qk_rope_head_dim=64,
        v_head_dim=256,
        index_topk=2048,
        index_n_heads=32,
        index_head_dim=128,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        **ends,
    )


def make(kind: str, tokenizer: Path, out: Path, device: str = "cpu") -> Path:
    """A bfloat16 checkpoint with the tokenizer's files beside it; one that is there already
    stays.
    """
    from transformers import AutoModelForCausalLM

    if (out / "config.json").is_file():
        return out
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config_of(kind), dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(out)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / file, out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    make(args.kind, args.tokenizer, args.out, args.device)


if __name__ == "__main__":
    main()
