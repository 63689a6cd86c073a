"""Run by test_scaled.py with TRITON_INTERPRET=1: one JSON line a case, how many values are wrong,
inside and around.
"""

from __future__ import annotations

import itertools
import json

import torch

from dspark.train.ops import scaled
from dspark.train.ops import scaled_kernel as fused_scaled

# A rank of Qwen3's drafts with a part of the last tile of rows, odd ones, more columns than a tile
# has; nothing.
SHAPES = [(19, 256), (19, 77), (2100, 1), (2, fused_scaled.TILE + 5), (0, 7), (3, 0)]

for (rows, columns), before, after, with_scale, around in itertools.product(
    SHAPES, scaled.KINDS, scaled.KINDS, [False, True], [0, 24]
):
    source = torch.randn(rows, columns + 2 * around).to(before)[:, around // 3 :][:, :columns]
    scale = torch.randn(()) if with_scale else None
    # Rows behind the last one, and columns on both sides.
    wide = torch.randn(rows + 2, columns + around).to(after)
    at = (slice(0, rows), slice(around // 2, around // 2 + columns))
    want = wide.clone()
    scaled.plain(want[at], source, scale)
    cut = want.clone()
    if after == torch.bfloat16:
        # The interpreter cuts bfloat16 off where the GPU rounds: of the exact product either way.
        exact = source.float() if scale is None else source.float() * scale
        cut[at] = (exact.view(torch.int32) & -65536).view(torch.float32).to(after)
    out = wide[at]
    assert fused_scaled.write_scaled(out, source, scale) is out
    print(
        json.dumps(
            {
                "shape": [rows, columns],
                "kind": [str(before), str(after), with_scale, around],
                "wrong": int(((wide != want) & (wide != cut)).sum()),
            }
        )
    )
