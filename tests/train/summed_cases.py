"""Run by test_summed.py with TRITON_INTERPRET=1: one JSON line a case, how many values are wrong,
inside and around.
"""

from __future__ import annotations

import itertools
import json

import torch

from dspark.train.ops import summed, summed_kernel

# Less than a tile, whole ones and a part of one, nothing.
SHAPES = [(5, 9), (2, summed_kernel.TILE), (3, summed_kernel.TILE + 7), (0, 4)]

for shape, first in itertools.product(SHAPES, [False, True]):
    part = torch.randn(shape).bfloat16()
    n = part.numel()
    around = torch.randn(n + 20)
    want = around.clone()
    summed.add_to(want[8 : n + 8].view(shape), part, first=first)
    summed_kernel.add_to(around[8 : n + 8].view(shape), part, first=first)
    print(json.dumps({"shape": shape, "first": first, "wrong": int((around != want).sum())}))
