"""Norms, RoPE and joining in one operation: value and gradient against autograd of the formula, and
the kernels in Triton's interpreter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dspark.train.draft.layers import RMSNorm
from dspark.train.ops.qk_norm_rope import Inputs, plain_gradient, qk_norm_rope
from dspark.train.ops.rope import Turning, rope_tables
from interpreted import interpreted

EPS = 1e-3


def inputs(
    s: int, q: int, n: int, m: int, dim: int, dtype: torch.dtype = torch.float64
) -> list[Any]:
    """Arguments of ``qk_norm_rope`` for ``s`` and ``q`` rows of ``n`` query and ``m`` key heads."""
    tensors = [
        torch.randn(s, 2 * m * dim),
        torch.randn(q, (2 * m + n) * dim),
        torch.randn(dim),
        torch.randn(dim),
    ]
    ropes = [
        rope_tables(torch.randint(0, 5000, (rows,)), Turning(dim, 1e4), dtype) for rows in (s, q)
    ]
    return [*(t.to(dtype).requires_grad_() for t in tensors), EPS, *ropes]


def formula(
    context: Tensor, blocks: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, *ropes: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs (i, i + D/2) of what the norm gives as complex numbers, turned by the angle of cos and
    sin.
    """

    def turned(x: Tensor, weight: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        normed = weight * (x / (x.square().sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt())
        z = torch.complex(*normed.chunk(2, -1)) * torch.complex(*rope)
        return torch.cat([z.real, z.imag], -1)

    dim, m = q_weight.shape[0], context.shape[1] // q_weight.shape[0] // 2
    two = context.unflatten(1, (-1, dim))
    three = blocks.unflatten(1, (-1, dim))
    keys = [
        turned(x[:, m : 2 * m], k_weight, rope) for x, rope in zip((two, three), ropes, strict=True)
    ]
    q = turned(three[:, 2 * m :], q_weight, ropes[1])
    return q, torch.cat(keys), torch.cat([two[:, :m], three[:, :m]])


@settings(max_examples=40, deadline=None)
@given(
    s=st.integers(0, 5),
    q=st.integers(0, 5),
    n=st.integers(1, 5),
    m=st.integers(1, 4),
    half=st.integers(1, 5),
)
def test_value_and_gradient_are_those_of_the_formula(
    s: int, q: int, n: int, m: int, half: int
) -> None:
    args = inputs(s, q, n, m, 2 * half)
    ours, want = qk_norm_rope(Inputs(*args)), formula(*args)
    assert [x.shape for x in ours] == [(q, n, 2 * half), (s + q, m, 2 * half), (s + q, m, 2 * half)]
    probes = [torch.randn_like(x) for x in want]
    both = [torch.autograd.grad(outs, args[:4], probes) for outs in (ours, want)]
    for a, b in zip([*ours, *both[0]], [*want, *both[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_a_head_by_hand() -> None:
    """q = (3, 4) with unit weights and no eps: rms^2 = 12.5; a quarter turn takes (a, b) to (-b,
    a). v is as it was.
    """
    one, quarter = torch.ones(2), (torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    blocks = torch.tensor([[7.0, 8.0, 0.0, 2.0, 3.0, 4.0]])
    none = torch.zeros(0, 1, 1)
    weights = one, torch.tensor([5.0, 3.0])
    q, k, v = qk_norm_rope(Inputs(torch.zeros(0, 4), blocks, *weights, 0.0, (none, none), quarter))
    torch.testing.assert_close(q, torch.tensor([[[-4.0, 3.0]]]) / 12.5**0.5)
    torch.testing.assert_close(k, torch.tensor([[[-3 * 2**0.5, 0.0]]]))
    assert torch.equal(v, torch.tensor([[[7.0, 8.0]]]))


def test_step_by_step_is_the_same() -> None:
    """The draft's own norm, and slices of memory of a wider row."""
    args = inputs(6, 4, 4, 2, 16, torch.float32)
    norm = RMSNorm(16, EPS)
    with torch.no_grad():
        norm.weight.copy_(args[3])
        memory = torch.randn(6, 2 * 2 * 16 + 5)
        k = norm(memory[:, 32:64].unflatten(1, (2, 16)))
        cos, sin = args[5]
        want = torch.cat(
            [k[..., :8] * cos - k[..., 8:] * sin, k[..., 8:] * cos + k[..., :8] * sin], -1
        )
        got = qk_norm_rope(Inputs(memory[:, :64], *args[1:]))[1]
    torch.testing.assert_close(got[:6], want)


def test_bfloat16_is_rounded_once() -> None:
    args = inputs(20, 30, 4, 2, 16, torch.bfloat16)
    wide = [x.detach().float() if isinstance(x, Tensor) else x for x in args[:5]]
    wide += [tuple(t.float() for t in rope) for rope in args[5:]]
    got, want = qk_norm_rope(Inputs(*args)), qk_norm_rope(Inputs(*wide))
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(got, want, strict=True))
    grads = tuple(torch.randn(x.shape).bfloat16() for x in got)
    ours = plain_gradient(grads, Inputs(*args))  # type: ignore[arg-type]
    theirs = plain_gradient(tuple(g.float() for g in grads), Inputs(*wide))  # type: ignore[arg-type]
    assert [x.dtype for x in ours] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(ours, theirs, strict=True))
    # The weights get theirs in their own dtype.
    dq, dk = torch.autograd.grad(got, args[2:4], grads)
    assert torch.equal(torch.stack([dq, dk]), ours[2].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(3, 4), (0, 4), (3, 0)])
def test_operations_are_registered_as_torch_wants_them(
    dtype: torch.dtype, rows: tuple[int, int]
) -> None:
    *args, context_rope, block_rope = inputs(*rows, 4, 2, 8, dtype)
    given_ = [*args, *context_rope, *block_rope]
    torch.library.opcheck(torch.ops.dspark.qk_norm_rope.default, tuple(given_))
    grads = [
        torch.randn(x.shape).to(dtype)
        for x in qk_norm_rope(Inputs(*args, context_rope, block_rope))
    ]
    plain = [x.detach() if isinstance(x, Tensor) else x for x in given_]
    torch.library.opcheck(torch.ops.dspark.qk_norm_rope_gradient.default, (*grads, *plain))


def test_gradients_are_dense_and_only_the_products_are_kept() -> None:
    args = inputs(6, 4, 4, 2, 8, torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        outs = qk_norm_rope(Inputs(*args))
    assert {t.data_ptr() for t in kept if t.numel() > 8 * 6} == {
        args[0].data_ptr(),
        args[1].data_ptr(),
    }
    for d, x in zip(
        torch.autograd.grad(outs, args[:2], [torch.ones_like(x) for x in outs]), args, strict=False
    ):
        assert d.is_contiguous()
        assert d.shape == x.shape


def test_parts_are_views() -> None:
    context, blocks = torch.arange(2 * 8.0).view(2, 8), torch.arange(3 * 20.0).view(3, 20)
    weight, none = torch.ones(4), torch.ones(0, 1, 2)
    given_ = Inputs(context, blocks, weight, weight, EPS, (none, none), (none, none))
    (v, k), (v_blk, k_blk, q) = given_.heads
    assert [x.shape for x in (v, k, v_blk, k_blk, q)] == [
        (2, 1, 4),
        (2, 1, 4),
        (3, 1, 4),
        (3, 1, 4),
        (3, 3, 4),
    ]
    assert torch.equal(k[1, 0], torch.tensor([12.0, 13.0, 14.0, 15.0]))
    assert torch.equal(q[0, 0], torch.tensor([8.0, 9.0, 10.0, 11.0]))


def test_kernels_equal_plain() -> None:
    rows = interpreted(Path(__file__).with_name("qk_norm_rope_cases.py"))
    assert len(rows) == 2 * 7 * 6
    for row in rows:
        # The interpreter cuts bfloat16 off where the GPU rounds; the weights' gradients are float32
        # in both.
        rounded = "torch.bfloat16" in row["case"] and row["name"] != "d_weights"
        assert row["off"] < (2**-7 if rounded else 1e-4), row


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize(
    ("s", "q", "n", "m", "dim"),
    [(300, 224, 32, 8, 128), (100, 77, 9, 3, 64), (0, 14, 4, 2, 6), (33, 0, 4, 2, 16)],
)
def test_kernels_on_a_gpu(
    s: int, q: int, n: int, m: int, dim: int, dtype: torch.dtype, within: float
) -> None:
    """Norm of the difference from float64 over its own, for each output and gradient that has any
    value.
    """
    given = inputs(s, q, n, m, dim, dtype)

    def moved(x: Any, kind: torch.dtype) -> Any:
        if isinstance(x, tuple):
            return tuple(moved(t, kind) for t in x)
        return (
            x.detach().to("cuda", kind).requires_grad_(x.requires_grad)
            if isinstance(x, Tensor)
            else x
        )

    probes: list[Tensor] = []
    found = []
    for kind in (dtype, torch.float64):
        args = [moved(x, kind) for x in given]
        outs = qk_norm_rope(Inputs(*args))
        probes = probes or [torch.randn_like(x) for x in outs]
        grads = torch.autograd.grad(outs, args[:4], [p.to(kind) for p in probes])
        found.append([x.detach() for x in (*outs, *grads)])
    for ours, exact in zip(*found, strict=True):
        assert float((ours.double() - exact).norm()) <= within * float(exact.norm())
