"""The training objective of every draft, and its gradients, without a tensor of slots x vocabulary
outliving a chunk.

Legend: N counted slots, H hidden size, V target vocabulary, Vd draft vocabulary, r Markov rank, A
anchors, B slots of a block.

For a slot with draft distribution p_d and target distribution p_t (both softmax, fp32), data token
y and weight ``w = exp(-k / decay)``::

    CE = -log p_d(y)      L1 = sum_v |p_d(v) - p_t(v)| = 2 TV BCE = bce(confidence, 1 - L1/2
                          detached)
    loss = ce * sum(w CE)/D_ce + l1 * sum(w L1)/D_l1 + kl * sum(w KL)/D_l1
           + confidence * sum(w BCE)/D_confidence

The denominators D are passed in, so that the rows of one optimizer step (on any number of ranks)
share one mean.
With a reduced vocabulary p_t stays the softmax over all V and p_d is 0 outside Vd; CE skips labels
outside Vd.

``l1`` weighs L1, ``tv`` weighs TV = L1/2: ``{"ce": 0.1, "l1": 0.9}`` (DeepSpec's objective) equals
``{"ce": 0.1, "tv": 1.8}``, and ``{"ce": 0.1, "tv": 0.9}`` weighs the distance half as much. ``kl``
weighs the divergence of ``objective/kl.py``: L1 hardly moves a slot whose draft is far off, since
its gradient is the draft's own probability times a sign; the divergence does.

Implementation: both softmaxes of a chunk are computed once and give losses, metrics and gradient
together, and the gradient is propagated to h, z and W2 at once. d(L1)/d(logits) = p_d * (s - <s,
p_d>) with s = sign(p_d - p_t). On CUDA a chunk is one Triton kernel (``chunk_kernel.chunk_terms``),
elsewhere plain torch (``chunk_terms``). ``reference_loss`` is the same in plain autograd, for
tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.cache import json_text
from dspark.cache.errors import UsageError
from dspark.train.data.batch import Batch
from dspark.train.objective.kl import add_gradient, divergence
from dspark.train.objective.states import FrozenHead, SlotStates
from dspark.train.ops.scaled import write_scaled

# Logits of a chunk. On CUDA two [chunk, V] tensors live at a time, 1.1 GB in bfloat16 (up to a tile
# of rows more): 1,792 slots of Qwen3's 151,936 tokens, half of 512 blocks of 7. On a CPU a few in
# fp32, and its caches like small ones.
CHUNK_LOGITS = {"cuda": 274_000_000, "cpu": 1 << 23}
# Rows per tile of the GPU's matrix products: a chunk of whole tiles leaves none partly idle, and
# rows with a few slots more or less need buffers of the same size, which the allocator reuses.
TILE_ROWS = {"cuda": 128}

# Whether torch adds a product of bfloat16 matrices to a float32 one on CUDA: seen in 2.11; 2.9
# wants a sum of the matrices' dtype.
ADDS_WIDE = torch.__version__ >= "2.11"

EXAMPLE = '{"ce": 0.1, "kl": 0.3, "l1": 0.6}'  # of --loss-fn, in messages

# Logits of draft and target, the target's row of each slot, draft ids, labels, the scales of CE, L1
# and KL (None: no KL), whether gradients are wanted -> CE, L1, hit, gradient, KL.
ChunkTerms = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor | None, bool],
    tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """Weights of the four terms (``l1`` on L1 = 2 TV) and the decay of slot weights (0 = all slots
    have weight 1).
    """

    ce: float = 0.1
    l1: float = 0.6
    confidence: float = 1.0
    decay: float = 4.0
    kl: float = 0.3

    def __post_init__(self) -> None:
        for name in ("ce", "l1", "confidence", "decay", "kl"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise UsageError(
                    f"objective: {name} is {value}; expected a finite number, 0 or more"
                )
        if self.ce + self.l1 + self.kl == 0:
            raise UsageError("objective: ce, l1 and kl are all 0, so the draft would learn nothing")

    @classmethod
    def from_json(cls, text: str, *, confidence: float = 1.0, decay: float = 4.0) -> Self:
        """Parse ``--loss-fn``: a JSON object with keys ``ce``, ``l1`` or ``tv``, ``kl``; a missing
        key has weight 0.
        """
        try:
            given: Any = json_text.loads(text)
        except ValueError as wrong:
            raise UsageError(f"--loss-fn is not JSON ({wrong}); expected e.g. {EXAMPLE}") from wrong
        if not isinstance(given, dict):
            raise UsageError(f"--loss-fn is {text}; expected a JSON object, e.g. {EXAMPLE}")
        unknown = sorted(set(given) - {"ce", "l1", "tv", "kl"})
        if unknown:
            raise UsageError(
                f"--loss-fn has unknown keys {', '.join(unknown)}; known: ce, l1, tv (= l1 / 2), kl"
            )
        if "l1" in given and "tv" in given:
            raise UsageError(
                "--loss-fn has both l1 and tv; they are the same term (l1 = 2 tv), give only one"
            )
        for key, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UsageError(f"--loss-fn: {key} is {value!r}; expected a number")
        distance = given.get("l1", given.get("tv", 0.0) / 2)
        return cls(
            ce=float(given.get("ce", 0.0)),
            l1=float(distance),
            confidence=confidence,
            decay=decay,
            kl=float(given.get("kl", 0.0)),
        )


def slot_weights(block_size: int, decay: float, device: torch.device | str = "cpu") -> Tensor:
    """Return ``exp(-k / decay)`` of every slot, float32[B]; ones if ``decay`` is 0. Made on
    ``device``, since a copy would wait for it.
    """
    if decay == 0:
        return torch.ones(block_size, device=device)
    return torch.exp(-torch.arange(block_size, dtype=torch.float32, device=device) / decay)


@dataclass(frozen=True, slots=True)
class Denominators:
    """The sums of weights that each term is divided by; add them over all rows (and ranks) of a
    step.
    """

    ce: float
    l1: float
    confidence: float

    def __add__(self, other: Denominators) -> Denominators:
        return Denominators(
            self.ce + other.ce, self.l1 + other.l1, self.confidence + other.confidence
        )

    @classmethod
    def of(cls, batch: Batch, decay: float, to_draft: Tensor | None = None) -> Denominators:
        """Compute those of one row; cheap, without a model. Call it on the CPU batch, before the
        row is moved.
        """
        weight = slot_weights(batch.block_size, decay, batch.counted.device) * batch.counted
        total = float(weight.sum(dtype=torch.float64))
        if to_draft is None:
            return cls(total, total, total)
        known = to_draft.to(batch.label_ids.device)[batch.label_ids] >= 0
        return cls(float((weight * known).sum(dtype=torch.float64)), total, total)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of ``slots`` and their run of ``rows`` of ``SlotInputs.target``; never more rows than
    slots.
    """

    slots: slice
    rows: slice


