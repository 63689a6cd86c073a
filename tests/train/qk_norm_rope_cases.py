"""Run by test_qk_norm_rope.py with TRITON_INTERPRET=1: one JSON line a result of a case, the
largest difference from float64, relative to a value of 0.1 or more.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from dspark.train.ops import qk_norm_rope as plain
from dspark.train.ops import qk_norm_rope_kernel as fused
from dspark.train.ops.rope import Turning, rope_tables

NAMES = ("q", "keys", "values", "d_context", "d_blocks", "d_weights")
EPS = 1e-6
fused.PROGRAMS = 3  # so that a program has several rows, and some one less


def laid(x: Tensor, kind: str) -> Tensor:
    """The same gradient, otherwise in memory."""
    if kind == "heads first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "sizes first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x[:, :, :1].expand(x.shape) if kind == "expanded" else x


def case(
    s: int, q: int, heads: int, key_heads: int, dim: int, dtype: torch.dtype, kind: str
) -> None:
    wide = (2 * key_heads + heads) * dim
    # Rows of a wider tensor.
    context = torch.randn(s, 2 * key_heads * dim + 8).to(dtype)[:, :-8]
    blocks = (3 * torch.randn(q, wide + 8)).to(dtype)[:, :-8]
    weights = [(1 + torch.randn(dim) / 2).to(dtype) for _ in range(2)]
    ropes = [rope_tables(torch.randint(0, 9000, (n,)), Turning(dim, 1e4), dtype) for n in (s, q)]
    shapes = [(q, heads, dim), (s + q, key_heads, dim), (s + q, key_heads, dim)]
    grads = tuple(laid(torch.randn(shape).to(dtype), kind) for shape in shapes)
    a, b, c = grads
    given = plain.Inputs(context, blocks, weights[0], weights[1], EPS, ropes[0], ropes[1])
    got = [
        *fused.forward(given),
        *fused.gradient((a, b, c), given),
    ]
    exact = [context.double(), blocks.double(), *(w.double() for w in weights)]
    tables = [(cos.double(), sin.double()) for cos, sin in ropes]
    wider = plain.Inputs(exact[0], exact[1], exact[2], exact[3], EPS, tables[0], tables[1])
    want = [
        *plain.plain(wider),
        *plain.plain_gradient((a.double(), b.double(), c.double()), wider),
    ]
    for name, x, y in zip(NAMES, got, want, strict=True):
        assert x.shape == y.shape
        assert x.is_contiguous()
        assert x.dtype == (torch.float32 if name == "d_weights" else dtype)
        off = ((x.double() - y).abs() / y.abs().clamp(min=0.1)).max().item() if y.numel() else 0.0
        print(
            json.dumps(
                {"case": [s, q, heads, key_heads, dim, str(dtype), kind], "name": name, "off": off}
            )
        )


for dtype in (torch.float32, torch.bfloat16):
    # A part of a tile of heads, whole tiles, more than one and a part; a half that is no power of
    # two; no context; no blocks; neither.
    case(5, 7, 5, 3, 6, dtype, "heads first")
    case(3, 2, 9, 3, 64, dtype, "rows")
    case(2, 4, 20, 8, 128, dtype, "heads first")
    case(4, 3, 1, 1, 2, dtype, "expanded")
    case(0, 5, 4, 2, 16, dtype, "sizes first")
    case(8, 0, 4, 2, 16, dtype, "rows")
    case(0, 0, 4, 2, 16, dtype, "rows")
