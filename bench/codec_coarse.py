"""A variant of the transform codec, emulated from the exact store for ``klt_stores.py``: tokens
that no anchor can be at (prompts, other turns) are coded with a coarser step.

``klt-1.25-1@coarse2`` uses the tables of the store ``klt-1.25-1`` and twice the step for those
tokens. Bytes are the store's, with its aux codes replaced by these, packed as a part packs them.
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from codec_klt import chunk_bytes
from codec_klt_states import Corpus

from dspark.cache.codec.base import tokens_of
from dspark.cache.codec.klt.codec import Klt, Known
from dspark.cache.codec.klt.half import half_on
from dspark.cache.codec.klt.symbols import offsets_of
from dspark.cache.reader import Cache

OFFSET_ROWS = 16384


def coarser(codec: Klt, aux: torch.Tensor, tokens: Any, rows: torch.Tensor, times: float) -> Klt:
    """``codec`` with ``times`` the step, whose cells decode to the means of ``rows`` of ``aux``."""
    table = codec.learnt.aux
    half = half_on(table, aux.device)
    y = half.coefficients(aux.flatten(1), Known.of(tokens).around(slice(None)).plain())
    limits = torch.tensor(table.packing.limits(), dtype=y.dtype, device=y.device)
    inside = (y.abs() / table.step <= limits + 1).all(1) & rows
    step = table.step * times
    offsets = offsets_of(y[inside], step, table.packing)
    wide = dataclasses.replace(table, step=step, offsets=offsets)
    return codec.with_tables(dataclasses.replace(codec.learnt, aux=wide))


@torch.no_grad()
def emulate(
    cache: Cache, corpus: Corpus, aux: torch.Tensor, last: torch.Tensor, times: float
) -> float:
    """Code the exact states ``aux`` [T + 1, L, H] and ``last`` [M, H] in place, with the tables of
    the store ``cache``; returns the bytes per token that this saves.
    """
    device, codec, hidden = aux.device, cache.codec, aux.shape[2]
    assert isinstance(codec, Klt)
    embedding = cache.embedding_on(device)
    spec = codec.arrays(aux.shape[1], hidden)["aux_code"]
    first = cache.index["part_first_sample"].tolist()
    wide, jobs, plain = None, [], []
    with ThreadPoolExecutor(24) as pool:
        for a, b in pairwise(first):
            rows = slice(int(corpus.start[a]), int(corpus.start[b]))
            lasts = slice(int(corpus.last_start[a]), int(corpus.last_start[b]))
            tokens = tokens_of(corpus.samples[a:b], embedding)
            mask = np.concatenate([s.loss_mask for s in corpus.samples[a:b]])
            fine = torch.from_numpy(mask).to(device)
            x, y = aux[rows], last[lasts]
            if wide is None:
                end = min(b, a + int(np.searchsorted(corpus.start[a:b], OFFSET_ROWS)) + 1)
                some = slice(rows.start, int(corpus.start[end]))
                about = tokens_of(corpus.samples[a:end], embedding)
                count = some.stop - some.start
                wide = coarser(codec, aux[some], about, ~fine[:count], times)
            one, two = codec.encode(x, y, tokens), wide.encode(x, y, tokens)
            (near, own), (far, _) = (
                c.decode(k, hidden, tokens, aux.dtype) for c, k in ((codec, one), (wide, two))
            )
            mixed = torch.where(fine[:, None], one["aux_code"], two["aux_code"]).cpu().numpy()
            jobs.append(pool.submit(chunk_bytes, "aux_code", mixed, spec))
            plain.append(pool.submit(chunk_bytes, "aux_code", one["aux_code"].cpu().numpy(), spec))
            aux[rows] = torch.where(fine[:, None, None], near, far)
            last[lasts] = own
    saved = sum(j.result() for j in plain) - sum(j.result() for j in jobs)
    return saved / corpus.tokens
