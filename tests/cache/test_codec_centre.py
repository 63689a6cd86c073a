"""Channel means and deviations: what they are taken from, what they gain, how the manifest carries
them, what is refused.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dspark.cache
from dspark.cache.codec.centre import Centre
from dspark.cache.codec.fields import Fields, codec_for, field_codec, field_info, of_field
from dspark.cache.codec.rotated import Rotated
from dspark.cache.errors import DamagedCacheError, EngineError, FormatVersionError
from dspark.cache.manifest import FieldInfo
from stores import LAYERS, states, token_samples, write_store

GOLDEN = ("AD9Av7BAAD+wQJpBaMEUQQ==", "pT/APwVApT8FQOlAz0BaQA==", "bcb47858", "76")


def real_like(tokens: int, layers: int = 3, hidden: int = 192, seed: int = 0) -> torch.Tensor:
    """Half the energy in the channel means, deviations over two decades, a massive first token; the
    same channels at any seed.
    """
    fixed = torch.Generator().manual_seed(99)
    deviation = 10 ** (torch.rand(layers, hidden, generator=fixed) * 2 - 1)
    mean = torch.randn(layers, hidden, generator=fixed) * deviation * 1.5
    x = mean + deviation * torch.randn(
        tokens, layers, hidden, generator=torch.Generator().manual_seed(seed)
    )
    x[0, :, 5] = 25000.0
    return x.bfloat16().float()


def calibrated(bits: int, sample: torch.Tensor) -> Rotated:
    codec = codec_for(bits)
    assert isinstance(codec, Rotated)
    return codec.calibrated(sample)


def channel_error(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((((x - y)[1:] ** 2).mean(0) / x[1:].var(0)).mean())


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_every_channel_gets_the_error_that_the_step_promises(bits: int) -> None:
    sample, x = real_like(400), real_like(600, seed=1)
    codec = calibrated(bits, sample)
    plain = codec_for(bits)
    promised = {4: 18.7, 3: 15.3, 2: 10.4}[bits]
    error = channel_error(x, codec.decode(codec.encode(x), 192))
    assert -10 * math.log10(error) == pytest.approx(promised, abs=0.3)
    assert error < 0.1 * channel_error(x, plain.decode(plain.encode(x), 192))


def test_golden_bytes() -> None:
    row = torch.arange(8.0)[None] * torch.tensor([1.0, -1, 2, 0, 1, 3, -2, 1])
    sample = torch.cat([row + 1, row - 1, row + 2, row * 2])
    codec = calibrated(4, sample)
    coded = codec.encode(row)
    got = [t.numpy().tobytes().hex() for t in coded.values()]
    assert (codec.params["mean"], codec.params["deviation"], *got) == GOLDEN


def test_massive_rows_do_not_set_the_deviation() -> None:
    x = real_like(400)
    mean, deviation, _ = Centre.of(x).tensors(192, x.device)
    torch.testing.assert_close(deviation, x[1:].std(0), rtol=0.005, atol=0)
    torch.testing.assert_close(mean, x[1:].mean(0), rtol=0.005, atol=1e-3)


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows_change_nothing(rows: int) -> None:
    x = real_like(50)
    codec = calibrated(4, x[:rows])
    for a, b in zip(codec.encode(x).values(), codec_for(4).encode(x).values(), strict=True):
        assert torch.equal(a, b)


def test_a_constant_channel_is_kept() -> None:
    x = real_like(300)
    x[:, :, 7] = 42.0
    y = calibrated(4, x).decode(calibrated(4, x).encode(x), 192)
    torch.testing.assert_close(y[1:, :, 7], x[1:, :, 7], rtol=0.01, atol=0)


def test_it_lives_beside_the_parts_and_decodes_from_there_alone(tmp_path: Path) -> None:
    samples = token_samples([40, 130, 7])
    aux, last = (torch.cat(x) for x in zip(*(states(s) for s in samples), strict=True))
    codec = Fields("rotated-3-4", calibrated(3, aux + 5.0), calibrated(4, last))
    write_store(tmp_path / "s", [40, 130, 7], codec=codec)
    cache = dspark.cache.open(tmp_path / "s")
    assert cache.codec == codec
    got = torch.cat([torch.from_numpy(cache[i].aux) for i in range(3)])
    assert float(((got - aux) ** 2).sum() / (aux**2).sum()) < 0.05
    # By the document: rotated values, times the deviation, plus the mean.
    coded = {
        n: torch.from_numpy(np.asarray(a)) for n, a in of_field("aux", cache.read(1).states).items()
    }
    plain = codec_for(3).decode(coded, 64).numpy()
    learnt = load_file(tmp_path / "s" / "calibration.safetensors")
    raw = [
        learnt[f"aux_{n}"].view(torch.int16).numpy().view("<u2").astype("<u4") << 16
        for n in ("mean", "deviation")
    ]
    mean, deviation = (r.view("<f4").reshape(len(LAYERS), 64) for r in raw)
    np.testing.assert_allclose(cache[1].aux, plain * deviation + mean, rtol=1e-6, atol=1e-5)


def test_non_finite_states_are_still_named() -> None:
    x = real_like(20)
    codec = calibrated(4, x)
    for bad, words in ((math.nan, "not finite"), (math.inf, "not finite"), (3e38, "too large")):
        y = x.clone()
        y[5, 2, 11] = bad
        with pytest.raises(
            EngineError, match=f"{words}.* at token 5, aux layer index 2, channel 11"
        ):
            codec.encode(y)


def test_damaged_or_partial_params_are_refused() -> None:
    good = field_info(calibrated(4, real_like(30))).params
    for change, error in (
        ({"mean": "!"}, DamagedCacheError),
        ({"mean": ""}, DamagedCacheError),
        ({"mean": good["mean"][:-4]}, DamagedCacheError),
        ({"deviation": 3}, DamagedCacheError),
        ({"levels": [1]}, FormatVersionError),
    ):
        with pytest.raises(error):
            field_codec(FieldInfo(codec="rotated", bits=4, params={**good, **change}), "s")
    only = {k: v for k, v in good.items() if k != "mean"}
    with pytest.raises(FormatVersionError):
        field_codec(FieldInfo(codec="rotated", bits=4, params=only), "s")
