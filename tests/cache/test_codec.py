"""Codecs: golden bytes, error bounds, every hidden size, what is refused, and a decoder written
from the document alone.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import dspark.cache
from dspark.cache.codec import registry
from dspark.cache.codec.bf16 import Bf16
from dspark.cache.codec.fields import Fields, codec_for, field_codec, field_info
from dspark.cache.codec.quant import distortion, entropy, gaussian_levels, scale_table
from dspark.cache.codec.rotated import Rotated
from dspark.cache.codec.rotated_tables import SETTINGS
from dspark.cache.codec.rotation import energy, group_size, hadamard, rotate, signs
from dspark.cache.errors import EngineError, FormatVersionError, UsageError
from dspark.cache.files.layout import disk_bytes_per_token, stored_bytes_per_token, token_bytes
from dspark.cache.manifest import FieldInfo
from dspark.cache.settings import choose_codec
from stores import HIDDEN, states, write_store

HIDDEN_SIZES = (576, 2560, 4096, 5120, 6144)
BITS = sorted(SETTINGS)
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def snr(x: torch.Tensor, y: torch.Tensor) -> float:
    """Signal to noise in dB."""
    return 10 * math.log10(float((x.double() ** 2).sum() / ((x - y).double() ** 2).sum()))


def rotated(bits: int) -> Rotated:
    codec = codec_for(bits)
    assert isinstance(codec, Rotated)
    return codec


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decode_by_document(code: np.ndarray, scale: np.ndarray, hidden: int, params: dict) -> Floats:  # type: ignore[type-arg]
    """docs/format_codecs.md in plain numpy; shares nothing with the package."""
    g = min(hidden & -hidden, params["group_limit"])
    half = len(params["levels"])
    if half == 8:
        values = np.empty((*code.shape[:-1], hidden), np.int64)
        values[..., 0::2], values[..., 1::2] = code & 15, code >> 4
    else:
        values = code.astype(np.int64)
    table = [-v for v in params["levels"][::-1]] + params["levels"]
    levels = np.array(table, np.float64)[values].reshape(*code.shape[:-1], hidden // g, g)

    def sign(i: int) -> int:
        h = i + 1
        h ^= h >> 16
        h = h * 0x85EBCA6B % 2**32
        h ^= h >> 13
        h = h * 0xC2B2AE35 % 2**32
        h ^= h >> 16
        return -1 if h % 2 else 1

    matrix = np.array([[(-1) ** bin(i & j).count("1") for j in range(g)] for i in range(g)])
    out = levels @ matrix * np.array([sign(i) for i in range(g)])
    s = np.where(scale == 0, 0.0, 2.0 ** ((scale.astype(np.float64) - 128) / 4) / 64)
    return (out * s[..., None]).reshape(*code.shape[:-1], hidden).astype(np.float32)


# A row of 16 channels with two sizes, a negative zero and a denormal; the bytes below are the
# format.
ROW = torch.tensor(
    [[0.5, -1.25, 3.0, -0.0, 1e-40, 2.0, -7.5, 0.125, 1.0, 1.0, -2.0, 0.75, 4.0, -0.5, 0.25, -1.0]]
)
GOLDEN = {
    8: ("5e5cc1a56e7e596e5b55879797b16d86", "7d"),
    4: ("55ad76654598b986", "7d"),
    3: ("669b77765698a987", "7d"),
    2: ("6799777666889887", "7d"),
}


@pytest.mark.parametrize("bits", BITS)
def test_golden_bytes(bits: int) -> None:
    coded = codec_for(bits).encode(ROW)
    assert (
        coded["code"].numpy().tobytes().hex(),
        coded["scale"].numpy().tobytes().hex(),
    ) == GOLDEN[bits]


def test_golden_bytes_of_16_bits() -> None:
    coded = Bf16().encode(torch.tensor([[1.0, -2.5, -0.0, 25000.0]]))
    assert coded["code"].numpy().tobytes().hex() == "803f20c00080c346"


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_the_cell_means_written_out(bits: int) -> None:
    codec = rotated(bits)
    assert list(codec.levels) == gaussian_levels(codec.step, 16)


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_exact_in_bfloat16(bits: int) -> None:
    levels = torch.tensor(rotated(bits).levels, dtype=torch.float32)
    assert torch.equal(levels.bfloat16().float(), levels)


@pytest.mark.parametrize("hidden", HIDDEN_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_snr_on_gaussian_is_what_the_step_promises(bits: int, hidden: int) -> None:
    codec = rotated(bits)
    x = gaussian(64, 2, hidden)
    promised = -10 * math.log10(distortion(codec.step, codec.levels))
    assert promised == pytest.approx({8: 40.6, 4: 18.7, 3: 15.3, 2: 10.4}[bits], abs=0.1)
    # At 8 bits the cells end at 4 sigma; a group that reaches further takes a larger scale, which
    # gives a little more.
    assert promised - 0.1 < snr(x, codec.decode(codec.encode(x), hidden)) < promised + 0.4


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["student", "massive", "constant", "spike"])
def test_heavy_tails_lose_nothing(kind: str, bits: int) -> None:
    """Data far from Gaussian keeps the SNR of Gaussian data, less 1 dB; a spike, which no cell is
    made for, stays recognisable.
    """
    codec = rotated(bits)
    x = gaussian(256, 576)
    if kind == "student":
        x = x / gaussian(256, 576, seed=1).abs().clamp(min=0.05)
    elif kind == "massive":
        x[:, 77] = 25000.0
    elif kind == "constant":
        x = torch.full_like(x, 3.0)
    else:  # a row of the transform itself: everything in one coefficient
        x = torch.from_numpy(np.tile(hadamard(64)[5] * signs(64), 9)).expand(4, -1) * 7.0
    promised = -10 * math.log10(distortion(codec.step, codec.levels))
    floor = promised - 1.0 if kind != "spike" else 6.0
    assert snr(x, codec.decode(codec.encode(x), 576)) > floor


@pytest.mark.parametrize("bits", BITS)
def test_a_massive_channel_harms_only_its_own_group(bits: int) -> None:
    codec = rotated(bits)
    x = gaussian(256, 576)
    x[:, 77] = 25000.0
    y = codec.decode(codec.encode(x), 576)
    others = [c for c in range(576) if not 64 <= c < 128]
    assert (
        snr(x[:, others], y[:, others])
        > -10 * math.log10(distortion(codec.step, codec.levels)) - 0.3
    )


@pytest.mark.parametrize("bits", BITS)
def test_zeros_negative_zeros_and_denormals_decode_to_zero(bits: int) -> None:
    x = torch.zeros(3, 576)
    x[1] = -0.0
    x[2] = 1e-42
    codec = codec_for(bits)
    coded = codec.encode(x)
    assert int(coded["scale"].max()) == 0
    assert torch.equal(codec.decode(coded, 576), torch.zeros(3, 576))


@given(
    st.sampled_from(BITS),
    st.sampled_from((8, 64, 96, *HIDDEN_SIZES)),
    st.lists(st.integers(0, 3), min_size=1, max_size=2),
    st.floats(-18, 18),
    st.sampled_from((torch.float32, torch.bfloat16)),
    st.integers(0, 5),
)
@settings(max_examples=120, deadline=None)
def test_any_shape_and_size(
    bits: int, hidden: int, lead: list[int], exponent: float, dtype: torch.dtype, seed: int
) -> None:
    """Shapes and dtypes as announced, an error in proportion to each group, and rows that do not
    depend on their neighbours.
    """
    codec = rotated(bits)
    x = (gaussian(*lead, hidden, seed=seed) * 2.0**exponent).to(dtype)
    coded = codec.encode(x)
    for name, spec in codec.arrays(hidden).items():
        assert coded[name].shape == (*lead, spec.width)
        assert str(coded[name].numpy().dtype) == spec.dtype
    y = codec.decode(coded, hidden)
    assert y.shape == x.shape
    assert y.dtype == torch.float32
    g = codec.group(hidden)
    groups, back = x.float().reshape(-1, g).double(), y.reshape(-1, g).double()
    bound = (2.5 if g > 8 else 6.0) * distortion(codec.step, codec.levels)
    assert bool((((groups - back) ** 2).sum(1) <= bound * (groups**2).sum(1) + 1e-18).all())
    if x.numel():
        one = codec.encode(x.reshape(-1, hidden)[-1:])
        for name, t in one.items():
            assert torch.equal(t[0], coded[name].reshape(-1, t.shape[-1])[-1])
        assert torch.equal(codec.decode(one, hidden)[0], y.reshape(-1, hidden)[-1])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("hidden", [64, 576, 2560])
def test_foreign_decoder_gives_the_same_bits(bits: int, hidden: int) -> None:
    codec = codec_for(bits)
    coded = codec.encode(gaussian(40, 3, hidden) * torch.logspace(-3, 3, 40)[:, None, None])
    theirs = decode_by_document(coded["code"].numpy(), coded["scale"].numpy(), hidden, codec.params)
    ours = codec.decode(coded, hidden).numpy()
    # The one rounding after exact integer sums: float32 scale here, float64 there.
    np.testing.assert_allclose(ours, theirs, rtol=2.5e-7, atol=0)


@pytest.mark.parametrize("aux_bits", [8, 4, 3, 2])
@pytest.mark.parametrize("last_bits", [8, 4])
def test_round_trip_through_a_store(tmp_path: Path, aux_bits: int, last_bits: int) -> None:
    codec = registry.make(f"rotated-{aux_bits}-{last_bits}")
    samples = write_store(tmp_path / "s", [40, 130, 7], codec=codec)
    cache = dspark.cache.open(tmp_path / "s")
    for i, sample in enumerate(samples):
        aux, last = states(sample)
        got = cache[i]
        assert snr(aux, torch.from_numpy(got.aux)) > {8: 38, 4: 17, 3: 13.5, 2: 8.5}[aux_bits]
        assert snr(last, torch.from_numpy(got.last[got.last_mask])) > {8: 38, 4: 17}[last_bits]
    part = zarr.open_group(tmp_path / "s" / "parts" / "000000000000", mode="r")
    code, scale = np.asarray(part["aux_code"][...]), np.asarray(part["aux_scale"][...])  # type: ignore[index]
    theirs = decode_by_document(code, scale, HIDDEN, codec.params["aux"])
    np.testing.assert_allclose(cache[0].aux, theirs[:40], rtol=2.5e-7, atol=0)


@pytest.mark.parametrize("bits", [16, *BITS])
def test_non_finite_states_are_refused_by_name(bits: int) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        x = gaussian(9, 3, 64)
        x[5, 2, 11] = bad
        with pytest.raises(EngineError, match="token 5, aux layer index 2, channel 11"):
            codec_for(bits).encode(x)
        with pytest.raises(EngineError, match=r"token 5 \(last state\), channel 11"):
            codec_for(bits).encode(x[:, 2])


@pytest.mark.parametrize("bits", BITS)
def test_states_beyond_the_scale_are_refused_by_name(bits: int) -> None:
    x = gaussian(4, 64)
    x[1, 3] = 3e38
    with pytest.raises(EngineError, match=r"token 1 \(last state\), channel 3: found 3.0"):
        codec_for(bits).encode(x)


def test_an_odd_hidden_size_is_refused() -> None:
    with pytest.raises(UsageError, match="hidden size 100 is not a multiple of 8"):
        codec_for(4).arrays(100)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="choose 16, 8, 4, 3 or 2"):
        codec_for(5)
    good = field_info(codec_for(4))
    assert field_codec(good, "s") == codec_for(4)
    for bad in (
        FieldInfo(codec="rotated", bits=4, params={**good.params, "step": 0.5}),
        FieldInfo(codec="rotated", bits=4, params={**good.params, "prediction": 1}),
        FieldInfo(codec="bf16", bits=4),
        FieldInfo(codec="rotated", bits=5, params=good.params),
    ):
        with pytest.raises(FormatVersionError, match="s: states are coded as"):
            field_codec(bad, "s")


def test_rotation_is_the_matrix_and_energy_is_the_norm() -> None:
    for g in (8, 64, 128):
        x = gaussian(g, 33)
        matrix = torch.from_numpy(hadamard(g) * signs(g))
        torch.testing.assert_close(rotate(x, torch.from_numpy(signs(g))), matrix @ x)
        torch.testing.assert_close(energy(x), (x * x).sum(0))
        assert torch.equal(
            torch.from_numpy(hadamard(g)) @ torch.from_numpy(hadamard(g)), g * torch.eye(g)
        )


def test_group_size_divides_the_hidden_size() -> None:
    assert [group_size(h, 128) for h in HIDDEN_SIZES] == [64, 128, 128, 128, 128]
    assert [group_size(h, 1 << 20) for h in HIDDEN_SIZES] == [64, 512, 4096, 1024, 2048]


def test_scales_are_quarter_octaves_and_chosen_to_the_nearest() -> None:
    table = scale_table()
    assert table[128] == 1.0
    assert np.allclose(np.diff(np.log2(table[1:].astype(np.float64))), 0.25, atol=1e-7)
    x = gaussian(500, 64) * torch.linspace(-9, 9, 500).exp2()[:, None]
    k = codec_for(4).encode(x)["scale"][:, 0].numpy()
    rms = (x.double() ** 2).mean(1).sqrt().numpy()
    assert np.abs(np.log2(table[k]) - np.log2(rms / 8)).max() <= 0.1251


@pytest.mark.parametrize("bits", BITS)
def test_size_by_formula_is_the_size_on_disk(tmp_path: Path, bits: int) -> None:
    """On states without repetition, as wide as a small model's."""
    import numcodecs

    codec = rotated(bits)
    coded = codec.encode(gaussian(128, 5, 576))
    got = sum(len(numcodecs.Zstd(level=1).encode(t.numpy())) for t in coded.values())
    assert got / 640 == pytest.approx(codec.disk_bytes(576), rel=0.02)
    assert entropy(codec.step, 2 * len(codec.levels)) == pytest.approx(
        {8: 7.05, 4: 3.37, 3: 2.81, 2: 1.98}[bits], abs=0.01
    )


def test_sizes_of_a_token_add_up() -> None:
    aux, last = rotated(4), rotated(8)
    assert stored_bytes_per_token(5, 576, Fields("rotated-4-8", aux, last), 0.5) == 5 * (
        288 + 9
    ) + 0.5 * (576 + 9)
    expected = token_bytes(aux) + 5 * aux.disk_bytes(576) + 0.5 * last.disk_bytes(576)
    assert disk_bytes_per_token(5, 576, Fields("rotated-4-8", aux, last), 0.5) == expected
    assert expected < stored_bytes_per_token(5, 576, Fields("rotated-4-8", aux, last), 0.5)


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("small", "klt-0.75-1-2"),
        ("klt-01.00-1.0", "klt-1-1"),
        ("rotated-16-16", "lossless"),
        ("rotated-04-4", "rotated-4-4"),
        ("no-such", "no-such"),
    ],
)
def test_a_codec_has_one_full_name(name: str, full: str) -> None:
    assert choose_codec(name, None, None) == full
    if full != name:
        assert registry.make(name).name == full
