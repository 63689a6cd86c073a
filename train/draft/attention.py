"""Attention of a draft's blocks over their context and themselves. One function, two ways of
running it.

Legend: S context tokens, A anchors, B slots of a block, Q = A*B block tokens, Hq query heads, Hkv
key heads, D head size.

A block sees context ``kv < a`` (strict: the anchor enters only as slot 0) of its own document, and
its own block in both directions, but never another block. A padding block sees only itself, because
a row that sees nothing is NaN. Since documents are runs, a block's context is one interval [start,
a), which is all that either implementation needs. In a sliding layer (``sight.Sight``) slot k, at
position a + k, sees the last W - 1 tokens before it and itself, so each slot has its own start and
sees the block causally; keys that no slot of a group or tile sees are not read.

``sdpa`` is the reference and runs on the CPU: a dense mask, a group of anchors at a time, so that
neither [Q, S+Q] scores nor a copy of the context per anchor exist, and only the stretch of context
that the group can see is read. ``flex`` is for CUDA: a block-sparse mask built once per batch and
shared by all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dspark.train.draft.sight import Sight

Backend = Literal["sdpa", "flex"]

# Block tokens an SDPA call takes: keys are S + this many, of which B a row are used, so larger
# groups waste more.
GROUP_TOKENS = 256
# Rows and columns of a tile of the flex mask; the size its kernels are made for.
TILE = 128
WHOLE = Sight()
Tables = Mapping[str, Tensor]  # ``mask_tables``
# torch 2.9 and later have a name for what flex attention gives beside its output.
_AUX = getattr(flex, "AuxRequest", None)
_ASKS_FOR_SUMS: dict[str, Any] = {"return_aux": _AUX(lse=True)} if _AUX else {"return_lse": True}


@dataclass(frozen=True, slots=True)
class _Group:
    """Anchors [first, end) with context [low, high) and ``mask`` bool[n*B, (high-low) + n*B]."""

    first: int
    end: int
    low: int
    high: int
    mask: Tensor


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What attends to what in one batch; built once and used by every layer with that sight.
    Exactly one of ``groups``, ``blocks`` is used.
    """

    backend: Backend
    block_size: int
    groups: tuple[_Group, ...]
    blocks: BlockMask | None

    @classmethod
    def build(
        cls,
        doc: Tensor,
        anchors: Tensor,
        anchor_valid: Tensor,
        block_size: int,
        backend: Backend = "sdpa",
        sight: Sight = WHOLE,
        *,
        before: int = 0,
        group_tokens: int = GROUP_TOKENS,
        tables: Tables | None = None,
    ) -> AttentionPlan:
        """Build it from ``doc`` int[S], ``anchors`` int64[A] and ``anchor_valid`` bool[A], all on
        one device. ``before``: a block's context ends so many tokens before its anchor.
        ``tables``: those of the flex mask, if they were made already.
        """
        if backend == "flex" and tables is not None:
            mask = _flex_mask(tables, doc.shape[0], block_size, sight)
            return cls(backend, block_size, (), mask)
        start, limit = context_interval(doc, anchors, anchor_valid)
        if before:
            limit = torch.maximum(start, limit - before)
        if backend == "flex":
            blocks = (
                _flex_mask(
                    mask_tables(start, limit, doc.shape[0], block_size, sight),
                    doc.shape[0],
                    block_size,
                    sight,
                )
                if anchors.shape[0]
                else None
            )
            return cls(backend, block_size, (), blocks)
        groups = _sdpa_groups(start, limit, block_size, sight, group_tokens)
        return cls(backend, block_size, groups, None)


