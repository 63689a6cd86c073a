"""Who sees whom, against matrices written by hand; then SDPA against a loop, and flex against
SDPA.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dspark.train.draft import attention
from dspark.train.draft.attention import (
    AttentionPlan,
    MaskTables,
    block_attention,
    context_interval,
    dense_mask,
)
from dspark.train.draft.sight import Sight

DOC = torch.tensor([0, 0, 0, 1, 1, 1, 1, -1], dtype=torch.int32)
ANCHORS = torch.tensor([0, 2, 5, 0])
VALID = torch.tensor([True, True, True, False])
# Columns: 8 context tokens | blocks of 2 slots. One row a block: its two slots see the same.
EXPECTED = [
    "........ xx......",  # anchor 0: nothing before it
    "xx...... ..xx....",  # strict: the anchor itself is slot 0, not context
    "...xx... ....xx..",  # document 1 begins at 3
    "........ ......xx",  # padding block: itself only
]


def expected_mask() -> Tensor:
    rows = [[c == "x" for c in row.replace(" ", "")] for row in EXPECTED]
    return torch.tensor(rows).repeat_interleave(2, 0)


def inputs(
    context: int,
    rows: int,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 8,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    g = torch.Generator().manual_seed(4)
    shapes = [(rows, heads), (context + rows, kv_heads), (context + rows, kv_heads)]
    return [torch.randn(*s, dim, generator=g, dtype=dtype).requires_grad_() for s in shapes]


def naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    share = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for i in range(q.shape[0]):
        seen = mask[i].nonzero().flatten()
        for head in range(q.shape[1]):
            score = k[seen, head // share] @ q[i, head] / math.sqrt(q.shape[2])
            out[i, head] = score.softmax(0) @ v[seen, head // share]
    return out


def test_mask_is_the_matrix_by_hand() -> None:
    start, limit = context_interval(DOC, ANCHORS, VALID)
    assert torch.equal(dense_mask(start, limit, 8, 2), expected_mask())


def test_flex_mask_is_the_matrix_by_hand() -> None:
    plan = AttentionPlan.build(DOC, ANCHORS, VALID, 2, "flex")
    assert plan.blocks is not None
    q, kv = torch.meshgrid(torch.arange(8), torch.arange(16), indexing="ij")
    zero = torch.zeros_like(q)
    assert torch.equal(plan.blocks.mask_mod(zero, zero, q, kv), expected_mask())


def tiles_of(mask: Tensor, beyond: bool) -> Tensor:
    """bool[Q, K] -> [tile rows, tile columns, TILE * TILE]; rows past the end read as ``beyond``,
    columns as False.
    """
    rows, columns = (-(-n // attention.TILE) for n in mask.shape)
    whole = torch.zeros(rows * attention.TILE, columns * attention.TILE, dtype=torch.bool)
    whole[mask.shape[0] :] = beyond
    whole[:, mask.shape[1] :] = False
    whole[: mask.shape[0], : mask.shape[1]] = mask
    cut = whole.view(rows, attention.TILE, columns, attention.TILE)
    return cut.permute(0, 2, 1, 3).flatten(2)


def test_tiles_cover_the_mask() -> None:
    """Against the dense matrix, on rows of any shape: no tile with something in it is left out,
    none is called whole wrongly.
    """
    skipped = whole = 0
    for number in range(80):
        context, anchors, block, docs, window = (
            int(torch.randint(1, n, ())) for n in (900, 90, 9, 3, 400)
        )
        sight = Sight(window if number % 2 else None, causal=bool(number % 3))
        doc = torch.randint(-1, docs, (context,)).sort().values.to(torch.int32).roll(-1)
        at = torch.randint(0, context, (anchors,)).sort().values
        start, limit = context_interval(doc, at, torch.rand(anchors) < 0.9)
        mask = dense_mask(start, limit, context, block, sight)
        some, full = attention.tile_cover(start, limit, context, block, sight)
        assert not bool((tiles_of(mask, False).any(-1) & ~some).any())
        assert torch.equal(full, tiles_of(mask, True).all(-1))
        skipped += int((~some).sum())
        whole += int(full.sum())
    assert skipped > 0
    assert whole > 0


@pytest.mark.parametrize("group", [2, 4, 256])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_sdpa_against_a_loop(group: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of one, two and all anchors: the cut of the context must not change what is seen.
    Gradients too.
    """
    monkeypatch.setattr(attention, "GROUP_TOKENS", group)
    args = inputs(8, 8, kv_heads=kv_heads, dtype=torch.float64)
    out = block_attention(*args, AttentionPlan.build(DOC, ANCHORS, VALID, 2))
    want = naive(*args, expected_mask())
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    probe = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad((out * probe).sum(), args),
        torch.autograd.grad((want * probe).sum(), args),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_padding_is_finite_and_unseen() -> None:
    args = [x.detach() for x in inputs(8, 8)]
    plan = AttentionPlan.build(DOC, ANCHORS, VALID, 2)
    before = block_attention(*args, plan)
    assert bool(before.isfinite().all())
    with torch.no_grad():
        for x in args[1:]:
            x[7] = 1e4  # the padding token
        for x, first in zip(args, (6, 14, 14), strict=True):
            x[first:] = 1e4  # the padding block
    after = block_attention(*args, plan)
    assert torch.equal(before[:6], after[:6])


