"""A store written and read back; what a reader refuses; what damage verify names."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

import dspark.cache
import dspark.cache.reader
import stores
from dspark.cache import errors
from dspark.cache.canonical import sealed
from dspark.cache.codec import registry
from dspark.cache.files.calibration import codec_info
from dspark.cache.files.metadata import read_attributes
from dspark.cache.files.place import place_of
from dspark.cache.manifest import Manifest, plan_digest
from dspark.cache.records import last_rows
from dspark.cache.settings import PACKINGS
from dspark.cache.stores.verify import drop_damaged, verify
from dspark.cache.writer import StoreWriter

LENGTHS = [50, 3, 120, 77, 260, 9, 150, 31]


@pytest.fixture(params=PACKINGS)
def plan(request: pytest.FixtureRequest) -> Manifest:
    """Every test of this file holds for either way of keeping codes."""
    return stores.manifest(codec=codec_info(registry.make("lossless", request.param)))


@pytest.fixture
def store(tmp_path: Path, plan: Manifest) -> Path:
    stores.write_store(tmp_path / "hs.zarr", LENGTHS, m=plan)
    return tmp_path / "hs.zarr"


def test_samples_come_back_exactly(store: Path) -> None:
    cache = dspark.cache.open(store)
    samples = stores.token_samples(LENGTHS)
    assert len(cache) == len(samples)
    for i in np.random.default_rng(1).permutation(len(samples)):
        want, got = samples[i], cache[int(i)]
        aux, last = stores.states(want)
        rows = last_rows(want.loss_mask)
        np.testing.assert_array_equal(got.input_ids, want.input_ids)
        np.testing.assert_array_equal(got.loss_mask, want.loss_mask)
        np.testing.assert_array_equal(got.last_mask, rows)
        np.testing.assert_array_equal(got.aux, aux.numpy())
        np.testing.assert_array_equal(got.last[rows], last.numpy())
        assert not got.last[~rows].any()
        assert (got.row, got.key) == (want.row, want.key)
        assert got.aux.dtype == np.float32
        assert got.input_ids.dtype == np.int32
    assert cache.manifest.counts.samples == len(samples)
    assert cache.manifest.counts.tokens == sum(LENGTHS)


def test_last_rows_truth_table() -> None:
    #        supervised run   single    at the end
    mask = [0, 1, 1, 1, 0, 0, 1, 0, 0, 1, 1]
    want = [0, 1, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    np.testing.assert_array_equal(last_rows(np.array(mask, np.bool_)), np.array(want, np.bool_))


def test_a_foreign_zarr_reader_sees_the_documented_arrays(store: Path) -> None:
    """docs/format.md alone: plain zarr, the attributes, bf16 bits widened by hand."""
    root = zarr.open_group(store, mode="r")
    attributes = json.loads(json.dumps(root.attrs.asdict()))["dspark"]
    assert attributes["format_version"] == 2
    plan = attributes["plan"]
    assert plan["target_layer_ids"] == [i + 1 for i in plan["layers"]]
    part = zarr.open_group(store / "parts" / "000000000001", mode="r")
    start = np.asarray(part.get("sample_start"))
    bits = np.asarray(part.get("aux_code"))[start[0] : start[1]].astype(np.uint32) << 16
    first = zarr.open_group(store / "index", mode="r").get("part_first_sample")
    sample = dspark.cache.open(store)[int(np.asarray(first)[1])]
    np.testing.assert_array_equal(bits.view(np.float32), sample.aux)


def test_a_cache_pickles_and_target_is_tied(store: Path) -> None:
    cache = pickle.loads(pickle.dumps(dspark.cache.open(store)))
    assert cache.target.lm_head.data_ptr() == cache.target.embed_tokens.data_ptr()
    np.testing.assert_array_equal(
        cache.target.embed_tokens.numpy(), stores.frozen().embed_tokens.numpy()
    )
    with pytest.raises(IndexError):
        cache[len(LENGTHS)]


def test_the_embedding_is_moved_to_a_device_once(store: Path) -> None:
    """A tensor names its device as it likes ("cuda" becomes "cuda:0"; of "meta:0" only "meta" is
    left), and a comparison with that moved the embedding for every row of a training.
    """
    cache = dspark.cache.open(store)
    device = torch.device("meta", 0)
    moved = cache.embedding_on(device)
    assert moved.device != device
    assert cache.embedding_on(device) is moved
    assert cache.embedding_on(torch.device("cpu")).device.type == "cpu"


def test_writing_twice_gives_the_same_bytes(store: Path, plan: Manifest, tmp_path: Path) -> None:
    stores.write_store(tmp_path / "b.zarr", LENGTHS, m=plan)
    files = sorted(p.relative_to(store) for p in store.rglob("*") if p.is_file())
    assert files == sorted(
        p.relative_to(tmp_path / "b.zarr") for p in (tmp_path / "b.zarr").rglob("*") if p.is_file()
    )
    for name in files:
        assert (store / name).read_bytes() == (tmp_path / "b.zarr" / name).read_bytes(), name


def test_resume_after_losing_any_part_gives_the_same_store(store: Path, plan: Manifest) -> None:
    before = {p.relative_to(store): p.read_bytes() for p in store.rglob("*") if p.is_file()}
    m = plan
    report = verify(store)
    assert report.ok
    report.findings.append("pretend")
    report.damaged = {"000000000001"}
    assert drop_damaged(store, report) == ["000000000001"]
    with pytest.raises(errors.IncompleteCacheError, match="--resume"):
        dspark.cache.open(store)
    with StoreWriter.resume(store, m) as writer:
        assert 1 not in writer.committed
        stores.commit(writer, 1, stores.token_samples(LENGTHS))
        writer.finish(quality=dspark.cache.open(store, allow_incomplete=True).manifest.quality)
    after = {p.relative_to(store): p.read_bytes() for p in store.rglob("*") if p.is_file()}
    assert after == before


def test_resume_refuses_another_plan_and_names_each_difference(store: Path, plan: Manifest) -> None:
    other = dataclasses.replace(plan, layers=[0, 2, 4])
    with pytest.raises(
        errors.MismatchError, match=r"layers: store has \[1, 2, 4\], this run has \[0, 2, 4\]"
    ):
        StoreWriter.resume(store, other)
    dump = dataclasses.replace(plan.dump, seq_length=99)
    with pytest.raises(
        errors.MismatchError, match=r"run.seq_length: store has 256, this run has 99"
    ):
        StoreWriter.resume(store, dataclasses.replace(plan, dump=dump))
    (pack,) = set(PACKINGS) - {plan.codec.pack}
    with pytest.raises(errors.MismatchError, match=rf"codec.pack: store has '{plan.codec.pack}'"):
        StoreWriter.resume(
            store, dataclasses.replace(plan, codec=dataclasses.replace(plan.codec, pack=pack))
        )


def test_refusals_by_name(tmp_path: Path, store: Path) -> None:
    with pytest.raises(errors.NotACacheError, match="no such folder"):
        dspark.cache.open(tmp_path / "nothing")
    (tmp_path / "folder").mkdir()
    with pytest.raises(errors.NotACacheError, match="no zarr.json"):
        dspark.cache.open(tmp_path / "folder")
    zarr.create_group(tmp_path / "foreign")
    with pytest.raises(errors.NotACacheError, match="not a dspark store"):
        dspark.cache.open(tmp_path / "foreign")
    with pytest.raises(errors.ExistsError, match="--resume"):
        StoreWriter.create(store, stores.manifest(), stores.frozen(), {})
    with pytest.raises(errors.ExistsError, match="not overwritten"):
        StoreWriter.create(
            tmp_path / "folder", stores.manifest(), stores.frozen(), {}, overwrite=True
        )
    stores.write_store(tmp_path / "half.zarr", LENGTHS, finish=False)
    with pytest.raises(errors.IncompleteCacheError, match="has not finished"):
        dspark.cache.open(tmp_path / "half.zarr")
    half = dspark.cache.open(tmp_path / "half.zarr", allow_incomplete=True)
    assert len(half) == len(LENGTHS)
    np.testing.assert_array_equal(half[4].input_ids, stores.token_samples(LENGTHS)[4].input_ids)


def edit_manifest(
    store: Path, seal: bool, codec: dict[str, object] | None = None, **changes: object
) -> None:
    path = store / "zarr.json"
    data = json.loads(path.read_text())
    body = {k: v for k, v in data["attributes"]["dspark"].items() if k != "crc32c"} | changes
    if codec is not None:
        body["plan"]["codec"] |= codec
        body["plan_sha256"] = plan_digest(body["plan"])
    data["attributes"]["dspark"] = (
        sealed(body) if seal else {**data["attributes"]["dspark"], **changes}
    )
    path.write_text(json.dumps(data))


def test_unknown_version_codec_and_key_are_refused(store: Path) -> None:
    edit_manifest(store, True, format_version=3)
    with pytest.raises(errors.FormatVersionError, match="version 3"):
        dspark.cache.open(store)
    edit_manifest(store, True, format_version=2, codec={"name": "magic"})
    with pytest.raises(errors.FormatVersionError, match="magic"):
        dspark.cache.open(store)
    edit_manifest(store, True, codec={"name": "lossless", "pack": "lz4"})
    with pytest.raises(errors.FormatVersionError, match="packing 'lz4'"):
        dspark.cache.open(store)
    edit_manifest(store, True, codec={"pack": "zstd", "params": {"aux": 1}})
    with pytest.raises(errors.FormatVersionError, match="parameters"):
        dspark.cache.open(store)
    edit_manifest(store, True, surprise=1)
    with pytest.raises(errors.DamagedCacheError, match="surprise"):
        dspark.cache.open(store)


def test_a_sealed_record_of_other_types_is_damage(store: Path) -> None:
    """Whoever seals a record may put anything in it."""
    for name, key, odd in (
        ("index", "dspark_index", {"part_crc32c": 7}),
        ("index", "dspark_index", {"bytes": {"aux_code": {}}}),
        ("parts/000000000000", "dspark_part", {"features": 7}),
        ("parts/000000000000", "dspark_part", {"features": [["x"]]}),
    ):
        path = store / name / "zarr.json"
        before = path.read_text()
        data = json.loads(before)
        body = {k: v for k, v in data["attributes"][key].items() if k != "crc32c"} | odd
        data["attributes"][key] = sealed(body)
        path.write_text(json.dumps(data))
        assert any(next(iter(odd)) in finding for finding in verify(store).findings)
        with pytest.raises(errors.DamagedCacheError, match=next(iter(odd))):
            dspark.cache.open(store)[0]
        path.write_text(before)


def test_an_index_of_the_same_bytes_and_another_type_is_damage(tmp_path: Path) -> None:
    """Three numbers of 8 bytes have the checksum of six of 4."""
    store = tmp_path / "s"
    stores.write_store(store, [40, 52, 61, 44, 30, 37])
    path = store / "index" / "part_first_sample" / "zarr.json"
    (shape,) = json.loads(path.read_text())["shape"]
    data = json.loads(path.read_text()) | {"shape": [2 * shape], "data_type": "int32"}
    path.write_text(json.dumps(data))
    with pytest.raises(errors.DamagedCacheError, match=r"int32.* expected int64.*rebuild-index"):
        dspark.cache.open(store)[0]
    assert not verify(store).ok


def test_an_edited_manifest_is_damage(store: Path) -> None:
    edit_manifest(store, False, sources=[])
    with pytest.raises(errors.DamagedCacheError, match="crc32c"):
        dspark.cache.open(store)
    plan = read_attributes(place_of(store))["dspark"]["plan"]
    edit_manifest(store, True, sources=[], plan=plan | {"layers": [1, 2, 3]})
    with pytest.raises(errors.DamagedCacheError, match="plan_sha256"):
        dspark.cache.open(store)


def damage(path: Path, kind: str) -> None:
    data = bytearray(path.read_bytes())
    if kind == "flip":
        data[len(data) // 3] ^= 0x10
        path.write_bytes(bytes(data))
    elif kind == "cut":
        path.write_bytes(bytes(data[:-7]))
    else:
        path.unlink()


@pytest.mark.parametrize("kind", ["flip", "cut", "gone"])
def test_verify_names_every_damaged_file(store: Path, kind: str) -> None:
    """Each file of a part in turn, its own metadata included: verify finds it and names it, and no
    read returns data from a damaged chunk.
    """
    part = store / "parts" / "000000000002"
    total = verify(store)
    assert total.ok
    assert total.checked_chunks > 20
    for file in sorted(p for p in part.rglob("*") if p.is_file()):
        whole = file.read_bytes()
        damage(file, kind)
        report = verify(store)
        assert not report.ok, file
        name = file.relative_to(part).parts[0]
        assert any(name in finding or "zarr.json" in finding for finding in report.findings), (
            file,
            report.findings,
        )
        assert report.damaged == {"000000000002"}
        file.write_bytes(whole)
    assert verify(store).ok


@pytest.mark.parametrize("kind", ["flip", "cut", "gone"])
def test_reading_damaged_states_raises(store: Path, kind: str) -> None:
    damage(store / "parts" / "000000000000" / "aux_code" / "c" / "0" / "0" / "0", kind)
    with pytest.raises(errors.DamagedCacheError, match="aux_code"):
        for sample in dspark.cache.open(store):
            del sample


def test_verify_finds_a_swapped_part_and_a_missing_one(store: Path, tmp_path: Path) -> None:
    stores.write_store(
        tmp_path / "other.zarr", LENGTHS, m=dspark.cache.open(store).manifest, seed=5
    )
    mine, other = (
        store / "parts" / "000000000001",
        tmp_path / "other.zarr" / "parts" / "000000000001",
    )
    mine.rename(tmp_path / "kept")
    report = verify(store)
    assert any("missing" in f for f in report.findings)
    other.rename(mine)
    report = verify(store)
    assert any("to another plan than the store's" in f for f in report.findings)


def test_disk_full_is_one_sentence_and_leaves_the_committed_parts(
    store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    m = stores.manifest()
    samples = stores.token_samples(LENGTHS)
    writer = StoreWriter.create(tmp_path / "full.zarr", m, stores.frozen(), {})
    stores.commit(writer, 0, samples)

    import errno

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dspark.cache.files.atomic.os.fsync", full)
    with pytest.raises(errors.StoreWriteError, match="disk is full.*--resume"):
        stores.commit(writer, 1, samples)
    monkeypatch.undo()
    again = StoreWriter.resume(tmp_path / "full.zarr", m)
    assert set(again.committed) == {0}
    assert verify(tmp_path / "full.zarr").ok


@pytest.mark.parametrize(
    ("dtype", "level"),
    [("uint16", 5), ("uint8", 1), ("int32", 5), ("bool", 1), ("uint16", 0), ("uint8", 0)],
)
@pytest.mark.parametrize("rows", [1, 127, 128, 129, 700])
def test_our_shards_are_zarrs_bytes_and_ours_reads_zarrs(
    tmp_path: Path, dtype: str, level: int, rows: int
) -> None:
    """The fast writer and reader against zarr-python, both ways: the same file, the same values for
    any range of rows.
    """
    from dspark.cache.files.layout import StoredArray
    from dspark.cache.parts.part import shard_file, write_array
    from dspark.cache.parts.shard import Shard

    rng = np.random.default_rng(rows)
    shuffle = {"uint16": 2, "int32": 4}.get(dtype, 0) if level else 0
    spec = StoredArray("x", (rows, 3, 20), dtype, 128, shuffle, level)
    data = rng.integers(0, 2 if dtype == "bool" else 200, spec.shape).astype(dtype)
    zarr.create_group(tmp_path / "ours")
    write_array(tmp_path / "ours", spec, data)
    ours = tmp_path / "ours" / "x"
    np.testing.assert_array_equal(np.asarray(zarr.open_array(ours, mode="r")), data)
    before = (ours / shard_file(spec)).read_bytes()
    theirs = zarr.open_array(ours, mode="r+", config={"write_empty_chunks": True})
    theirs[...] = data
    assert (ours / shard_file(spec)).read_bytes() == before
    shard = Shard(ours / shard_file(spec), spec)
    for _ in range(20):
        a, b = sorted(rng.integers(0, rows + 1, 2).tolist())
        np.testing.assert_array_equal(shard.read(a, b), data[a:b])


def test_a_disk_that_takes_a_little_at_a_time_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short writes, chunks of a few bytes, and a file that is told to go to disk early; the sums
    are the file's.
    """
    from dspark.cache.files.checksum import file_sums
    from dspark.cache.files.layout import StoredArray
    from dspark.cache.parts import shard_writer

    spec = StoredArray("x", (9000, 3), "uint8", 8, 0, 1)
    data = np.random.default_rng(0).integers(0, 9, spec.shape).astype(np.uint8)
    sums = shard_writer.write_shard(tmp_path / "whole", spec, data, b"tag")
    assert sums == file_sums(tmp_path / "whole")
    writev = os.writev
    monkeypatch.setattr(shard_writer, "RUN_BYTES", 4000)
    monkeypatch.setattr(shard_writer, "WRITEBACK_BYTES", 1000)
    monkeypatch.setattr(shard_writer, "IOV", 5)
    monkeypatch.setattr(os, "writev", lambda fd, pieces: writev(fd, [pieces[0][:3]]))
    assert shard_writer.write_shard(tmp_path / "bits", spec, data, b"tag", to_disk=True) == sums
    assert (tmp_path / "bits").read_bytes() == (tmp_path / "whole").read_bytes()


