"""``qk_norm_rope`` and its gradient as Triton kernels: each value read once, each result written
once, in float32 in between.

Legend: T rows of a joint product (the context's or the blocks'), Hq/Hkv query and key heads of a
row (Hq = 0: context), D head size.

The same kernels serve context and blocks, one launch each. At 4,096 context and 3,584 block tokens,
32 and 8 heads of 128 in bfloat16, the forward pass moves 61 + 61 MB and the backward 45 + 61 + 61
MB: 36 and 50 us at 3.35 TB/s, an H100's at most.

A tile is some heads of a row, split into halves: the values that RoPE pairs are then in one thread,
and a head's sums in one warp. Import only if triton is installed; ``qk_norm_rope`` does so when its
tensors are on CUDA.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspark.train.ops.qk_norm_rope import Inputs

# Values of half a tile, 8 per thread: 16 bytes of bfloat16, the most that one load takes. Eight
# heads of 128.
TILE = 512
WARPS = 2
# Maximum programs of the backward pass: 8 for each of an H100's 132 multiprocessors, as many as
# their registers hold at once (128 per thread, as compiled for Qwen3-4B's heads). Each adds up its
# rows' gradients of the norms' weights.
PROGRAMS = 1056


@triton.jit  # type: ignore[untyped-decorator]
def _half(at, ROWS: tl.constexpr, COLUMNS: tl.constexpr, size: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 [ROWS, COLUMNS]: ``size`` values from ``at`` on, in every row. Each thread loads what it
    needs, also 16 bytes at a time: from one row the compiler would load one value per thread and
    pass them on through shared memory.
    """
    column = tl.broadcast_to(tl.arange(0, COLUMNS)[None, :], (ROWS, COLUMNS))
    return tl.load(at + column, mask=column < size, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _copied(  # type: ignore[no-untyped-def]
    source,  # [heads, D] of one row
    head_stride,
    out,  # [heads, D], dense
    HEADS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    half: tl.constexpr = D // 2
    column = tl.arange(0, COLUMNS)
    for first in tl.static_range(0, HEADS, ROWS):
        head = first + tl.arange(0, ROWS)[:, None]
        real = (head < HEADS) & (column < half)[None, :]
        at = source + head.to(tl.int64) * head_stride + column[None, :]
        to = out + head * D + column[None, :]
        a = tl.load(at, mask=real)
        b = tl.load(at + half, mask=real)
        tl.store(to, a, mask=real)
        tl.store(to + half, b, mask=real)


@triton.jit  # type: ignore[untyped-decorator]
def _turned(  # type: ignore[no-untyped-def]
    source,  # [heads, D] of one row, dense
    weight,  # [D]
    c,  # [ROWS, COLUMNS], of the row's position
    s,
    out,  # [heads, D], dense
    eps,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    half: tl.constexpr = D // 2
    column = tl.arange(0, COLUMNS)
    inside = (column < half)[None, :]
    w1 = _half(weight, ROWS, COLUMNS, half)
    w2 = _half(weight + half, ROWS, COLUMNS, half)
    kind = out.dtype.element_ty
    for first in tl.static_range(0, HEADS, ROWS):
        head = first + tl.arange(0, ROWS)[:, None]
        real = (head < HEADS) & inside
        at = head * D + column[None, :]
        a = tl.load(source + at, mask=real, other=0.0).to(tl.float32)
        b = tl.load(source + half + at, mask=real, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(a * a + b * b, 1)[:, None] / D + eps)
        a = a * scale * w1
        b = b * scale * w2
        tl.store(out + at, (a * c - b * s).to(kind), mask=real)
        tl.store(out + half + at, (b * c + a * s).to(kind), mask=real)


@triton.jit  # type: ignore[untyped-decorator]
def forward_rows(  # type: ignore[no-untyped-def]
    joint,  # [T, (2 Hkv + Hq) D] = [v | k | q]
    joint_stride,
    q_weight,  # [D]
    k_weight,
    cos,  # [T, D/2]
    sin,
    cos_stride,
    sin_stride,
    q,  # [T, Hq, D], dense; so are the others
    keys,  # [T, Hkv, D]
    values,
    eps,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    c = _half(cos + row * cos_stride, ROWS, COLUMNS, D // 2)
    s = _half(sin + row * sin_stride, ROWS, COLUMNS, D // 2)
    size: tl.constexpr = KEY_HEADS * D
    v = joint + row * joint_stride
    _turned(v + size, k_weight, c, s, keys + row * size, eps, KEY_HEADS, D, ROWS, COLUMNS)
    _turned(
        v + 2 * size,
        q_weight,
        c,
        s,
        q + row * (QUERY_HEADS * D),
        eps,
        QUERY_HEADS,
        D,
        ROWS,
        COLUMNS,
    )
    _copied(v, D, values + row * size, KEY_HEADS, D, ROWS, COLUMNS)


@triton.jit  # type: ignore[untyped-decorator]
def _turned_gradient(  # type: ignore[no-untyped-def]
    grad,  # [heads, D] of one row
    head_stride,
    source,  # [heads, D], dense
    weight,  # [D]
    c,
    s,
    out,  # [heads, D], dense
    sum1,  # [ROWS, COLUMNS], d weight of the first half so far, heads of a tile apart
    sum2,
    eps,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    half: tl.constexpr = D // 2
    column = tl.arange(0, COLUMNS)
    inside = (column < half)[None, :]
    w1 = _half(weight, ROWS, COLUMNS, half)
    w2 = _half(weight + half, ROWS, COLUMNS, half)
    kind = out.dtype.element_ty
    for first in tl.static_range(0, HEADS, ROWS):
        head = first + tl.arange(0, ROWS)[:, None]
        real = (head < HEADS) & inside
        at = head * D + column[None, :]
        given = grad + head.to(tl.int64) * head_stride + column[None, :]
        a = tl.load(source + at, mask=real, other=0.0).to(tl.float32)
        b = tl.load(source + half + at, mask=real, other=0.0).to(tl.float32)
        da = tl.load(given, mask=real, other=0.0).to(tl.float32)
        db = tl.load(given + half, mask=real, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(a * a + b * b, 1)[:, None] / D + eps)
        a = a * scale
        b = b * scale
        d1 = da * c + db * s  # back by the same angle
        d2 = db * c - da * s
        sum1 += d1 * a
        sum2 += d2 * b
        d1 = d1 * w1
        d2 = d2 * w2
        along = tl.sum(d1 * a + d2 * b, 1)[:, None] / D
        tl.store(out + at, (scale * (d1 - a * along)).to(kind), mask=real)
        tl.store(out + half + at, (scale * (d2 - b * along)).to(kind), mask=real)
    return sum1, sum2


@triton.jit  # type: ignore[untyped-decorator]
def gradient_rows(  # type: ignore[no-untyped-def]
    dq,  # [T, Hq, D]
    dkeys,  # [T, Hkv, D]
    dvalues,
    dq_stride,
    dq_head_stride,
    dkeys_stride,
    dkeys_head_stride,
    dvalues_stride,
    dvalues_head_stride,
    joint,  # [T, (2 Hkv + Hq) D] = [v | k | q]
    joint_stride,
    q_weight,  # [D]
    k_weight,
    cos,  # [T, D/2]
    sin,
    cos_stride,
    sin_stride,
    out,  # d joint, dense
    sums,  # fp32 [programs, 2, D]: this program's part of d q_weight and d k_weight
    eps,
    rows,  # T
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    half: tl.constexpr = D // 2
    size: tl.constexpr = KEY_HEADS * D
    width: tl.constexpr = 2 * size + QUERY_HEADS * D
    column = tl.arange(0, COLUMNS)
    inside = column < half
    q1 = tl.zeros([ROWS, COLUMNS], tl.float32)
    q2 = tl.zeros([ROWS, COLUMNS], tl.float32)
    k1 = tl.zeros([ROWS, COLUMNS], tl.float32)
    k2 = tl.zeros([ROWS, COLUMNS], tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        c = _half(cos + row * cos_stride, ROWS, COLUMNS, half)
        s = _half(sin + row * sin_stride, ROWS, COLUMNS, half)
        v = joint + row * joint_stride
        to = out + row * width
        k1, k2 = _turned_gradient(
            dkeys + row * dkeys_stride,
            dkeys_head_stride,
            v + size,
            k_weight,
            c,
            s,
            to + size,
            k1,
            k2,
            eps,
            KEY_HEADS,
            D,
            ROWS,
            COLUMNS,
        )
        q1, q2 = _turned_gradient(
            dq + row * dq_stride,
            dq_head_stride,
            v + 2 * size,
            q_weight,
            c,
            s,
            to + 2 * size,
            q1,
            q2,
            eps,
            QUERY_HEADS,
            D,
            ROWS,
            COLUMNS,
        )
        _copied(
            dvalues + row * dvalues_stride, dvalues_head_stride, to, KEY_HEADS, D, ROWS, COLUMNS
        )
    sums += tl.program_id(0) * (2 * D) + column
    tl.store(sums, tl.sum(q1, 0), mask=inside)
    tl.store(sums + half, tl.sum(q2, 0), mask=inside)
    tl.store(sums + D, tl.sum(k1, 0), mask=inside)
    tl.store(sums + D + half, tl.sum(k2, 0), mask=inside)


def forward(given: Inputs, kernel: Any = forward_rows) -> tuple[Tensor, Tensor, Tensor]:
    """As ``qk_norm_rope.qk_norm_rope``; fp32 inside, no fp64."""
    context, blocks, q_weight, k_weight, eps, context_rope, block_rope = given
    (_, k_ctx), (_, k_blk, queries) = given.heads
    q = blocks.new_empty(queries.shape)
    keys, values = (blocks.new_empty(len(k_ctx) + len(k_blk), *k_blk.shape[1:]) for _ in range(2))
    parts = [len(k_ctx), len(k_blk)]
    for joint, (cos, sin), k, v, query_heads in zip(
        (context, blocks),
        (context_rope, block_rope),
        keys.split_with_sizes(parts),
        values.split_with_sizes(parts),
        (0, q.shape[1]),
        strict=True,
    ):
        if joint.shape[0]:
            assert joint.stride(1) == cos.stride(2) == sin.stride(2) == 1
            kernel[(joint.shape[0],)](
                joint,
                joint.stride(0),
                q_weight,
                k_weight,
                cos,
                sin,
                cos.stride(0),
                sin.stride(0),
                q,
                k,
                v,
                eps,
                QUERY_HEADS=query_heads,
                KEY_HEADS=k.shape[1],
                D=k.shape[2],
                num_warps=WARPS,
                **_tile(query_heads, *k.shape[1:]),
            )
    return q, keys, values


def gradient(
    grads: tuple[Tensor, Tensor, Tensor], given: Inputs, kernel: Any = gradient_rows
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``qk_norm_rope.plain_gradient``; fp32 inside, no fp64. No atomics, so the result is
    deterministic.
    """
    context, blocks, q_weight, k_weight, eps, context_rope, block_rope = given
    assert eps > 0  # heads past the last one are zeros, which must not become NaN in the sums
    dq, dkeys, dvalues = (g if g.stride(2) == 1 else g.contiguous() for g in grads)
    d_context, d_blocks = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (context, blocks)
    )
    parts = [context.shape[0], blocks.shape[0]]
    programs = [_programs(rows) for rows in parts]
    sums = blocks.new_empty(sum(programs), 2, q_weight.shape[0], dtype=torch.float32)
    for joint, (cos, sin), dk, dv, out, own, query_heads in zip(
        (context, blocks),
        (context_rope, block_rope),
        dkeys.split_with_sizes(parts),
        dvalues.split_with_sizes(parts),
        (d_context, d_blocks),
        sums.split_with_sizes(programs),
        (0, dq.shape[1]),
        strict=True,
    ):
        if joint.shape[0]:
            assert joint.stride(1) == cos.stride(2) == sin.stride(2) == 1
            kernel[(own.shape[0],)](
                dq,
                dk,
                dv,
                *dq.stride()[:2],
                *dk.stride()[:2],
                *dv.stride()[:2],
                joint,
                joint.stride(0),
                q_weight,
                k_weight,
                cos,
                sin,
                cos.stride(0),
                sin.stride(0),
                out,
                own,
                eps,
                joint.shape[0],
                QUERY_HEADS=query_heads,
                KEY_HEADS=dk.shape[1],
                D=dk.shape[2],
                num_warps=WARPS,
                **_tile(query_heads, *dk.shape[1:]),
            )
    return d_context, d_blocks, sums.sum(0)


def _programs(rows: int) -> int:
    """Return as many programs as give each the same number of rows, or one less."""
    return -(-rows // max(1, -(-rows // PROGRAMS)))


def _tile(query_heads: int, key_heads: int, head_dim: int) -> dict[str, int]:
    """Return the heads per tile and the columns of its halves, powers of two."""
    columns = triton.next_power_of_2(head_dim // 2)
    most = triton.next_power_of_2(max(query_heads, key_heads))
    return {"ROWS": max(1, min(TILE // columns, most)), "COLUMNS": columns}