@dataclass(frozen=True, slots=True)
class SlotInputs:
    """The counted slots of a row: ``h`` [N, H], ``z`` [N, r] and ``w2`` [Vd, r] or None,
    ``confidence`` logits [N] or None, ``target`` [D, H] last states after the target's final norm,
    ``labels`` int64[N] target ids, ``weight`` [N].

    Slot i is compared with row ``target_at[i]`` of ``target``, int64[N], increasing by 0 or 1;
    ``target_at_host`` is the same on the CPU (it may be omitted if ``target_at`` is on the CPU
    already). Without ``target_at`` each slot has its own row, D = N.
    """

    h: Tensor
    z: Tensor | None
    w2: Tensor | None
    confidence: Tensor | None
    target: Tensor
    labels: Tensor
    weight: Tensor
    target_at: Tensor | None = None
    target_at_host: Tensor | None = None

    @classmethod
    def gather(cls, batch: Batch, states: SlotStates, decay: float) -> SlotInputs:
        """Gather the slots that count, so that no logits are computed for the others."""
        # index_select, not [at]: no slot occurs twice, and the backward pass of [at] sorts the
        # indices to sum duplicates.
        at = batch.slots
        weight = slot_weights(batch.block_size, decay, at.device)
        return cls(
            h=states.h.flatten(0, 1).index_select(0, at),
            z=None if states.z is None else states.z.flatten(0, 1).index_select(0, at),
            w2=states.w2,
            confidence=None
            if states.confidence is None
            else states.confidence.flatten().index_select(0, at),
            target=batch.last[batch.target_rows],
            labels=batch.label_ids.flatten()[at],
            weight=weight[at % batch.block_size],
            target_at=batch.target_at,
            target_at_host=batch.target_at_host,
        )

    def chunks(self, rows: int) -> list[Chunk]:
        """Yield all slots, ``rows`` at a time. Nothing here waits for the device."""
        count = self.labels.shape[0]
        at = self.target_at if self.target_at_host is None else self.target_at_host
        at = torch.arange(count) if at is None else at
        assert at.device.type == "cpu", (
            "reading target_at would wait for the device: give target_at_host"
        )
        starts = list(range(0, count, rows))
        ends = [min(start + rows, count) for start in starts]
        firsts, lasts = at[starts].tolist(), at[[end - 1 for end in ends]].tolist()
        return [
            Chunk(slice(start, end), slice(first, last + 1))
            for start, end, first, last in zip(starts, ends, firsts, lasts, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class ObjectiveOutput:
    """``loss`` carries gradients. The rest is detached, one value per slot [N]: ``ce`` (0 where the
    label is outside Vd), ``l1``, ``kl`` (None if its weight is 0), ``confidence`` BCE and
    ``confidence_probability`` (None without the head), ``hit`` = draft's argmax is the target's,
    and ``ce_known`` = CE counts.
    """

    loss: Tensor
    ce: Tensor
    l1: Tensor
    confidence: Tensor | None
    confidence_probability: Tensor | None
    hit: Tensor
    ce_known: Tensor
    kl: Tensor | None = None

    @property
    def accept(self) -> Tensor:
        """Return the probability that the slot's token is accepted, ``1 - L1/2`` in [0, 1], [N]."""
        return (1 - 0.5 * self.l1).clamp(0, 1)


def objective(
    slots: SlotInputs,
    head: FrozenHead,
    config: ObjectiveConfig,
    denominators: Denominators,
    *,
    chunk_rows: int | None = None,
    terms: ChunkTerms | None = None,
) -> ObjectiveOutput:
    """Return the loss of one row's share of a step. Products run in the dtype of ``head.lm_head``,
    softmax and sums in fp32.

    ``chunk_rows`` slots at a time, by default ``chunk_rows_for`` them, in chunks of nearly equal
    size. ``terms`` replaces the work on a chunk (default: Triton on CUDA, plain torch elsewhere).
    """
    dtype, wide = head.lm_head.dtype, _wide(slots.h.dtype)
    device, count = slots.h.device.type, slots.h.shape[0]
    rows = (
        _even(count, chunk_rows)
        if chunk_rows
        else chunk_rows_for(count, head.lm_head.shape[0], device)
    )
    labels = slots.labels if head.to_draft is None else head.to_draft[slots.labels]
    weight = slots.weight.to(wide)
    known = labels >= 0
    scale_ce = weight * known * (config.ce / max(denominators.ce, 1e-12))
    scale_l1 = weight * (config.l1 / max(denominators.l1, 1e-12))
    scale_kl = weight * (config.kl / max(denominators.l1, 1e-12)) if config.kl else None
    x = slots.h.to(dtype)
    loss, ce, l1, hit, kl = _ChunkedTerms.apply(  # type: ignore[no-untyped-call]
        x if slots.z is None else torch.cat([x, slots.z.to(dtype)], 1),
        None if slots.w2 is None else slots.w2.to(dtype),
        slots.target.to(dtype),
        slots.target_at,
        slots.chunks(rows),
        rows,
        head,
        labels,
        scale_ce,
        scale_l1,
        torch.is_grad_enabled(),
        terms or _terms_for(device, wide),
        scale_kl,
    )
    bce = probability = None
    if slots.confidence is not None:
        accept = (1 - 0.5 * l1).clamp(0, 1)
        term = F.binary_cross_entropy_with_logits(
            slots.confidence.to(wide), accept, reduction="none"
        )
        loss = (
            loss + (config.confidence / max(denominators.confidence, 1e-12)) * (weight * term).sum()
        )
        bce, probability = term.detach(), slots.confidence.detach().to(wide).sigmoid()
    return ObjectiveOutput(loss, ce, l1, bce, probability, hit, known, kl if config.kl else None)


def chunk_rows_for(count: int, vocab_size: int, device: str) -> int:
    """Return the slots per chunk: ``count`` slots in the fewest equal chunks that ``CHUNK_LOGITS``
    allows, in whole tiles of the device.
    """
    rows = _even(count, max(1, CHUNK_LOGITS.get(device, CHUNK_LOGITS["cpu"]) // vocab_size))
    tile = TILE_ROWS.get(device, 1)
    return -(-rows // tile) * tile


def _even(count: int, most: int) -> int:
    """Return the size of all chunks but the last when ``count`` is cut into as few as ``most``
    allows.
    """
    return max(1, -(-count // max(1, -(-count // most))))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _terms_for(device: str, wide: torch.dtype) -> ChunkTerms:
    """Choose Triton on CUDA, except for float64, which the kernel would narrow."""
    if device != "cuda" or wide == torch.float64:
        return chunk_terms
    from dspark.train.objective import chunk_kernel as fused

    return fused.chunk_terms


def plus_product(total: Tensor | None, a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """``total`` [m, n] in ``wide``, changed in place, plus ``a @ b`` of [m, k] and [k, n]; without
    it the product alone.

    On CUDA the product accumulates in ``wide`` without rounding first: a separate, vocabulary-sized
    product would be written in ``a``'s dtype, read again and added in another pass.
    """
    if a.is_cuda and a.dtype != wide and ADDS_WIDE:
        if total is None:
            return torch.mm(a, b, out_dtype=wide)
        return torch.addmm(total, a, b, out_dtype=wide, out=total)
    product = a @ b
    return product.to(wide) if total is None else total.add_(product)


def chunk_terms(
    draft: Tensor,
    target: Tensor,
    target_at: Tensor,
    draft_ids: Tensor | None,
    labels: Tensor,
    scale_ce: Tensor,
    scale_l1: Tensor,
    scale_kl: Tensor | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Compute, from logits ``draft`` [n, Vd] and ``target`` [d, V] of a chunk, with slot i compared
    with row ``target_at[i]`` int64[n]: CE [n], L1 [n], hit [n], d(loss)/d(draft logits) [n, Vd]
    unless only values are wanted, KL [n] if it has a scale. ``labels`` int64[n] are rows of the
    draft's vocabulary, -1 outside it.
    """
    target = target[target_at]
    wide = _wide(draft.dtype)
    logits = draft.to(wide)
    log_z = logits.logsumexp(-1, keepdim=True)
    log_p = logits - log_z
    p = log_p.exp()
    q = target.to(wide).softmax(-1)
    best_draft, best_target = logits.argmax(-1), target.argmax(-1)
    inside = q if draft_ids is None else q[:, draft_ids]
    kl = None if scale_kl is None else divergence(inside, log_p)
    difference = p - inside
    l1 = difference.abs().sum(-1)
    if draft_ids is not None:
        # Probability that the target gives to tokens the draft cannot produce is lost whatever the
        # draft does.
        l1 = l1 + (1 - inside.sum(-1)).clamp(min=0)
        best_draft = draft_ids[best_draft]
    ce = log_z[:, 0] - logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    ce = torch.where(labels >= 0, ce, 0)
    if not with_gradient:
        return ce, l1, best_draft == best_target, None, kl
    sign = difference.sign()
    mean_sign = (p * sign).sum(-1, keepdim=True)
    gradient = p * (scale_l1[:, None] * (sign - mean_sign) + scale_ce[:, None])
    # scale_ce is 0 where the label is unknown, so column 0 stays unchanged there.
    gradient.scatter_add_(1, labels.clamp(min=0)[:, None], -scale_ce[:, None])
    if scale_kl is not None:
        add_gradient(gradient, p, inside, scale_kl)
    return ce, l1, best_draft == best_target, gradient.to(draft.dtype), kl


class _ChunkedTerms(torch.autograd.Function):
    """``sum(scale_ce * CE + scale_l1 * L1 + scale_kl * KL)``; gradients are computed in the
    forward pass, and the backward pass only scales them.

    ``x`` [N, K] is [h | z], K = H + r, with a Markov head and h alone without (``w2`` None): the
    draft's logits are one product with [head | W2], and d_x one product with their gradient. A
    separate product would read and write (or read) all [n, Vd] once more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w2: Tensor | None,
        target: Tensor,
        target_at: Tensor | None,
        chunks: list[Chunk],
        rows: int,
        head: FrozenHead,
        labels: Tensor,
        scale_ce: Tensor,
        scale_l1: Tensor,
        with_gradient: bool,
        terms: ChunkTerms,
        scale_kl: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        count, wide = x.shape[0], scale_ce.dtype
        ce, l1 = x.new_empty(count, dtype=wide), x.new_empty(count, dtype=wide)
        kl = x.new_zeros(0 if scale_kl is None else count, dtype=wide)
        hit = torch.empty(count, dtype=torch.bool, device=x.device)
        matrix = head.draft_head if w2 is None else head.with_markov(w2)  # [Vd, K]
        hidden = head.draft_head.shape[1]
        d_x = torch.empty_like(x) if with_gradient else None
        # Chunks accumulate in fp32: in bf16 the sum of many small parts would stop growing.
        d_w2 = None
        if target_at is None:
            target_at = torch.arange(count, device=x.device)
        # Allocated once and used by every chunk: otherwise the last chunk's buffers would live
        # beside the next one's.
        draft_buffer = x.new_empty(rows, matrix.shape[0])
        target_buffer = x.new_empty(rows, head.lm_head.shape[0])
        for chunk in chunks:
            part = chunk.slots
            logits = torch.mm(x[part], matrix.T, out=draft_buffer[: part.stop - part.start])
            theirs = head.target_logits(
                target[chunk.rows], target_buffer[: chunk.rows.stop - chunk.rows.start]
            )
            ce[part], l1[part], hit[part], gradient, divergence = terms(
                logits,
                theirs,
                target_at[part] - chunk.rows.start,
                head.draft_ids,
                labels[part],
                scale_ce[part],
                scale_l1[part],
                None if scale_kl is None else scale_kl[part],
                with_gradient,
            )
            if divergence is not None:
                kl[part] = divergence
            if gradient is None:
                continue
            assert d_x is not None
            torch.mm(gradient, matrix, out=d_x[part])
            if w2 is not None:
                d_w2 = plus_product(d_w2, gradient.T, x[part, hidden:], wide)
        if with_gradient and w2 is not None and d_w2 is None:
            d_w2 = torch.zeros_like(w2, dtype=wide)  # no slot at all
        if with_gradient:
            ctx.save_for_backward(d_x, d_w2)
        ctx.w2_dtype = None if w2 is None else w2.dtype
        ctx.mark_non_differentiable(ce, l1, hit, kl)
        loss = (scale_ce * ce + scale_l1 * l1).sum()
        return loss if scale_kl is None else loss + (scale_kl * kl).sum(), ce, l1, hit, kl

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        d_x, d_w2 = ctx.saved_tensors
        if d_w2 is not None:
            # Scaled and rounded in one pass: in fp32 this is the largest tensor here after the
            # logits.
            d_w2 = write_scaled(torch.empty_like(d_w2, dtype=ctx.w2_dtype), d_w2, grad)
        return d_x * grad.to(d_x.dtype), d_w2, *(None,) * 11


def reference_loss(
    slots: SlotInputs, head: FrozenHead, config: ObjectiveConfig, denominators: Denominators
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the same loss in plain autograd, all slots at once, in the dtype of the inputs:
    ``(loss, CE [N], L1 [N])``.

    Written from the formulas above, with the draft's distribution spread over all V; it shares no
    code with ``objective``. For tests: it keeps several [N, V] tensors.
    """
    logits = slots.h @ head.draft_head.T
    if slots.z is not None:
        assert slots.w2 is not None
        logits = logits + slots.z @ slots.w2.T
    if head.draft_ids is not None:
        spread = logits.new_full((logits.shape[0], head.lm_head.shape[0]), -torch.inf)
        logits = spread.index_copy(1, head.draft_ids, logits)
    target = slots.target if slots.target_at is None else slots.target[slots.target_at]
    p_target = head.target_logits(target).softmax(-1)
    l1 = (logits.softmax(-1) - p_target).abs().sum(-1)
    ce = -logits.log_softmax(-1).gather(1, slots.labels[:, None])[:, 0]
    ce = torch.where(ce.isinf(), 0, ce)
    loss = config.ce * (slots.weight * ce).sum() / denominators.ce
    loss = loss + config.l1 * (slots.weight * l1).sum() / denominators.l1
    if config.kl:
        p_draft = logits.softmax(-1)
        pairs = p_target * (p_target / torch.where(p_draft > 0, p_draft, 1)).log()
        loss = (
            loss
            + config.kl
            * (slots.weight * pairs.where(p_draft > 0, 0).sum(-1)).sum()
            / denominators.l1
        )
    if slots.confidence is not None:
        goal = 1 - 0.5 * l1.detach()
        likelihood = goal * F.logsigmoid(slots.confidence) + (1 - goal) * F.logsigmoid(
            -slots.confidence
        )
        loss = (
            loss - config.confidence * (slots.weight * likelihood).sum() / denominators.confidence
        )
    return loss, ce, l1
