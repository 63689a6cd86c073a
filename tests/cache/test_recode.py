"""Recoding a store: the same samples in other bits; stopped and resumed the same; compare says what
it cost.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr

import dspark.cache
import stores
from dspark.cache import errors
from dspark.cache.settings import PACKINGS
from dspark.cache.stores.recode import recode
from dspark.cache.stores.verify import verify
from dspark.tools.stores.compare import compare

LENGTHS = [50, 3, 120, 77, 260, 9, 150, 31]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    stores.write_store(tmp_path / "hs.zarr", LENGTHS)
    return tmp_path / "hs.zarr"


@pytest.mark.parametrize(
    ("bits", "least"), [((8, 8), 35.0), ((4, 4), 16.0), ((3, 4), 13.0), ((2, 4), 8.0)]
)
def test_other_bits_same_samples(
    store: Path, tmp_path: Path, bits: tuple[int, int], least: float
) -> None:
    out = recode(store, tmp_path / "small.zarr", aux_bits=bits[0], last_bits=bits[1])
    assert verify(tmp_path / "small.zarr").ok
    a, b = dspark.cache.open(store), dspark.cache.open(tmp_path / "small.zarr")
    assert out.counts == a.manifest.counts
    for i in range(len(a)):
        np.testing.assert_array_equal(a[i].input_ids, b[i].input_ids)
        np.testing.assert_array_equal(a[i].last_mask, b[i].last_mask)
    report = compare(a, b, limit=0)
    assert min(db for db in report["aux_snr_db"]) > least
    assert 0 < report["last_tv"] < 1
    assert compare(a, a)["last_snr_db"] is None
    assert compare(a, a)["last_tv"] == 0.0


def test_packing_alone_keeps_every_code(store: Path, tmp_path: Path) -> None:
    """zstd to none and back: the same codes, centres and quality, and the first store's bytes; a
    foreign reader sees the codes in either.
    """
    made = [tmp_path / name for name in ("packed", "plain", "again")]
    recode(store, made[0], aux_bits=4, last_bits=8)
    for source, to, pack in ((made[0], made[1], "none"), (made[1], made[2], "zstd")):
        out = recode(source, to, aux_bits=4, last_bits=8, pack=pack)
        assert out.codec.pack == pack
        assert verify(to).ok
    a, b = dspark.cache.open(made[0]), dspark.cache.open(made[1])
    assert a.manifest.quality == b.manifest.quality
    assert a.manifest.codec.calibration_sha256 == b.manifest.codec.calibration_sha256
    for i in range(len(a)):
        x, y = a.read(i), b.read(i)
        for name in x.states:
            np.testing.assert_array_equal(x.states[name], y.states[name])
    for file in sorted(p for p in made[0].rglob("*") if p.is_file()):
        assert file.read_bytes() == (made[2] / file.relative_to(made[0])).read_bytes(), file
    name = "parts/000000000001/aux_code"
    foreign = [zarr.open_array(folder / name, mode="r") for folder in made[:2]]
    np.testing.assert_array_equal(np.asarray(foreign[0]), np.asarray(foreign[1]))
    assert [len(z.compressors) for z in foreign] == [2, 1]  # zstd and crc32c, crc32c
    # Chunks are as they are: rows and their checksum, the last one filled up.
    (rows, layers, width), chunk = foreign[1].shape, foreign[1].chunks[0]
    chunks = -(-rows // chunk)
    file = made[1] / name / "c" / "0" / "0" / "0"
    assert file.stat().st_size == 16 + chunks * (chunk * layers * width + 4 + 16) + 4


def test_three_and_two_bits_need_zstd(store: Path, tmp_path: Path) -> None:
    for bits in (3, 2):
        with pytest.raises(
            errors.UsageError, match=f"{bits}-bit codes .* only zstd .* choose 16, 8 or 4 bits"
        ):
            recode(store, tmp_path / "small.zarr", aux_bits=bits, last_bits=4, pack="none")
    recode(store, tmp_path / "small.zarr", aux_bits=2, last_bits=4)
    with pytest.raises(errors.UsageError, match="2-bit codes"):
        recode(
            tmp_path / "small.zarr", tmp_path / "plain.zarr", aux_bits=2, last_bits=4, pack="none"
        )
    assert not (tmp_path / "plain.zarr").exists()


def test_back_to_16_bits_is_the_same_store(store: Path, tmp_path: Path) -> None:
    """16 bits of 16 bits lose nothing: every part comes out byte for byte."""
    recode(store, tmp_path / "again.zarr", aux_bits=16, last_bits=16)
    for file in sorted((store / "parts").rglob("*")):
        if file.is_file():
            assert (
                file.read_bytes()
                == (tmp_path / "again.zarr" / file.relative_to(store)).read_bytes()
            ), file


@pytest.mark.parametrize("pack", PACKINGS)
def test_stopped_and_resumed_is_the_same(store: Path, tmp_path: Path, pack: str) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise Stop

    recode(store, tmp_path / "whole.zarr", aux_bits=4, last_bits=4, pack=pack)
    with pytest.raises(Stop):
        recode(store, tmp_path / "half.zarr", aux_bits=4, last_bits=4, pack=pack, progress=stop)
    with pytest.raises(errors.ExistsError):
        recode(store, tmp_path / "half.zarr", aux_bits=4, last_bits=4)
    with pytest.raises(
        errors.MismatchError,
        match=r"codec\.name: store has 'rotated-4-4', this run has 'rotated-8-4'",
    ):
        recode(store, tmp_path / "half.zarr", aux_bits=8, last_bits=4, pack=pack, resume=True)
    recode(store, tmp_path / "half.zarr", aux_bits=4, last_bits=4, pack=pack, resume=True)
    for file in sorted((tmp_path / "whole.zarr").rglob("*")):
        if file.is_file():
            assert (
                file.read_bytes()
                == (tmp_path / "half.zarr" / file.relative_to(tmp_path / "whole.zarr")).read_bytes()
            )


def test_refusals(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    with monkeypatch.context() as early:
        early.setattr(
            "dspark.cache.stores.recode.spread_states", lambda *a, **k: pytest.fail("read")
        )
        for overwrite, words in ((False, "Use --resume"), (True, "not a dspark store")):
            with pytest.raises(errors.ExistsError, match=words):
                recode(store, tmp_path / "mine", codec="rotated-4-4", overwrite=overwrite)
    with pytest.raises(errors.UsageError, match="is also the source"):
        recode(store, store, aux_bits=4, last_bits=4, overwrite=True)
    stores.write_store(tmp_path / "other.zarr", LENGTHS, seed=9)
    with pytest.raises(errors.MismatchError, match="same samples"):
        compare(dspark.cache.open(store), dspark.cache.open(tmp_path / "other.zarr"))
