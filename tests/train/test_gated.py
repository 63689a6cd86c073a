"""The gate of a layer: value and gradient against autograd of the formula, and the kernel in
Triton's interpreter.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dspark.train.ops.gated import gated, gradient, plain_gradient
from interpreted import interpreted


def formula(joint: Tensor) -> Tensor:
    up, gate = joint.chunk(2, 1)
    return F.silu(gate) * up


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 9), size=st.integers(1, 9), scale=st.sampled_from([0.1, 1.0, 30.0, 1e3]))
def test_value_and_gradient_are_those_of_the_formula(n: int, size: int, scale: float) -> None:
    joint = (scale * torch.randn(n, 2 * size, dtype=torch.float64)).requires_grad_()
    grad = torch.randn(n, size, dtype=torch.float64)
    ours, plain = gated(joint), formula(joint)
    assert torch.equal(ours, plain)
    for a, b in zip(
        torch.autograd.grad(ours, joint, grad), torch.autograd.grad(plain, joint, grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_bfloat16_is_rounded_once() -> None:
    joint, grad = torch.randn(50, 64).bfloat16(), torch.randn(50, 32).bfloat16()
    assert torch.equal(gated(joint), formula(joint))
    wide = joint.float().requires_grad_()
    (want,) = torch.autograd.grad(formula(wide), wide, grad.float())
    got = plain_gradient(grad, joint)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operation_is_registered_as_torch_wants_it(dtype: torch.dtype) -> None:
    torch.library.opcheck(
        torch.ops.dspark.gated_gradient.default,
        (torch.randn(5, 4, dtype=dtype), torch.randn(5, 8, dtype=dtype)),
    )
    assert gradient(torch.randn(5, 4, dtype=dtype), torch.randn(5, 8, dtype=dtype)).shape == (5, 8)


def test_kernel_equals_plain() -> None:
    rows = interpreted(Path(__file__).with_name("gated_cases.py"))
    assert len(rows) == 24
    for row in rows:
        # The interpreter cuts bfloat16 off where the GPU rounds.
        assert row["off"] < (2**-7 if row["dtype"] == "torch.bfloat16" else 1e-4), row
