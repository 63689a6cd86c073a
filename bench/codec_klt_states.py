"""Samples and states of a corpus in memory, for ``codec_klt.py``: the product's tokenizer, masks
and transformers engine, no store.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dspark.cache.records import TokenSample, last_rows
from dspark.cache.target.frozen import FrozenTarget
from dspark.cache.target.taps import default_layers
from dspark.dump.corpus.masks import SampleMaker
from dspark.dump.corpus.rows import ChatRow, Row
from dspark.dump.engines.engine import States as Captured
from dspark.dump.engines.hf import TransformersEngine
from dspark.dump.target.config import choose_mask_token, load_target
from dspark.dump.target.weights import compact

_maker: SampleMaker | None = None


@dataclass
class Corpus:
    """``start`` int64 [N + 1], ``last_start`` int64 [N + 1], ``last_at``: tokens of a sample whose
    last state is stored; ``keys`` uint8 [N, 16].

    ``main``: how many samples, the first, are the corpus; the others only serve to calibrate on.
    ``train``, ``held_out``: samples.
    """

    samples: list[TokenSample]
    main: int
    config: Any
    layers: tuple[int, ...]
    mask_token_id: int
    train: Any = field(default_factory=list)
    held_out: Any = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lengths = np.array([len(s.input_ids) for s in self.samples])
        self.last_at = [np.flatnonzero(last_rows(s.loss_mask)) for s in self.samples]
        self.start = np.concatenate([[0], np.cumsum(self.lengths)])
        self.last_start = np.concatenate([[0], np.cumsum([len(a) for a in self.last_at])])
        self.tokens = int(self.start[self.main])
        self.keys = np.stack([np.frombuffer(s.key, np.uint8) for s in self.samples])


def _make(at: tuple[int, str]) -> list[TokenSample]:
    number, line = at
    value = json.loads(line)
    row = Row(
        number,
        f"line {number}",
        ChatRow(value["messages"], value.get("tools"), bool(value.get("finished", True))),
    )
    assert _maker is not None
    return list(_maker.make(row).samples)


def read_corpus(args: argparse.Namespace) -> Corpus:
    """The samples of ``args.rows`` lines of ``args.data``, drawn at random but always the same
    ones.
    """
    global _maker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    target = load_target(args.model)
    _maker = SampleMaker(
        target.tokenizer,
        tokenised=False,
        vocab_size=target.shapes.vocab_size,
        seq_length=args.max_len,
        min_supervised=2,
        eos_token_ids=target.eos_token_ids,
    )
    with (gzip.open if args.data.suffix == ".gz" else open)(args.data, "rt") as file:
        every = list(enumerate(file))
    main = _drawn([x for x in every if args.only is None or args.only.search(x[1])], args.rows)
    other = [] if args.other is None else [x for x in every if args.other.search(x[1])]
    seen = {number for number, _ in main}
    lines = main + _drawn([x for x in other if x[0] not in seen], args.other_rows)
    if args.tiny:
        made = [_make(x) for x in lines]
    else:
        import multiprocessing

        with multiprocessing.get_context("fork").Pool(min(16, os.cpu_count() or 1)) as pool:
            made = pool.map(_make, lines, chunksize=64)
    samples = [s for some in made for s in some]
    count = sum(len(some) for some in made[: len(main)])
    layers = (
        tuple(int(x) for x in args.layers.split(","))
        if args.layers
        else default_layers(target.shapes.num_layers)
    )
    return Corpus(samples, count, target.config, layers, choose_mask_token(target, None, None))


def _drawn(lines: list[tuple[int, str]], count: int) -> list[tuple[int, str]]:
    """``count`` of ``lines`` at random, the same ones every time, in their order."""
    return [lines[i] for i in sorted(np.random.default_rng(7).permutation(len(lines))[:count])]


def capture(args: argparse.Namespace, corpus: Corpus) -> tuple[Tensor, Tensor, FrozenTarget]:
    """``aux`` [T + 1, L, H] (a row of padding at the end) and ``last`` [M, H], bfloat16, and the
    target's frozen weights, all on the device.
    """
    target = load_target(args.model)
    engine = TransformersEngine.load(
        args.model,
        target.shapes,
        corpus.layers,
        device=args.device,
        dtype="bfloat16" if args.device == "cuda" else "float32",
        batch_tokens=65536 if args.device == "cuda" else 2048,
    )
    hidden, device = target.shapes.hidden_size, torch.device(args.device)
    aux = torch.zeros(
        int(corpus.start[-1]) + 1, len(corpus.layers), hidden, dtype=torch.bfloat16, device=device
    )
    last = torch.zeros(int(corpus.last_start[-1]), hidden, dtype=torch.bfloat16, device=device)
    for batch in engine._run(0, corpus.samples):
        assert isinstance(batch.states, Captured)
        tokens = np.concatenate(
            [np.arange(corpus.start[i], corpus.start[i + 1]) for i in batch.members]
        )
        lasts = np.concatenate(
            [np.arange(corpus.last_start[i], corpus.last_start[i + 1]) for i in batch.members]
        )
        aux[torch.from_numpy(tokens).to(device)] = batch.states.aux.to(torch.bfloat16)
        last[torch.from_numpy(lasts).to(device)] = batch.states.last.to(torch.bfloat16)
    frozen = compact(engine.frozen())
    embed = frozen.embed_tokens.detach().to(device)
    head = embed if frozen.tied else frozen.lm_head.detach().to(device)
    return aux, last, FrozenTarget(embed, frozen.norm.detach(), head, frozen.tied)
