"""The transform codec's steps around its products as Triton kernels: one pass over memory each.

In plain torch (``half.py``) a byte's cells are looked up by a gather of one to five values, and
rows are joined, converted and shifted in passes of their own; on a GPU that takes ten times the
products' time. Here every step writes where the next product reads: cells and embeddings go side by
side into its input, with two columns of ones for the mean. Import only if triton is installed;
``fast.py`` does so for tensors on CUDA.

Legend: T rows, C channels of a row, K coefficients, F features, W bytes of a row's code.
"""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from dspark.cache.codec.klt.symbols import BAND, CLASSES, Packing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TILE, BLOCK = 4, 256  # rows and bytes of a program


def jit(kernel: Callable[..., None]) -> Any:
    """As ``triton.jit``, but all values share one variant: only dtypes and constants tell variants
    apart.

    Triton otherwise compiles a kernel again for each argument that becomes 1, or that becomes or
    stops being a multiple of 16, and for each pointer that does. Here these are strides, offsets
    and widths, which every calibration learns anew: 20 to 29 variants, of which ``warm`` had four.
    What that would buy are accesses of several values at once, where base, stride and offset are
    all multiples of 16; the learnt ones are not.
    """
    # their annotations are text, as of all modules here
    values = [n for n, p in signature(kernel).parameters.items() if p.annotation != "tl.constexpr"]
    return triton.jit(do_not_specialize=values)(kernel)


