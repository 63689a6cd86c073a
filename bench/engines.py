"""Do both engines give the same states? transformers against real vLLM, layer by layer, and each
against its own greedy tokens.

    python bench/engines.py --target DIR --data FILE.jsonl [--rows 24]

Targets: the real one in DIR over the first rows of FILE, and tiny random Qwen3 and Llama over
random ids. Writes bench/results/engines.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import write
from dspark.cache.records import KEY_BYTES, TokenSample, last_rows
from dspark.cache.target.taps import default_layers
from dspark.dump.checks.states import agreement
from dspark.dump.corpus.masks import SampleMaker
from dspark.dump.corpus.sources import open_corpus
from dspark.dump.engines.hf import TransformersEngine
from dspark.dump.engines.vllm.engine import VllmEngine
from dspark.dump.target.config import load_target


def tiny(folder: Path, kind: str) -> Path:
    """A random model of 8 layers in ``folder``; no tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config, model = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[kind]
    torch.manual_seed(0)
    made = model(
        config(
            vocab_size=1000,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=1024,
            initializer_range=0.1,
            tie_word_embeddings=kind == "llama",
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    made.save_pretrained(folder)
    return folder


def random_samples(count: int, vocab: int, longest: int) -> list[TokenSample]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, longest, count)
    return [
        TokenSample(
            i, bytes(KEY_BYTES), rng.integers(0, vocab, n, dtype=np.int32), np.arange(n) >= n // 3
        )
        for i, n in enumerate(lengths.tolist())
    ]


def corpus_samples(folder: Path, data: str, rows: int, seq_length: int) -> list[TokenSample]:
    target = load_target(str(folder))
    maker = SampleMaker(
        target.tokenizer,
        tokenised=False,
        vocab_size=target.shapes.vocab_size,
        seq_length=seq_length,
        min_supervised=2,
        eos_token_ids=target.eos_token_ids,
    )
    return [
        s for row in open_corpus(data).pick(lambda n: n < rows) for s in maker.make(row).samples
    ]


def measure(
    folder: Path, samples: list[TokenSample], seq_length: int, spool: Path
) -> dict[str, Any]:
    """Both engines over ``samples`` in fp32: differences of the states, agreement of each with its
    engine's greedy tokens.
    """
    shapes = load_target(str(folder)).shapes
    layers = default_layers(shapes.num_layers)
    engines = (
        TransformersEngine.load(
            str(folder), shapes, layers, device="cpu", dtype="float32", batch_tokens=2048
        ),
        VllmEngine.load(
            str(folder),
            shapes,
            layers,
            dtype="float32",
            seq_length=seq_length,
            spool=spool,
            batch_tokens=None,
        ),
    )
    tokens = sum(len(s.input_ids) for s in samples)
    where = [last_rows(s.loss_mask).nonzero()[0].tolist() for s in samples]
    states, predictions, own, rate = [], [], [], {}
    for engine in engines:
        began = time.monotonic()
        found = dict(engine.capture(samples))
        rate[engine.name] = round(tokens / (time.monotonic() - began), 1)
        states.append([found[i] for i in range(len(samples))])
        predictions.append(engine.predict(samples))
        own.append(
            agreement(
                [s.last for s in states[-1]], where, predictions[-1], engine.frozen(), "float32"
            )
        )
    across = agreement(
        [s.last for s in states[1]], where, predictions[0], engines[0].frozen(), "float32"
    )
    engines[1].close()
    ours, theirs = (torch.cat([s.aux for s in each]) for each in states)
    differences = {str(i): difference(ours[:, k], theirs[:, k]) for k, i in enumerate(layers)}
    differences["last"] = difference(*(torch.cat([s.last for s in each]) for each in states))
    same = sum(
        a == b for x, y in zip(*predictions, strict=True) for a, b in zip(x.ids, y.ids, strict=True)
    )
    return {
        "samples": len(samples),
        "tokens": tokens,
        "layers": list(layers),
        "target_layer_ids": [i + 1 for i in layers],
        "difference": differences,
        "top1_states_against_own_engine": {"transformers": own[0].top1, "vllm": own[1].top1},
        "top1_vllm_states_against_transformers_engine": across.top1,
        "top1_engine_against_engine": same / sum(len(p.ids) for p in predictions[0]),
        "largest_logprob_difference": {
            "transformers": own[0].worst,
            "vllm": own[1].worst,
            "vllm_states_transformers_engine": across.worst,
        },
        "checked_positions": across.positions,
        "capture_tokens_per_s": rate,
    }


def difference(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    """Largest absolute difference, the same over the largest value, and the error's share of the
    signal (root of mean squares).
    """
    gap = (a.double() - b.double()).abs()
    return {
        "max_abs": float(gap.max()), "max_rel": float(gap.max() / a.abs().max()),
        "rms_rel": float(gap.square().mean().sqrt() / a.double().square().mean().sqrt()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", type=Path, required=True, help="folder of the real target")
    parser.add_argument("--data", required=True, help="JSONL of chats")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--seq-length", type=int, default=512)
    args = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind in ("qwen3", "llama"):
            folder = tiny(Path(scratch) / kind, kind)
            results[f"tiny random {kind}"] = measure(
                folder, random_samples(24, 1000, 200), 256, Path(scratch) / "spool"
            )
            print(json.dumps(results[f"tiny random {kind}"]), file=sys.stderr)
        samples = corpus_samples(args.target, args.data, args.rows, args.seq_length)
        name = load_target(str(args.target)).config.get("model_type", "target")
        results[f"{args.target.name} ({name})"] = measure(
            args.target, samples, args.seq_length, Path(scratch) / "spool"
        )
    config = {
        "dtype": "float32",
        "rows": args.rows,
        "seq_length": args.seq_length,
        "data": Path(args.data).name,
    }
    write("engines", config, results)


if __name__ == "__main__":
    main()
