"""Tiny targets made on the spot: a byte-level BPE tokenizer with a ChatML template, random Qwen3
and Llama. No hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dspark.cache.records import KEY_BYTES, TokenSample
from dspark.dump.engines.hf import TransformersEngine
from dspark.dump.target.layers import Shapes

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# 5 is the last layer: its output is before the final norm, unlike the last state
ENGINE_LAYERS = (0, 2, 5)
ENGINE_VOCAB = 120
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|spare|>"]
WORDS = [
    "the cat sat on the mat",
    "say hello to the user and the assistant",
    "be brief system",
    "Yes, it is. No!\n",
    "one two three",
]


def build_tokenizer(template: str | None = CHATML) -> Any:
    """Ids: the four special tokens, then 256 bytes and a few merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        WORDS * 4,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    out = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|pad|>")
    out.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|spare|>"]})
    out.chat_template = template
    return out


def build_model(
    kind: str, vocab: int, layers: int = 6, tied: bool | None = None, **changes: Any
) -> Any:
    """A random causal LM in fp32 whose norms have random weights, so that a forgotten norm
    shows.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config, model = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[kind]
    sizes: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": kind == "llama" if tied is None else tied,
    }
    torch.manual_seed(0)
    out = model(config(**(sizes | changes))).float().eval()
    with torch.no_grad():
        for name, parameter in out.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return out


def save_target(
    folder: Path, kind: str = "qwen3", template: str | None = CHATML, **changes: Any
) -> Path:
    tokenizer = build_tokenizer(template)
    model = build_model(kind, changes.pop("vocab", len(tokenizer) + 4), **changes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chat(*turns: str, **more: Any) -> dict[str, Any]:
    """``chat("u: hi", "a: yes")`` -> a row."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return {"messages": [{"role": roles[t[0]], "content": t[3:]} for t in turns], **more}


def shapes(model: Any) -> Shapes:
    c = model.config.get_text_config()
    return Shapes(
        hidden_size=c.hidden_size,
        vocab_size=c.vocab_size,
        num_layers=c.num_hidden_layers,
        max_positions=512,
    )


def engine(kind: str, batch_tokens: int = 64, **changes: Any) -> TransformersEngine:
    model = build_model(kind, ENGINE_VOCAB, **changes)
    return TransformersEngine(
        model, shapes(model), ENGINE_LAYERS, device="cpu", batch_tokens=batch_tokens
    )


def samples(lengths: list[int], seed: int = 0) -> list[TokenSample]:
    rng = np.random.default_rng(seed)
    return [
        TokenSample(
            i,
            bytes(KEY_BYTES),
            rng.integers(0, ENGINE_VOCAB, n, dtype=np.int32),
            np.arange(n) >= n // 3,
        )
        for i, n in enumerate(lengths)
    ]