def test_unpacked_chunks_whose_index_is_not_theirs_are_damage(tmp_path: Path) -> None:
    """A sound index (its crc32c right) of other lengths, and a file that is longer than its
    chunks.
    """
    from dspark.cache.files.layout import StoredArray
    from dspark.cache.parts.shard import Shard
    from dspark.cache.parts.shard_writer import write_shard

    spec = StoredArray("x", (300, 4), "uint8", 128, 0, 0)
    data = np.arange(1200, dtype=np.uint32).astype(np.uint8).reshape(300, 4)
    write_shard(tmp_path / "good", spec, data)
    np.testing.assert_array_equal(Shard(tmp_path / "good", spec).read(100, 270), data[100:270])
    write_shard(tmp_path / "packed", dataclasses.replace(spec, level=1), data)
    whole = (tmp_path / "good").read_bytes()
    (tmp_path / "longer").write_bytes(b"x" + whole)
    for name in ("packed", "longer"):
        with pytest.raises(errors.DamagedCacheError, match="not 3 chunks of 516 bytes"):
            Shard(tmp_path / name, spec).read(0, 10)


@pytest.mark.parametrize(
    "byte", [0, 511, 512, 515], ids=["first", "last", "sum's first", "sum's last"]
)
def test_one_flipped_bit_of_an_unpacked_chunk_is_named(tmp_path: Path, byte: int) -> None:
    """In the values or in the sum behind them, wherever in the chunk the wanted rows lie; rows of
    other chunks are still read.
    """
    from dspark.cache.files.checksum import crc32c
    from dspark.cache.files.layout import StoredArray
    from dspark.cache.parts.shard import Shard
    from dspark.cache.parts.shard_writer import write_shard

    spec = StoredArray("x", (300, 4), "uint8", 128, 0, 0)
    data = np.arange(1200, dtype=np.uint32).astype(np.uint8).reshape(300, 4)
    write_shard(tmp_path / "x", spec, data)
    raw = bytearray((tmp_path / "x").read_bytes())
    raw[516 + byte] ^= 0x10
    (tmp_path / "x").write_bytes(bytes(raw))
    stored, computed = int.from_bytes(raw[1028:1032], "little"), crc32c(bytes(raw[516:1028]))
    says = rf"x: chunk 1 \(rows 128-256\): stored crc32c {stored}, computed {computed}$"
    shard = Shard(tmp_path / "x", spec)
    for start, stop in ((128, 256), (100, 300), (130, 140), (255, 256), (0, 129)):
        with pytest.raises(errors.DamagedCacheError, match=says):
            shard.read(start, stop)
    np.testing.assert_array_equal(shard.read(0, 128), data[:128])
    np.testing.assert_array_equal(shard.read(256, 300), data[256:])


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_fork_of_a_process_that_wrote_can_write(tmp_path: Path) -> None:
    """It has none of the threads that compressed for its parent."""
    from dspark.cache.files.layout import StoredArray
    from dspark.cache.parts.shard_writer import write_shard

    data = np.arange(4000, dtype=np.uint8).reshape(2000, 2)
    spec = StoredArray("x", (2000, 2), "uint8", 100, 0, 1)
    write_shard(tmp_path / "own", spec, data)
    child = multiprocessing.get_context("fork").Process(
        target=write_shard, args=(tmp_path / "child", spec, data)
    )
    child.start()
    child.join(20)
    hangs = child.is_alive()
    child.kill()
    assert not hangs
    assert (tmp_path / "child").read_bytes() == (tmp_path / "own").read_bytes()


