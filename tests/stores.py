"""Small stores with random states, for tests of everything that reads one. Shapes are those of a
model nobody has.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dspark.cache.codec import registry
from dspark.cache.codec.base import Codec, to_numpy
from dspark.cache.files.calibration import codec_info
from dspark.cache.manifest import DumpInfo, Manifest, SourceInfo, TargetInfo, TokenizerInfo
from dspark.cache.records import CodedSample, TokenSample, last_rows
from dspark.cache.target.frozen import FrozenTarget
from dspark.cache.writer import StoreWriter

VOCAB, HIDDEN, LAYERS = 97, 64, (1, 2, 4)


def manifest(**changes: object) -> Manifest:
    config = {
        "model_type": "qwen3",
        "hidden_size": HIDDEN,
        "vocab_size": VOCAB,
        "num_hidden_layers": 6,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    base = {
        "target": TargetInfo(
            id="random/tiny",
            revision=None,
            config=config,
            hidden_size=HIDDEN,
            vocab_size=VOCAB,
            num_layers=6,
            mask_token_id=VOCAB - 1,
            eos_token_ids=[2],
            weights_sha256="",
        ),
        "layers": list(LAYERS),
        "codec": codec_info(registry.make("lossless")),
        "tokenizer": TokenizerInfo(sha256=None, chat_template_sha256=None),
        "sources": [SourceInfo(id="rows", sha256="0", limit=None)],
        "dump": DumpInfo(
            engine="test",
            engine_version="0",
            dtype="float32",
            seq_length=256,
            min_supervised=2,
            assistant_pattern=None,
            mask_rule="given",
            block_rows=3,
        ),
    }
    return Manifest(**{**base, **changes})  # type: ignore[arg-type]


def frozen(seed: int = 0) -> FrozenTarget:
    g = torch.Generator().manual_seed(seed)
    embed = torch.randn(VOCAB, HIDDEN, generator=g)
    return FrozenTarget(embed, torch.ones(HIDDEN), embed, True)


def token_samples(lengths: Sequence[int], seed: int = 0) -> list[TokenSample]:
    """Samples of given lengths: random ids, a supervised run in the second half."""
    rng = np.random.default_rng(seed)
    out = []
    for row, n in enumerate(lengths):
        mask = np.zeros(n, np.bool_)
        mask[n // 2 :] = True
        key = hashlib.sha256(f"{seed} {row}".encode()).digest()[:16]
        out.append(TokenSample(row, key, rng.integers(3, VOCAB - 1, n).astype(np.int32), mask))
    return out


def states(sample: TokenSample, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ``aux`` [S, L, H] and ``last`` [M, H] of a sample, bfloat16-exact float32, a function
    of row and seed only.
    """
    g = torch.Generator().manual_seed(seed * 100003 + sample.row)
    s = sample.input_ids.shape[0]
    aux = torch.randn(s, len(LAYERS), HIDDEN, generator=g)
    aux[0] *= 300.0  # first tokens carry massive activations in real models
    last = torch.randn(int(last_rows(sample.loss_mask).sum()), HIDDEN, generator=g)
    return aux.bfloat16().float(), last.bfloat16().float()


def codec_of(m: Manifest) -> Codec:
    return registry.load(m.codec.name, m.codec.params, m.codec.pack, {}, "test")


def coded(
    sample: TokenSample, m: Manifest, seed: int = 0, codec: Codec | None = None
) -> CodedSample:
    aux, last = states(sample, seed)
    return CodedSample(sample, to_numpy((codec or codec_of(m)).encode(aux, last)))


def blocks_of(samples: Sequence[TokenSample], rows: int) -> list[list[TokenSample]]:
    """Samples by blocks of ``rows`` source rows, up to the last one that has any."""
    out: list[list[TokenSample]] = [[] for _ in range(samples[-1].row // rows + 1)]
    for sample in samples:
        out[sample.row // rows].append(sample)
    return out


def write_store(
    path: Path | str,
    lengths: Sequence[int],
    *,
    m: Manifest | None = None,
    codec: Codec | None = None,
    finish: bool = True,
    overwrite: bool = False,
    seed: int = 0,
    states_seed: int | None = None,
    tokens_seed: int | None = None,
) -> list[TokenSample]:
    """A whole store of random samples at ``path``; returns the samples. ``codec``: a calibrated
    one. ``states_seed``: other states for the same samples;
    ``tokens_seed``: other samples of the same target.
    """
    m = m or manifest()
    if codec is not None:
        m = dataclasses.replace(m, codec=codec_info(codec))
    samples = token_samples(lengths, seed if tokens_seed is None else tokens_seed)
    with StoreWriter.create(
        path, m, frozen(seed), {"config_note.txt": b"x"}, codec=codec, overwrite=overwrite
    ) as writer:
        for i in range(len(blocks_of(samples, m.dump.block_rows))):
            commit(writer, i, samples, seed if states_seed is None else states_seed)
        if finish:
            writer.finish()
    return samples


def commit(writer: StoreWriter, block: int, samples: Sequence[TokenSample], seed: int = 0) -> None:
    """Write part ``block`` of the store of ``samples``."""
    m = writer.manifest
    rows = m.dump.block_rows
    own = blocks_of(samples, rows)[block]
    stop = min((block + 1) * rows, samples[-1].row + 1)
    about = writer.block(block, block * rows, stop, dropped={}, truncated=0)
    writer.commit(block, [coded(s, m, seed, writer.codec) for s in own], about)
