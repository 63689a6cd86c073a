"""Markov and confidence heads: the formulas slot by slot against the vectorised form, and ``step``
against ``latent``.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dspark.train.draft.heads import (
    ConfidenceHead,
    GatedMarkovHead,
    MarkovHead,
    RnnMarkovHead,
    build_markov_head,
)

H, R, V, VD = 5, 3, 11, 7


def make(kind: str) -> MarkovHead:
    torch.manual_seed(1)
    return build_markov_head(
        kind, vocab_size=V, draft_vocab_size=VD, rank=R, hidden_size=H
    ).double()


def expected_bias(head: MarkovHead, h: Tensor, prev: Tensor) -> Tensor:
    """[B, VD] of one block, from the formulas, one slot and one matrix product at a time."""
    w1, w2 = head.markov_w1.weight, head.markov_w2.weight
    state, rows = torch.zeros(R, dtype=torch.float64), []
    for k in range(prev.numel()):
        e = w1[prev[k]]
        if isinstance(head, GatedMarkovHead):
            inputs = torch.cat([h[k], e])
            z = 1 / (1 + torch.exp(-(head.gate_proj.weight @ inputs + head.gate_proj.bias))) * e
        elif isinstance(head, RnnMarkovHead):
            joint = head.joint_proj.weight @ torch.cat([state, e, h[k]]) + head.joint_proj.bias
            g = 1 / (1 + torch.exp(-joint[:R]))
            z = torch.tanh(joint[2 * R :])
            state = g * state + (1 - g) * torch.tanh(joint[R : 2 * R])
        else:
            z = e
        rows.append(w2 @ z)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_bias_by_formula_and_by_step(kind: str) -> None:
    head = make(kind)
    torch.manual_seed(2)
    h, prev = torch.randn(4, 6, H, dtype=torch.float64), torch.randint(0, V, (4, 6))
    z = head.latent(h, head.embed(prev))
    assert z.shape == (4, 6, R)
    bias = z @ head.markov_w2.weight.T
    for block in range(4):
        torch.testing.assert_close(bias[block], expected_bias(head, h[block], prev[block]))
    state = head.initial_state(h[:, 0])
    for k in range(6):
        one, state = head.step(h[:, k], head.embed(prev[:, k]), state)
        torch.testing.assert_close(one, z[:, k])


def test_rnn_carries_history() -> None:
    head = make("rnn")
    h, prev = torch.zeros(1, 3, H, dtype=torch.float64), torch.tensor([[1, 2, 3]])
    other = torch.tensor([[9, 2, 3]])
    z, changed = head.latent(h, head.embed(prev)), head.latent(h, head.embed(other))
    assert not torch.allclose(z[0, 2], changed[0, 2])
    gated = make("gated")
    torch.testing.assert_close(
        gated.latent(h, gated.embed(prev))[0, 2], gated.latent(h, gated.embed(other))[0, 2]
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(50,), (4, 6), (0, 3)])
def test_gradient_of_the_embedding_is_the_plain_ones(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Rows that are taken often, once and never."""
    head = make("vanilla").to(dtype)
    prev = torch.randint(0, V - 1, shape)
    e, plain = head.embed(prev), head.markov_w1(prev)
    assert torch.equal(e, plain)
    grad = torch.randn(e.shape, dtype=dtype)
    (got,) = torch.autograd.grad(e, head.markov_w1.weight, grad)
    want = torch.zeros(V, R, dtype=torch.float64).index_add_(
        0, prev.flatten(), grad.flatten(0, -2).double()
    )
    assert got.dtype == dtype
    torch.testing.assert_close(
        got, want.to(dtype), rtol=1e-12 if dtype == torch.float64 else 2**-8, atol=1e-6
    )
    assert not got[V - 1].any()


def test_gradients_of_confidence_are_those_of_a_product() -> None:
    head = ConfidenceHead(H, R).double()
    h, e = (torch.randn(4, 6, n, dtype=torch.float64, requires_grad=True) for n in (H, R))
    leaves = [h, e, head.proj.weight, head.proj.bias]
    grad = torch.randn(4, 6, dtype=torch.float64)
    plain = head.proj(torch.cat([h, e], -1)).squeeze(-1)
    for a, b in zip(
        torch.autograd.grad(head(h, e), leaves, grad),
        torch.autograd.grad(plain, leaves, grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_confidence_with_and_without_the_previous_token() -> None:
    h, e = torch.randn(4, H), torch.randn(4, R)
    head = ConfidenceHead(H, R)
    want = torch.cat([h, e], 1) @ head.proj.weight[0] + head.proj.bias
    torch.testing.assert_close(head(h, e), want)
    plain = ConfidenceHead(H, 0)
    torch.testing.assert_close(plain(h, None), h @ plain.proj.weight[0] + plain.proj.bias)
    assert plain.to(torch.bfloat16)(h.bfloat16(), None).dtype == torch.float32
