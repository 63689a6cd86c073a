"""Run by test_klt.py with TRITON_INTERPRET=1: a JSON line per case, the kernels of the transform
codec against plain torch.
"""

from __future__ import annotations

import json

import torch

from dspark.cache.codec.klt import fast
from dspark.cache.codec.klt.half import Half
from dspark.cache.codec.klt.symbols import BAND, CLASSES, Packing, band_count
from dspark.cache.codec.klt.tables import Transform

VOCAB, HIDDEN = 11, 20
CPU = torch.device("cpu")


def transform(
    channels: int, columns: tuple[int, ...], features: int, coarse: float = 1.0
) -> Transform:
    packing = Packing(columns)
    kept = packing.total
    spread = torch.logspace(1.5, -1, channels)[:, None]
    return Transform(
        mean=torch.randn(channels) * 3,
        deviation=torch.rand(channels) + 0.5,
        back=(torch.randn(channels, kept) / channels**0.5 * spread).T.bfloat16().contiguous(),
        forward=None,
        predict=torch.randn(features, channels).bfloat16(),
        offsets=torch.rand(2 if coarse == 1 else 4, band_count(packing)) * 0.3,
        step=0.4, packing=packing, limit=40.0, noise=1.0, bits=0.0, coarse=coarse,
    )  # fmt: skip


torch.manual_seed(0)
assert BAND == 30
assert len(CLASSES) == 4
for rows in (0, 1, 9):
    for columns in ((3, 4, 6, 10), (0, 0, 0, 1500), (300, 0, 33, 0), (0, 0, 0, 0)):
        aux = transform(40, (5, 6, 3, 15), 2 * HIDDEN)
        own = transform(24, columns, 7 + 3 * HIDDEN, 2.0 if rows == 9 else 1.0)
        ids = torch.randint(-1, VOCAB, (3, rows))
        at = torch.randint(0, 12, (rows,))
        code = torch.randint(0, 256, (12, aux.packing.width), dtype=torch.uint8)
        embedding = torch.randn(VOCAB, HIDDEN).bfloat16()
        for split in (False, True):
            read, half = (Half.of(t, CPU, torch.float32, split) for t in (aux, own))
            coarse = torch.arange(rows) % 2 == 1
            seen = fast.Seen(ids, embedding, read, code, at, 7, coarse)
            features = seen.plain()
            x = torch.randn(rows, 24) * 4
            x[::5] *= 100
            want, outside = half.encode(x, features, coarse)
            out = torch.empty(rows, 24)
            fast.decode(half, want, seen, out)
            reference = half.rows(half.read(want, coarse), features)
            close = torch.allclose(out, reference, rtol=1e-4, atol=1e-4)
            case = {
                "rows": rows,
                "columns": columns,
                "split": split,
                "decoded": close,
                "bytes": 0.0,
                "same": True,
            }
            if split:
                found, lost = fast.encode(half, x, seen)
                case["same"] = bool((lost == outside).all())
                case["bytes"] = float((found != want).sum()) / max(want.numel(), 1)
            print(json.dumps(case))
