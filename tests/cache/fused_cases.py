"""Run by test_fused_decode.py with TRITON_INTERPRET=1: one JSON line a case, whether kernel and
plain torch give the same bits.
"""

from __future__ import annotations

import json

import torch

from dspark.cache.codec import rotated_decode_kernel as fused
from dspark.cache.codec.fields import codec_for
from dspark.cache.codec.rotated import Rotated

# Hidden sizes with groups of 32, 64 and 128; aux [T, L, H] and last [M, H]; no row, one row, and
# more than a tile and a program take.
SHAPES = [(1, 3, 32), (70, 2, 192), (300, 1, 256), (130, 576), (0, 2, 64), (0, 64)]

for shape in SHAPES:
    x = torch.randn(shape) * torch.logspace(-2, 2, shape[-1])
    if shape[0]:
        x[0] = 0.0
        x[-1, ..., 3] = 25000.0
    for bits in (8, 4, 3, 2):
        for centred in (False, True):
            codec = codec_for(bits)
            assert isinstance(codec, Rotated)
            if centred:
                codec = codec.calibrated(x + 0.7)
            coded = codec.encode(x)
            want = codec.decode_plain(coded, shape[-1])
            for dtype in (
                torch.float32,
                torch.float16,
            ):  # the interpreter cuts bfloat16 off instead of rounding
                got = fused.decode(codec, coded, shape[-1], dtype)
                same = got.shape == want.shape and torch.equal(
                    got.view(torch.int16), want.to(dtype).view(torch.int16)
                )
                case = {
                    "shape": shape,
                    "bits": bits,
                    "centred": centred,
                    "dtype": str(dtype),
                    "same": same,
                }
                print(json.dumps(case))
