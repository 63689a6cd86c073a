"""Run by test_fused.py with TRITON_INTERPRET=1: one JSON line a case, the largest difference from
float64.
"""

from __future__ import annotations

import json

import torch

from dspark.train.objective import chunk_kernel as fused
from dspark.train.objective import chunks

# Slots, V, Vd: within a tile, over several, a reduced vocabulary of one and of two tiles, and of a
# single token.
SHAPES = [
    (5, 23, 23),
    (4, fused.TILE, fused.TILE),
    (3, 9001, 9001),
    (6, 9001, 5000),
    (5, 40, 13),
    (2, 40, 1),
]

for slots, size, draft_size in SHAPES:
    draft, target = 3 * torch.randn(slots, draft_size), 3 * torch.randn(slots, size)
    ids = torch.randperm(size)[:draft_size].sort().values if draft_size < size else None
    at = torch.randint(0, 2, (slots,)).cumsum(0)
    at -= int(at[0])
    target = target[: int(at[-1]) + 1]
    labels = torch.randint(0, draft_size, (slots,))
    labels[0] = -1
    scale_ce, scale_l1 = torch.rand(slots) * (labels >= 0), torch.rand(slots)
    scale_kl = torch.rand(slots)
    target[0, 1:] = -torch.inf  # certain of a token
    for kl in (None, scale_kl):
        wide = None if kl is None else kl.double()
        rest = (at, ids, labels, scale_ce, scale_l1, kl)
        want = chunks.chunk_terms(
            *(x.double() for x in (draft, target)), at, ids, labels,
            scale_ce.double(), scale_l1.double(), wide, True,
        )  # fmt: skip
        values = fused.chunk_terms(draft.clone(), target, *rest, False)
        got = fused.chunk_terms(draft.clone(), target, *rest, True)
        assert values[3] is None
        assert torch.equal(values[0], got[0])
        assert (got[4] is None) == (kl is None)
        apart = {
            name: 0.0 if got[i] is None else (got[i].double() - want[i]).abs().max().item()
            for name, i in (("ce", 0), ("l1", 1), ("gradient", 3), ("kl", 4))
        }
        wrong = int((got[2] != want[2]).sum())
        print(json.dumps({"shape": [slots, size, draft_size], **apart, "wrong_hits": wrong}))