# Uncompiled flex warns that it is slow; on the CPU it only stands in for the kernel.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("shape", [(40, 5, 3), (300, 60, 4)])
def test_flex_equals_sdpa(shape: tuple[int, int, int]) -> None:
    context, anchors, block = shape
    g = torch.Generator().manual_seed(6)
    doc = torch.arange(context, dtype=torch.int32) // 17
    at = torch.randperm(context, generator=g)[:anchors].sort().values
    valid = torch.arange(anchors) < anchors - 2
    args = [x.detach() for x in inputs(context, anchors * block, dim=16)]
    with torch.no_grad():
        flex = block_attention(*args, AttentionPlan.build(doc, at, valid, block, "flex"))
        sdpa = block_attention(*args, AttentionPlan.build(doc, at, valid, block, "sdpa"))
    torch.testing.assert_close(flex, sdpa, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_a_row_without_anchors(backend: attention.Backend) -> None:
    args = inputs(8, 0)
    none = torch.zeros(0, dtype=torch.int64)
    out = block_attention(*args, AttentionPlan.build(DOC, none, none.bool(), 2, backend))
    assert out.shape == (0, 4, 8)


# Windows: block of 3 slots with anchor 5 in a document from 3, and one with anchor 7 whose context
# the window cuts.
WINDOW_DOC = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1, 1], dtype=torch.int32)
WINDOW_ANCHORS = torch.tensor([5, 8])
BOTH = torch.tensor([True, True])
IN_SIGHT = {
    Sight(3, causal=True): [
        "...xx..... x.....",  # at 5: 3, 4 and itself
        "....x..... xx....",
        ".......... xxx...",
        "......xx.. ...x..",
        ".......x.. ...xx.",
        ".......... ...xxx",
    ],
    Sight(2, causal=False): [
        "....x..... xx....",  # one back, one on
        ".......... xxx...",
        ".......... .xx...",
        ".......x.. ...xx.",
        ".......... ...xxx",
        ".......... ....xx",
    ],
    Sight(None, causal=True): [
        "...xx..... x.....",
        "...xx..... xx....",
        "...xx..... xxx...",
        "...xxxxx.. ...x..",
        "...xxxxx.. ...xx.",
        "...xxxxx.. ...xxx",
    ],
    Sight(1, causal=True): ["." * 10 + "." * i + "x" + "." * (5 - i) for i in range(6)],
}


def in_sight(sight: Sight) -> Tensor:
    return torch.tensor([[c == "x" for c in row.replace(" ", "")] for row in IN_SIGHT[sight]])


@pytest.mark.parametrize("sight", IN_SIGHT)
def test_windows_are_the_matrices_by_hand(sight: Sight) -> None:
    start, limit = context_interval(WINDOW_DOC, WINDOW_ANCHORS, BOTH)
    assert torch.equal(dense_mask(start, limit, 10, 3, sight), in_sight(sight))
    plan = AttentionPlan.build(WINDOW_DOC, WINDOW_ANCHORS, BOTH, 3, "flex", sight)
    assert plan.blocks is not None
    q, kv = torch.meshgrid(torch.arange(6), torch.arange(16), indexing="ij")
    zero = torch.zeros_like(q)
    assert torch.equal(plan.blocks.mask_mod(zero, zero, q, kv), in_sight(sight))