@jit
def unpack_span(  # type: ignore[no-untyped-def]
    code,  # uint8[T', W]
    chosen,  # int64[T]: rows of code, or anything if not CHOSEN
    coarse,  # bool[T]: rows that the second half of values is for, or anything if not KINDS
    values,  # [bands * 256, N], twice if KINDS
    out,  # [T, ...]
    rows,
    code_stride,
    out_stride,
    first_byte,
    size,
    first_column,
    limit,
    kind_entries,
    BAND_BYTES: tl.constexpr,
    N: tl.constexpr,
    CHOSEN: tl.constexpr,
    KINDS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = row < rows
    source = row.to(tl.int64)
    if CHOSEN:
        source = tl.load(chosen + row, mask=real, other=0)
    inside = real[:, None] & (j < size)[None, :]
    at = source[:, None] * code_stride + first_byte + j[None, :]
    entry = tl.load(code + at, mask=inside, other=0).to(tl.int32) + (j // BAND_BYTES * 256)[None, :]
    if KINDS:
        kind = tl.load(coarse + row, mask=real, other=0).to(tl.int32)
        entry += (kind * kind_entries)[:, None]
    to = row.to(tl.int64)[:, None] * out_stride + first_column
    for n in tl.static_range(N):
        column = (j * N + n)[None, :]
        wanted = inside & (column < limit)
        tl.store(
            out + to + column, tl.load(values + entry * N + n, mask=wanted, other=0.0), mask=wanted
        )


@jit
def gather_embeddings(  # type: ignore[no-untyped-def]
    table,  # [V, H]
    ids,  # int64[E, T]; -1: zeros
    out,  # [T, ...]
    rows,
    hidden,
    out_stride,
    first_column,
    BLOCK: tl.constexpr,
):
    row, which = tl.program_id(0), tl.program_id(1)
    j = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = j < hidden
    i = tl.load(ids + which.to(tl.int64) * rows + row + tl.zeros((BLOCK,), tl.int64))
    x = tl.load(table + i * hidden + j, mask=inside & (i >= 0), other=0.0)
    to = out + row.to(tl.int64) * out_stride + first_column + which * hidden
    tl.store(to + j, x.to(out.dtype.element_ty), mask=inside)


@jit
def standardise(  # type: ignore[no-untyped-def]
    x,  # [T, C]
    mean,
    inverse,  # float32[C]
    out,  # [T, ...]: z in [:, :C], what its rounding left over in [:, C:2C]
    rows,
    channels,
    out_stride,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (j < channels)[None, :]
    m = tl.load(mean + j, mask=j < channels, other=0.0)[None, :]
    d = tl.load(inverse + j, mask=j < channels, other=0.0)[None, :]
    wide = row.to(tl.int64)[:, None]
    z = (tl.load(x + wide * channels + j[None, :], mask=inside, other=0.0).to(tl.float32) - m) * d
    rounded = z.to(out.dtype.element_ty)
    to = out + wide * out_stride + j[None, :]
    tl.store(to, rounded, mask=inside)
    tl.store(to + channels, (z - rounded.to(tl.float32)).to(out.dtype.element_ty), mask=inside)


@jit
def pack_span(  # type: ignore[no-untyped-def]
    y,  # float32[T, K]
    scale,  # float32[T]: a row's coefficients are multiplied by it; or anything if not SCALED
    code,  # uint8[T, W]
    moved,  # float32[T, parts]: squares of what the cells could not hold, of each program apart
    rows,
    y_stride,
    code_stride,
    moved_stride,
    first_byte,
    size,
    first_column,
    first_part,
    step,
    CELLS: tl.constexpr,
    N: tl.constexpr,
    SCALED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = row < rows
    inside = real[:, None] & (j < size)[None, :]
    wide = row.to(tl.int64)[:, None]
    if SCALED:
        times = tl.load(scale + row, mask=real, other=1.0)[:, None]
    half: tl.constexpr = CELLS // 2
    total = tl.zeros((TILE, BLOCK), tl.int32)
    lost = tl.zeros((TILE, BLOCK), tl.float32)
    weight = 1
    for n in tl.static_range(N):
        v = tl.load(
            y + wide * y_stride + first_column + (j * N + n)[None, :], mask=inside, other=0.0
        )
        if SCALED:
            v *= times
        q = tl.floor(tl.math.div_rn(tl.abs(v), step) + 0.5)
        fits = tl.minimum(q, half)
        rest = (q - fits) * step
        lost += rest * rest
        total += (tl.where(v < 0, -fits, fits) + half).to(tl.int32) * weight
        weight = weight * CELLS
    tl.store(code + wide * code_stride + first_byte + j[None, :], total.to(tl.uint8), mask=inside)
    part = moved + row.to(tl.int64) * moved_stride + first_part + tl.program_id(1)
    tl.store(part, tl.sum(lost, 1), mask=real)


def read() -> None:
    """Have triton read the kernels, one by one: while a thread does, triton 3.4 tells others a
    half-made hash of a function.
    """
    for kernel in (unpack_span, gather_embeddings, standardise, pack_span):
        _ = kernel.cache_key


def unpack(
    out: torch.Tensor,
    code: torch.Tensor,
    packing: Packing,
    values: Sequence[torch.Tensor],
    chosen: torch.Tensor | None = None,
    columns: int | None = None,
    coarse: torch.Tensor | None = None,
) -> None:
    """Write the first ``columns`` coefficients (None: all) of ``code`` [T', W], of its rows
    ``chosen`` int64 [T] (None: all), to the first columns of ``out`` [T, ...]. ``coarse`` bool [T]:
    which rows are; None: none. As ``symbols.unpack``, bit for bit.
    """
    rows, limit = out.shape[0], packing.total if columns is None else columns
    code = code if code.stride(1) == 1 else code.contiguous()
    first = 0
    for (a, b, _, n), table in zip(packing.spans(), values, strict=True):
        size = (b - a) // n
        if rows and a < limit:
            unpack_span[(triton.cdiv(rows, TILE), triton.cdiv(size, BLOCK))](
                code,
                code if chosen is None else chosen,
                code if coarse is None else coarse.contiguous(),
                table,
                out,
                rows,
                code.stride(0),
                out.stride(0),
                first,
                size,
                a,
                limit - a,
                -(-(b - a) // BAND) * 256,
                BAND_BYTES=BAND // n,
                N=n,
                CHOSEN=chosen is not None,
                KINDS=coarse is not None,
                TILE=TILE,
                BLOCK=BLOCK,
            )
        first += size


def embeddings(out: torch.Tensor, table: torch.Tensor, ids: torch.Tensor, at: int) -> None:
    """Write rows ``ids`` int64 [E, T] of ``table`` [V, H], zeros for -1, to columns ``at`` to ``at
    + E * H`` of ``out`` [T, ...].
    """
    count, rows = ids.shape
    hidden = table.shape[1]
    if rows:
        gather_embeddings[(rows, count, triton.cdiv(hidden, 1024))](
            table, ids.contiguous(), out, rows, hidden, out.stride(0), at, BLOCK=1024
        )


def standardised(
    out: torch.Tensor, x: torch.Tensor, mean: torch.Tensor, inverse: torch.Tensor
) -> None:
    """Write ``z = (x - mean) * inverse`` of rows ``x`` [T, C], and what rounding to the dtype of
    ``out`` left over, to its first 2 C columns.
    """
    rows, channels = x.shape
    if rows:
        standardise[(triton.cdiv(rows, TILE), triton.cdiv(channels, BLOCK))](
            x.contiguous(),
            mean,
            inverse,
            out,
            rows,
            channels,
            out.stride(0),
            TILE=TILE,
            BLOCK=BLOCK,
        )


def pack(
    y: torch.Tensor, step: float, packing: Packing, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Code uint8 [T, W] of coefficients ``y`` float32 [T, K], times ``scale`` float32 [T] if given,
    each moved to the outermost cell if its class has too few; and float32 [T], the sum of squares
    of those moves. As ``symbols.quantise`` and ``symbols.pack``.
    """
    rows = y.shape[0]
    code = torch.empty(rows, packing.width, dtype=torch.uint8, device=y.device)
    spans = packing.spans()
    parts = [triton.cdiv((b - a) // n, BLOCK) for a, b, _, n in spans]
    moved = torch.zeros(rows, max(sum(parts), 1), dtype=torch.float32, device=y.device)
    first = part = 0
    for (a, b, cells, n), count in zip(spans, parts, strict=True):
        size = (b - a) // n
        if rows:
            pack_span[(triton.cdiv(rows, TILE), count)](
                y,
                y if scale is None else scale,
                code,
                moved,
                rows,
                y.stride(0),
                code.stride(0),
                moved.stride(0),
                first,
                size,
                a,
                part,
                step,
                CELLS=cells,
                N=n,
                SCALED=scale is not None,
                TILE=TILE,
                BLOCK=BLOCK,
            )
        first, part = first + size, part + count
    return code, moved.sum(1)


assert all(BAND % n == 0 for _, n in CLASSES)
