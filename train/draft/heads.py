"""The sequential part of a DSpark draft: Markov heads, which make a slot depend on the token before
it, and confidence.

Legend: A anchors, B slots, H hidden size, V target vocabulary, Vd draft vocabulary, r Markov rank,
e = W1[previous token].

Every head turns (h_k, e) into a latent ``z[..., r]`` with logit bias ``z W2^T``; the objective sees
only z and W2 and multiplies them chunk by chunk, so no vocabulary-sized bias is kept. Formulas:
DSpark paper and DeepSpec. ``latent`` is the teacher-forced form over whole blocks, ``step`` the
same for one slot while decoding. Only the vanilla head is implemented by vLLM.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Rows(torch.autograd.Function):
    """``weight[ids]``: [V, r] and int64[...] -> [..., r].

    Its gradient is summed in fp32 (at least), like a plain embedding's on CUDA, but only for the
    rows that were used: a compiler would materialise the whole [V, r] in fp32 and round all of it,
    0.4 GB of traffic for a few thousand rows of Qwen3's vocabulary.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.count = weight.shape[0]
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ids = ctx.saved_tensors[0].flatten()
        grad = grad.reshape(ids.shape[0], grad.shape[-1])
        wide = torch.promote_types(grad.dtype, torch.float32)
        # Any one of those that used the same row: the sum is accumulated in its place, and all of
        # them write it.
        order = torch.arange(ids.shape[0], device=ids.device)
        place = ids.new_empty(ctx.count).index_put((ids,), order)[ids]
        sums = torch.zeros_like(grad, dtype=wide).index_add(0, place, grad.to(wide))
        return grad.new_zeros(ctx.count, grad.shape[1]).index_put(
            (ids,), sums[place].to(grad.dtype)
        ), None


class MarkovHead(nn.Module):
    """Vanilla: ``z = e``, so the bias is ``W2 W1[t]``. Base of the other heads, which compute
    another z.
    """

    def __init__(self, vocab_size: int, draft_vocab_size: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, draft_vocab_size, bias=False)

    def embed(self, prev: Tensor) -> Tensor:
        """``W1[prev]``: int64[...] -> [..., r]."""
        out: Tensor = _Rows.apply(self.markov_w1.weight, prev)  # type: ignore[no-untyped-call]
        return out

    def latent(self, h: Tensor, e: Tensor) -> Tensor:
        """Return z[A, B, r] of whole blocks from ``h`` [A, B, H] and ``e`` [A, B, r]."""
        return e

    def initial_state(self, h: Tensor) -> Tensor | None:
        """Return what ``step`` carries from slot to slot, for blocks whose first state is ``h``
        [..., H].
        """
        return None

    def step(self, h: Tensor, e: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return z[..., r] and the next state of one slot: ``h`` [..., H], ``e`` [..., r]."""
        return self.latent(h, e), state


class GatedMarkovHead(MarkovHead):
    """``z = sigmoid(Linear([h_k; e])) * e``: the backbone says how much of each transition
    direction applies.
    """

    def __init__(self, vocab_size: int, draft_vocab_size: int, rank: int, hidden_size: int) -> None:
        super().__init__(vocab_size, draft_vocab_size, rank)
        self.gate_proj = nn.Linear(hidden_size + rank, rank)

    def latent(self, h: Tensor, e: Tensor) -> Tensor:
        gate: Tensor = self.gate_proj(torch.cat([h, e], -1))
        return torch.sigmoid(gate) * e


class RnnMarkovHead(MarkovHead):
    """``(g, c, o) = Linear([s; e; h_k])``, ``s' = sig(g) s + (1 - sig(g)) tanh(c)``, ``z =
    tanh(o)``, ``s_0 = 0``.
    """

    def __init__(self, vocab_size: int, draft_vocab_size: int, rank: int, hidden_size: int) -> None:
        super().__init__(vocab_size, draft_vocab_size, rank)
        self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank)

    def initial_state(self, h: Tensor) -> Tensor:
        return h.new_zeros(*h.shape[:-1], self.rank)

    def step(self, h: Tensor, e: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert state is not None, "an rnn head starts from initial_state"
        joint: Tensor = self.joint_proj(torch.cat([state, e, h], -1))
        gate, candidate, out = joint.chunk(3, -1)
        keep = torch.sigmoid(gate)
        return torch.tanh(out), keep * state + (1 - keep) * torch.tanh(candidate)

    def latent(self, h: Tensor, e: Tensor) -> Tensor:
        state: Tensor | None = self.initial_state(h[..., 0, :])
        out = []
        for k in range(h.shape[-2]):
            z, state = self.step(h[..., k, :], e[..., k, :], state)
            out.append(z)
        return torch.stack(out, -2)


def build_markov_head(
    kind: str, *, vocab_size: int, draft_vocab_size: int, rank: int, hidden_size: int
) -> MarkovHead:
    """Build the head that a ``DraftConfig`` names."""
    if kind == "vanilla":
        return MarkovHead(vocab_size, draft_vocab_size, rank)
    if kind == "gated":
        return GatedMarkovHead(vocab_size, draft_vocab_size, rank, hidden_size)
    assert kind == "rnn", f"markov_head_type {kind!r} passed DraftConfig"
    return RnnMarkovHead(vocab_size, draft_vocab_size, rank, hidden_size)


class ConfidenceHead(nn.Module):
    """Logit of the probability that a slot's token is accepted: ``Linear([h_k; e] or h_k -> 1)``,
    in fp32 as vLLM does.
    """

    def __init__(self, hidden_size: int, rank: int) -> None:
        """``rank`` 0 omits the previous token's embedding."""
        super().__init__()
        self.with_markov = rank > 0
        self.proj = nn.Linear(hidden_size + rank, 1)

    def forward(self, h: Tensor, e: Tensor | None) -> Tensor:
        """``h`` [..., H] (and ``e`` [..., r]) -> logits [...], fp32 (fp64 if the weights are)."""
        wide = torch.promote_types(self.proj.weight.dtype, torch.float32)
        weight, bias = self.proj.weight[0].to(wide), self.proj.bias.to(wide)
        # Sums, not a product with one column: a compiler computes them from h and e directly, while
        # a product needs [h; e] in fp32, and its gradient too.
        logits = (h.to(wide) * weight[: h.shape[-1]]).sum(-1)
        if self.with_markov:
            assert e is not None
            logits = logits + (e.to(h.dtype).to(wide) * weight[h.shape[-1] :]).sum(-1)
        return logits + bias