@pytest.mark.parametrize("group", [3, 256])
@pytest.mark.parametrize("sight", IN_SIGHT)
def test_windowed_sdpa_against_a_loop(
    sight: Sight, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "GROUP_TOKENS", group)
    args = inputs(10, 6, dtype=torch.float64)
    plan = AttentionPlan.build(WINDOW_DOC, WINDOW_ANCHORS, BOTH, 3, sight=sight)
    out, want = block_attention(*args, plan), naive(*args, in_sight(sight))
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    probe = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad((out * probe).sum(), args),
        torch.autograd.grad((want * probe).sum(), args),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    small = [x[..., :2].detach().requires_grad_() for x in args]
    assert torch.autograd.gradcheck(lambda *x: block_attention(*x, plan), small)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("sight", [Sight(5, causal=True), Sight(40, causal=True), Sight(6)])
def test_windowed_flex_equals_sdpa(sight: Sight) -> None:
    context, anchors, block = 400, 60, 4
    g = torch.Generator().manual_seed(6)
    doc = torch.arange(context, dtype=torch.int32) // 90
    at = torch.randperm(context, generator=g)[:anchors].sort().values
    valid = torch.arange(anchors) < anchors - 2
    args = [x.detach() for x in inputs(context, anchors * block, dim=16)]
    with torch.no_grad():
        flex, sdpa = (
            block_attention(*args, AttentionPlan.build(doc, at, valid, block, backend, sight))
            for backend in ("flex", "sdpa")
        )
    torch.testing.assert_close(flex, sdpa, rtol=1e-5, atol=1e-5)


def test_cost_follows_the_window() -> None:
    """Of a row of 16,384 tokens: the keys that SDPA reads, and the tiles that the flex kernel
    visits.
    """
    context, block = 16384, 7
    doc, at = torch.zeros(context, dtype=torch.int32), torch.arange(16, context, 32)
    valid = torch.ones_like(at, dtype=torch.bool)
    start, limit = context_interval(doc, at, valid)
    read, tiles = {}, {}
    for window in (None, 2048, 512):
        sight = Sight(window, causal=window is not None)
        plan = AttentionPlan.build(doc, at, valid, block, sight=sight)
        read[window] = sum(group.high - group.low for group in plan.groups)
        tiles[window] = int(attention.tile_cover(start, limit, context, block, sight)[0].sum())
        if window is not None:  # a group of anchors spans some context of its own
            assert all(group.high - group.low < window + 40 * 32 for group in plan.groups)
    assert read[512] < read[2048] / 1.5 < read[None] / 3
    assert tiles[512] < tiles[2048] * 0.6 < tiles[None] * 0.25


@pytest.mark.parametrize("sight", [Sight(), Sight(4, causal=True)])
def test_tables_made_beforehand_give_the_same_mask(sight: Sight) -> None:
    (tables,) = MaskTables(2, (sight,))(DOC, ANCHORS, VALID)
    assert {t.dtype for t in tables.values()} == {torch.int32}
    # what they were made from is not looked at again
    given = AttentionPlan.build(DOC, ANCHORS * 0, ~VALID, 2, "flex", sight, tables=tables)
    usual = AttentionPlan.build(DOC, ANCHORS, VALID, 2, "flex", sight)
    assert given.blocks is not None
    assert usual.blocks is not None
    args = [x.detach() for x in inputs(8, 8)]
    torch.testing.assert_close(
        block_attention(*args, given), block_attention(*args, usual), rtol=0, atol=0
    )
    assert MaskTables(2, (sight,))(DOC, ANCHORS[:0], VALID[:0]) == ()


@pytest.mark.parametrize("sight", [Sight(), Sight(40, causal=True)])
def test_the_backward_tables_are_those_that_torch_derives(sight: Sight) -> None:
    doc = torch.arange(900, dtype=torch.int32) // 400
    at = torch.arange(3, 900, 5)
    found = AttentionPlan.build(doc, at, at < 880, 4, "flex", sight).blocks
    assert found is not None
    assert found.full_kv_num_blocks is not None
    assert sight.window is not None or bool(found.full_kv_num_blocks.any())
    derived = BlockMask.from_kv_blocks(
        found.kv_num_blocks,
        found.kv_indices,
        found.full_kv_num_blocks,
        found.full_kv_indices,
        BLOCK_SIZE=found.BLOCK_SIZE,
        mask_mod=found.mask_mod,
        seq_lengths=found.seq_lengths,
    )
    for name in ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"):
        ours, theirs = getattr(found, name), getattr(derived, name)
        assert (ours.stride(), ours.dtype) == (theirs.stride(), theirs.dtype), name
        assert torch.equal(ours, theirs), name