def test_the_residue_is_that_of_every_sum() -> None:
    """Bytes and their own crc32c behind them always sum to the same."""
    from dspark.cache.files import checksum
    from dspark.cache.parts.shard import RESIDUE

    for data in (b"", b"123456789", bytes(1000), bytes(range(256)) * 77):
        whole = np.frombuffer(data + checksum.crc32c(data).to_bytes(4, "little"), np.uint8)
        assert checksum.crc32c(whole) == RESIDUE


def test_a_sound_file_of_another_part_or_array_is_found(
    tmp_path: Path, store: Path, plan: Manifest
) -> None:
    """Equal sizes, every checksum in it right: the tag at its beginning is of another part (or
    store), so a reader refuses it when it opens it.
    """
    stores.write_store(tmp_path / "other.zarr", LENGTHS, m=plan, seed=5)
    name = "parts/000000000001/sample_key/c/0/0"
    whole = (store / name).read_bytes()
    other = (tmp_path / "other.zarr" / name).read_bytes()
    (store / name).write_bytes(other)  # same number, another store: only what it holds tells
    assert any(
        "sample_key" in finding and ("begins with" in finding or "checksums" in finding)
        for finding in verify(store).findings
    )
    (store / name).write_bytes(whole)
    for array in ("aux_code/c/0/0/0", "input_ids/c/0"):
        a, b = (store / "parts" / part / array for part in ("000000000000", "000000000001"))
        one, two = a.read_bytes(), b.read_bytes()
        a.write_bytes(two[: len(one)].ljust(len(one), b"x"))
        with pytest.raises(errors.DamagedCacheError, match=r"begins with \w{32}, expected \w{32}"):
            dspark.cache.open(store).read(0)
        assert not verify(store).ok
        a.write_bytes(one)
    assert verify(store).ok
