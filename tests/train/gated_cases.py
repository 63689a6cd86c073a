"""Run by test_gated.py with TRITON_INTERPRET=1: one JSON line a case, the largest difference from
float64, relative to a value of 0.1 or more.
"""

from __future__ import annotations

import json

import torch

from dspark.train.ops import gated
from dspark.train.ops import gated_kernel as fused_gated

# Within a tile, whole tiles, a part of the last; no row.
for rows, size in [(3, 5), (2, fused_gated.TILE), (3, 2 * fused_gated.TILE + 24), (0, 7)]:
    for dtype in (torch.float32, torch.bfloat16):
        # Gates that saturate too, and rows that lie in a wider tensor.
        joint = (8 * torch.randn(rows, 2 * size + 8)).to(dtype)[:, : 2 * size]
        grad = torch.randn(rows, size).to(dtype)
        joint[:, size] = 300.0
        joint[:, size + 1] = -300.0
        want = gated.plain_gradient(grad.double(), joint.double())
        kinds = {
            "rows": grad,
            "columns": grad.T.contiguous().T,
            "expanded": grad[:1].expand(rows, size),
        }
        for kind, given in kinds.items():
            if kind == "expanded":
                want = gated.plain_gradient(given.double(), joint.double())
            got = fused_gated.gradient(given, joint)
            assert got.dtype == dtype
            assert got.is_contiguous()
            off = (got.double() - want).abs() / want.abs().clamp(min=0.1)
            worst = off.max().item() if rows else 0.0
            print(
                json.dumps({"shape": [rows, size], "dtype": str(dtype), "kind": kind, "off": worst})
            )