def context_interval(doc: Tensor, anchors: Tensor, anchor_valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return the context ``[start, limit)`` that each block sees, two int64[A]: its document up to
    its anchor; empty if padding.
    """
    index = torch.arange(doc.shape[0], device=doc.device)
    new = torch.ones_like(doc, dtype=torch.bool)
    new[1:] = doc[1:] != doc[:-1]
    run_start = torch.where(new, index, 0).cummax(0).values
    valid = anchor_valid & (doc[anchors] >= 0)
    return torch.where(valid, run_start[anchors], 0), torch.where(valid, anchors, 0)


def slot_start(start: Tensor, limit: Tensor, block_size: int, sight: Sight) -> Tensor:
    """Return the first context token that each slot sees, int64[A*B], of blocks with context
    ``[start, limit)``, int64[A]; ``limit`` if none.
    """
    out = start.repeat_interleave(block_size)
    if sight.window is None:
        return out
    slot = torch.arange(block_size, device=start.device)
    reach = (limit[:, None] + slot - sight.window + 1).flatten()
    return torch.minimum(torch.maximum(out, reach), limit.repeat_interleave(block_size))


def block_sight(block_size: int, sight: Sight, device: torch.device) -> Tensor:
    """Tell which slots of its own block each slot sees, bool[B, B]."""
    slot = torch.arange(block_size, device=device)
    back = slot[:, None] - slot
    near = back.abs() < (sight.window or block_size)
    return near & (back >= 0) if sight.causal else near


def dense_mask(
    plan_start: Tensor, plan_limit: Tensor, context: int, block_size: int, sight: Sight = WHOLE
) -> Tensor:
    """Return the rule as one matrix, bool[A*B, context + A*B], for tests and for the groups of the
    SDPA path.
    """
    kv = torch.arange(context, device=plan_start.device)
    first = slot_start(plan_start, plan_limit, block_size, sight)
    sees = (kv >= first[:, None]) & (kv < plan_limit.repeat_interleave(block_size)[:, None])
    blocks = torch.eye(plan_start.shape[0], dtype=torch.bool, device=plan_start.device)
    own = torch.kron(blocks, block_sight(block_size, sight, plan_start.device))
    return torch.cat([sees, own], 1)


def block_attention(q: Tensor, keys: Tensor, values: Tensor, plan: AttentionPlan) -> Tensor:
    """Compute softmax(q k^T / sqrt(D)) v over what ``plan`` allows.

    ``q`` [Q, Hq, D], ``keys``/``values`` [S+Q, Hkv, D], the context's first, Q = A*B in anchor
    order.
    Returns [Q, Hq, D] in the dtype of ``q``. Heads are grouped: head i uses key head ``i // (Hq //
    Hkv)``.
    """
    if q.shape[0] == 0:
        return torch.zeros_like(q)
    if plan.backend == "flex":
        return _flex(q, keys, values, plan)
    # Split once: the gradient of each slice is as large as what it was cut from.
    sizes = [(group.end - group.first) * plan.block_size for group in plan.groups]
    k_ctx, *k_blk = keys.split_with_sizes([keys.shape[0] - q.shape[0], *sizes])
    v_ctx, *v_blk = values.split_with_sizes([values.shape[0] - q.shape[0], *sizes])
    parts = []
    for group, own, k, v in zip(plan.groups, q.split_with_sizes(sizes), k_blk, v_blk, strict=True):
        out = F.scaled_dot_product_attention(
            heads_first(own),
            heads_first(torch.cat([k_ctx[group.low : group.high], k])),
            heads_first(torch.cat([v_ctx[group.low : group.high], v])),
            attn_mask=group.mask,
            enable_gqa=q.shape[1] != keys.shape[1],
        )
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def heads_first(x: Tensor) -> Tensor:
    """[n, heads, D] -> [1, heads, n, D]."""
    return x.transpose(0, 1)[None]


def _sdpa_groups(
    start: Tensor, limit: Tensor, block_size: int, sight: Sight, tokens: int
) -> tuple[_Group, ...]:
    """Split the anchors into groups; each group's context is cut to what any of its blocks can
    see.
    """
    count = max(1, tokens // block_size)
    out = []
    for first in range(0, start.shape[0], count):
        s, e = start[first : first + count], limit[first : first + count]
        # Of a block, slot 0 sees furthest back.
        first_seen = slot_start(s, e, block_size, sight)[::block_size]
        seen = e > first_seen
        low = int(first_seen[seen].min()) if bool(seen.any()) else 0
        high = int(e[seen].max()) if bool(seen.any()) else 0
        # Blocks without context keep an empty interval after the shift; clamping keeps the others
        # exact.
        mask = dense_mask(
            (s - low).clamp(min=0), (e - low).clamp(min=0), high - low, block_size, sight
        )
        out.append(_Group(first, min(first + count, start.shape[0]), low, high, mask))
    return tuple(out)


def mask_tables(
    start: Tensor, limit: Tensor, context: int, block_size: int, sight: Sight = WHOLE
) -> dict[str, Tensor]:
    """Return what the rule for flex attention reads, all int32: per query [Q] the context
    ``[first, end)`` and the part ``[own_first, own_end)`` of its block that it sees; per row of
    tiles how many are partly (``count``) and wholly (``count_full``) seen, [R], and which, first,
    [R, C] (``order``, ``order_full``); and the same per column of tiles, for the backward pass
    (``..._back``, [C], [C, R]).

    torch's ``create_block_mask`` evaluates every one of Q x (S+Q) elements to find the tiles; the
    intervals give them directly.
    """
    length = start.shape[0] * block_size
    query = torch.arange(length, device=start.device, dtype=torch.int32)
    own = context + query // block_size * block_size
    near, later = sight.window or block_size, 1 if sight.causal else sight.window or block_size
    some, full = tile_cover(start, limit, context, block_size, sight)
    tiles = {}
    for kind, seen in (("", some & ~full), ("_full", full)):
        tiles["count" + kind], tiles["order" + kind] = _ordered(seen)
        tiles[f"count{kind}_back"], tiles[f"order{kind}_back"] = _ordered(seen.T)
    return {
        "first": slot_start(start, limit, block_size, sight).to(torch.int32),
        "end": limit.repeat_interleave(block_size).to(torch.int32),
        "own_first": torch.maximum(own, context + query - near + 1),
        "own_end": torch.minimum(own + block_size, context + query + later),
    } | tiles


def _flex_mask(tables: Tables, context: int, block_size: int, sight: Sight) -> BlockMask:
    """Return the rule for flex attention: exact per element in ``allowed``, and per tile in the
    tables of ``tile_cover``.
    """
    # One value per query and no division in the kernel: a quarter less time than with one per block
    # (measured, docs/log/2026-11-22-trainer-first-gpu-run.md).
    first, end, own_first, own_end = (
        tables[name] for name in ("first", "end", "own_first", "own_end")
    )

    def allowed(batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        # limit <= context, so an index in the block part never counts as context.
        in_context = (kv_idx >= first[q_idx]) & (kv_idx < end[q_idx])
        in_block = (kv_idx >= own_first[q_idx]) & (kv_idx < own_first[q_idx] + block_size)
        return in_context | in_block

    def allowed_in_sight(batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        in_context = (kv_idx >= first[q_idx]) & (kv_idx < end[q_idx])
        in_block = (kv_idx >= own_first[q_idx]) & (kv_idx < own_end[q_idx])
        return in_context | in_block

    def tiles(name: str) -> Tensor:
        return tables[name][None, None]

    return BlockMask(
        seq_lengths=(first.shape[0], context + first.shape[0]),
        kv_num_blocks=tiles("count"),
        kv_indices=tiles("order"),
        full_kv_num_blocks=tiles("count_full"),
        full_kv_indices=tiles("order_full"),
        q_num_blocks=tiles("count_back"),
        q_indices=tiles("order_back"),
        full_q_num_blocks=tiles("count_full_back"),
        full_q_indices=tiles("order_full_back"),
        BLOCK_SIZE=(TILE, TILE),
        mask_mod=allowed if sight == WHOLE else allowed_in_sight,
    )


@dataclass(frozen=True, slots=True)
class MaskTables:
    """``mask_tables`` of a row for blocks of ``block_size`` tokens, for each of ``sights``: what a
    reader makes beside the row, since a GPU would need a hundred kernels for it.
    """

    block_size: int
    sights: tuple[Sight, ...]

    def __call__(
        self, doc: Tensor, anchors: Tensor, anchor_valid: Tensor
    ) -> tuple[dict[str, Tensor], ...]:
        """Arguments as of ``AttentionPlan.build``."""
        if not anchors.shape[0]:
            return ()
        seen = context_interval(doc, anchors, anchor_valid)
        return tuple(
            mask_tables(*seen, doc.shape[0], self.block_size, sight) for sight in self.sights
        )


def tile_cover(
    start: Tensor, limit: Tensor, context: int, block_size: int, sight: Sight = WHOLE
) -> tuple[Tensor, Tensor]:
    """Tell which tiles of the mask may hold anything (a superset) and which are full.

    ``start``, ``limit`` int64[A] as from ``context_interval``. Two bool[ceil(Q/TILE),
    ceil((context+Q)/TILE)].
    """
    queries = start.shape[0] * block_size
    rows = -(-queries // TILE)
    columns = -(-(context + queries) // TILE)

    def per_tile(values: Tensor, beyond: int) -> Tensor:
        """int64[Q] -> [rows, TILE]; queries past the end get ``beyond``."""
        return F.pad(values, (0, rows * TILE - queries), value=beyond).view(rows, TILE)

    first_seen, end = (
        slot_start(start, limit, block_size, sight),
        limit.repeat_interleave(block_size),
    )
    sees = end > first_seen
    low = per_tile(torch.where(sees, first_seen, context), context).amin(1)[:, None]
    high = per_tile(torch.where(sees, end, 0), 0).amax(1)[:, None]
    latest = per_tile(first_seen, 0).amax(1)[:, None]
    # Rows past the end see nothing and are never read, so they do not keep a tile from being full.
    earliest = per_tile(torch.where(sees, end, 0), context).amin(1)[:, None]
    left = torch.arange(columns, device=start.device) * TILE
    right = left + TILE
    some = (low < right) & (high > left)
    full = (latest <= left) & (earliest >= right)
    first = torch.arange(rows, device=start.device)[:, None] * TILE
    own_low = context + first // block_size * block_size
    own_high = context + ((first + TILE - 1).clamp(max=queries - 1) // block_size + 1) * block_size
    return some | ((own_low < right) & (own_high > left)), full


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Turn bool[rows, columns] into how many columns of each row are set, int32[rows], and which
    they are, first, int32[rows, columns].
    """
    order = tiles.to(torch.int8).contiguous().argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32), order.to(torch.int32)


@cache
def _compiled_flex() -> Callable[..., Any]:
    # Uncompiled flex attention materialises every score; on CUDA only the generated kernel makes
    # sense.
    compiled: Callable[..., Any] = torch.compile(flex_attention)
    return compiled


def _flex(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    out: Tensor = _run_flex(q, k, v, plan)
    return out[0].transpose(0, 1)


def flex_and_sums(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
    """``block_attention`` of a flex plan, and the logarithm of each softmax's denominator,
    float[Q, Hq]: with it, keys that the plan does not know of can be added afterwards.
    """
    out, found = _run_flex(q, k, v, plan, **_ASKS_FOR_SUMS)
    sums: Tensor = found if isinstance(found, Tensor) else found.lse
    return out[0].transpose(0, 1), sums[0].transpose(0, 1)


def _run_flex(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, **asks: Any) -> Any:
    # On the CPU flex has no backward pass: there it only checks the mask against SDPA's.
    run: Any = (
        _compiled_flex() if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
    )
    return run(
        heads_first(q),
        heads_first(k),
        heads_first(v),
        block_mask=plan.blocks,
        enable_gqa=q.shape[1] != k.shape[1],
        **asks,
    )
