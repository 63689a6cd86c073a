"""Run by test_fused_encode.py with TRITON_INTERPRET=1: one JSON line a case, whether kernel and
plain torch give the same bytes.
"""

from __future__ import annotations

import json

import torch

from dspark.cache.codec import rotated_encode_kernel as fused_encode
from dspark.cache.codec.fields import codec_for
from dspark.cache.codec.rotated import Rotated, trusted
from dspark.cache.errors import EngineError

# Hidden sizes with groups of 16 to 128; aux [T, L, H] and last [M, H]; no row, one row, and more
# than a tile takes.
SHAPES = [(3, 2, 48), (1, 3, 32), (70, 2, 192), (150, 1, 256), (130, 576), (0, 2, 64), (0, 64)]

torch.manual_seed(0)
for shape in SHAPES:
    x = torch.randn(shape) * torch.logspace(-2, 2, shape[-1])
    if shape[0]:
        x[0] = 0.0
        x[-1, ..., 3] = 25000.0
        x[shape[0] // 2] = 1e-30
        x[shape[0] // 3, ..., ::5] *= 40.0  # far from Gaussian, so that other scales are tried
        x[shape[0] // 4] = torch.randn(shape[-1]).sign()
    for bits in (8, 4, 2):
        for centred in (False, True):
            codec = codec_for(bits)
            assert isinstance(codec, Rotated)
            if centred:
                codec = codec.calibrated(x + 0.7)
            for dtype in (torch.float32, torch.bfloat16):
                y = x.to(dtype)
                want, got = codec.encode_plain(y), fused_encode.encode(codec, y)
                same = all(
                    got[n].shape == want[n].shape and bool(torch.equal(got[n], want[n]))
                    for n in ("code", "scale")
                )
                print(
                    json.dumps(
                        {
                            "shape": shape,
                            "bits": bits,
                            "centred": centred,
                            "dtype": str(dtype),
                            "same": same,
                        }
                    )
                )
codec = codec_for(4)
assert isinstance(codec, Rotated)
for bad, message in (
    (float("nan"), "not finite at token 5"),
    (3e30, "too large for this codec at token 5"),
):
    x = torch.randn(9, 2, 64)
    x[5, 1, 7] = bad
    try:
        fused_encode.encode(codec, x)
        print(json.dumps({"bad": bad, "same": False}))
    except EngineError as error:
        print(json.dumps({"bad": message, "same": message in str(error)}))
print(json.dumps({"trusted": trusted(codec, 64, torch.device("cpu"), torch.float32), "same": True}))
