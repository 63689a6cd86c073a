"""A part filled in any order: by rows from the host, and by indexed copies where the codes are, the
same bytes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from dspark.cache.codec import registry
from dspark.cache.codec.base import EXACT_TOKEN, ArraySpec
from dspark.cache.files.layout import PartLayout
from dspark.cache.files.place import Folder
from dspark.cache.parts.arrays import join_tokens
from dspark.cache.parts.part import PartJob
from dspark.cache.parts.record import Block
from dspark.cache.records import TokenSample, last_rows
from dspark.cache.settings import LOSSLESS, rotated_name
from dspark.cache.shared.blocks import SharedBlock
from dspark.dump.corpus.parts import PartRows
from dspark.dump.writing.filling import Filling, as_slice

LAYERS, HIDDEN = 2, 64


def samples(lengths: list[int]) -> list[TokenSample]:
    rng = np.random.default_rng(0)
    out = []
    for row, n in enumerate(lengths):
        mask = np.arange(n) >= n // 3
        out.append(TokenSample(row, bytes(16), rng.integers(0, 9, n).astype(np.int32), mask))
    return out


def filling(made: list[TokenSample], bits: int) -> Filling:
    part = PartRows(0, 0, len(made), made, Counter())
    arrays, stored = join_tokens(made)
    layout = PartLayout(registry.make(rotated_name(bits, bits)), LAYERS, HIDDEN)
    specs = layout.arrays(arrays["input_ids"].shape[0], len(made), sum(stored))
    job = PartJob(
        place=Folder(Path("nowhere")),
        index=0,
        arrays=arrays,
        specs=list(specs),
        exact={},
        block=Block(row_start=0, row_stop=len(made), dropped={}, truncated=0),
        plan={},
        plan_sha256="",
    )
    return Filling(part, job, SharedBlock(False))


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_host_and_device_put_the_same_bytes_at_the_same_rows(bits: int) -> None:
    made = samples([5, 3, 9, 4])
    codec = registry.make(rotated_name(bits, bits))
    torch.manual_seed(1)
    # The whole part, coded at once: what must be in the block whoever put it there.
    aux, last = torch.randn(21, LAYERS, HIDDEN).bfloat16(), torch.randn(30, HIDDEN).bfloat16()
    counts = [int(last_rows(s.loss_mask).sum()) for s in made]
    starts = {"aux": np.cumsum([0, 5, 3, 9, 4]), "last": np.cumsum([0, *counts])}
    last = last[: starts["last"][-1]]
    want = {n: t.numpy() for n, t in codec.encode(aux, last).items()}
    for on_device in (False, True):
        filled = filling(made, bits)
        for members in ([2, 0], [3], [1]) if bits != 8 else ([1, 2], [0], [3]):
            own = []
            for field, states in (("aux", aux), ("last", last)):
                at = starts[field]
                own.append(torch.cat([states[at[i] : at[i + 1]] for i in members]))
            coded = codec.encode(*own)
            assert not filled.whole
            if on_device:
                filled.put_on_device(members, coded)
            else:
                filled.put(members, {n: t.numpy() for n, t in coded.items()})
        assert filled.whole
        filled.to_host()
        for name, region in filled.places.items():
            assert (filled.block.array(region) == want[name]).all(), (on_device, name)


def test_rows_of_a_batch() -> None:
    filled = filling(samples([5, 3, 9, 4]), 16)
    assert filled.rows("token", [2, 0]).tolist() == [
        8,
        9,
        10,
        11,
        12,
        13,
        14,
        15,
        16,
        0,
        1,
        2,
        3,
        4,
    ]
    assert filled.rows("token", [1]).tolist() == [5, 6, 7]


def test_neighbouring_rows_are_a_slice_and_others_are_not() -> None:
    for rows in ([4, 5, 6], [0], [5, 4, 6], [1, 3], [2, 2, 4], [3, 1, 2, 5], []):
        found = as_slice(np.array(rows, np.int64))
        assert isinstance(found, slice) == (rows in ([4, 5, 6], [0]))
        assert np.arange(9)[found].tolist() == rows


def test_a_batch_of_the_wrong_size_is_refused() -> None:
    filled, codec = filling(samples([5, 3]), 16), registry.make(LOSSLESS)
    with pytest.raises(AssertionError, match="aux"):
        filled.put_on_device(
            [0], codec.encode(torch.zeros(4, LAYERS, HIDDEN), torch.zeros(3, HIDDEN))
        )


def test_exact_rows_are_the_same_from_host_and_device() -> None:
    """Batches in any order, one of them without any."""
    made = samples([5, 3, 9, 4])
    specs = {
        "exact_aux": ArraySpec("uint16", HIDDEN, axis="exact", layers=LAYERS),
        "exact_last": ArraySpec("uint16", HIDDEN, axis="exact"),
    }
    batches = [([2, 0], [0, 3, 9]), ([3], []), ([1], [2])]
    found = []
    for on_device in (False, True):
        filled = filling(made, 4)
        filled.job = dataclasses.replace(filled.job, exact=specs)
        codec = registry.make(rotated_name(4, 4))
        for members, exact in batches:
            own = [made[i] for i in members]
            tokens = sum(len(s.input_ids) for s in own)
            lasts = sum(int(last_rows(s.loss_mask).sum()) for s in own)
            coded = codec.encode(torch.ones(tokens, LAYERS, HIDDEN), torch.ones(lasts, HIDDEN))
            values = torch.arange(len(exact) * LAYERS * HIDDEN) + 100 * len(members)
            aux = values.to(torch.uint16).view(-1, LAYERS, HIDDEN)
            coded |= {"exact_aux": aux, "exact_last": aux[:, 0].contiguous()}
            coded[EXACT_TOKEN] = torch.tensor(exact, dtype=torch.int64)
            if on_device:
                filled.put_on_device(members, coded)
            else:
                filled.put(members, {n: t.numpy() for n, t in coded.items()})
        found.append(filled.exact())
        filled.release()
    host, device = found
    assert host[EXACT_TOKEN].tolist() == [0, 7, 8, 11]
    for name, want in host.items():
        assert device[name].dtype == want.dtype
        assert np.array_equal(device[name], want)
