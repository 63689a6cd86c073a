"""Stores in an object store: equal to local ones, whatever the service does; nothing half-written
is taken for whole.
"""

from __future__ import annotations

import errno
import os
import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

import dspark.cache
from dspark.cache.errors import (
    CacheError,
    DamagedCacheError,
    ExistsError,
    IncompleteCacheError,
    LockedError,
    NotACacheError,
    StoreWriteError,
    UsageError,
)
from dspark.cache.files import bucket, object_service
from dspark.cache.files.block_cache import BLOCK, BlockCache
from dspark.cache.files.lock_files import owned
from dspark.cache.files.place import Memory, ends, place_of
from dspark.cache.files.urls import STORE, Url, where
from dspark.cache.parts.committed import scan_parts
from dspark.cache.stores.merge import append, merge
from dspark.cache.stores.rebuild import rebuild
from dspark.cache.stores.recode import recode
from dspark.cache.stores.subset import subset
from dspark.cache.stores.verify import drop_damaged, verify
from dspark.cache.writer import StoreWriter
from dspark.tools.cli import main
from dspark.tools.stores.info import info
from s3_server import BUCKET, Faulty, s3_server
from stores import commit, manifest, write_store

NOWHERE = "s3://no-such-bucket/x"
LENGTHS = [30, 40, 50, 60, 20, 30, 44, 9, 80, 33]


@pytest.fixture(scope="module")
def s3() -> Iterator[Faulty]:
    """A server costs a tenth of a second per store and test: it is asked where its answers matter,
    the rest is tested in memory.
    """
    with s3_server() as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_CACHE_DIR", str(tmp_path / "objects"))
    bucket._pieces.cache_clear()


def url(tmp_path: Path, name: str, scheme: str = "memory") -> str:
    return f"{scheme}://{BUCKET}/{tmp_path.name}/{name}"


def assert_same(local: Path, remote: str) -> None:
    place = place_of(remote)
    here = {
        p.relative_to(local).as_posix(): p.read_bytes() for p in local.rglob("*") if p.is_file()
    }
    assert {name: place.read(name) for name in place.sizes("")} == here


@pytest.mark.parametrize(
    "text",
    [
        "ftp://a/b",
        "file://a/b",
        "http://a/b",
        "s3://key:secret@bucket/x",
        "s3://bucket",
        "az://c/x?sig=abc",
        "s3://b/a/../c",
    ],
)
def test_what_is_no_store_is_refused_before_anything_else(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        dspark.cache.open(text)
    assert caught.value.exit_code == 2
    assert "secret" not in str(caught.value)
    assert "abc" not in str(caught.value)


def test_no_command_writes_to_memory() -> None:
    with pytest.raises(click.BadParameter, match="objects in memory end with the command"):
        STORE.convert("memory://b/x", None, None)


def test_urls_and_paths_are_told_apart(tmp_path: Path) -> None:
    assert where("s3://b/x/") == Url("s3://b/x")
    assert where(Path("s3://b/x")) == Url("s3://b/x")
    assert where("file:///tmp/x") == Path("/tmp/x")
    assert where("a:b") == Path("a:b")
    assert (Url("s3://b/k/x").bucket, Url("s3://b/k/x").key, Url("s3://b/k/x").name) == (
        "b",
        "k/x",
        "x",
    )


@pytest.mark.parametrize("scheme", ["memory", "s3"])
def test_a_store_there_is_the_store_here(
    request: pytest.FixtureRequest, tmp_path: Path, scheme: str
) -> None:
    """Written, verified, read, recoded and merged; over S3 through a service that fails now and
    then.
    """
    s3 = request.getfixturevalue("s3") if scheme == "s3" else None
    lengths = LENGTHS[:4] if s3 else LENGTHS
    if s3:
        s3.faults = 0.15
        s3.count.clear()
    local, remote = tmp_path / "a.zarr", url(tmp_path, "a.zarr", scheme)
    write_store(local, lengths)
    write_store(remote, lengths)
    assert_same(local, remote)
    assert verify(remote).ok
    mine, theirs = info(local), info(remote)
    assert {k for k in mine if mine[k] != theirs[k]} == {"path"}
    there = dspark.cache.open(remote)
    for a, b in zip(pickle.loads(pickle.dumps(there)), dspark.cache.open(local), strict=True):
        np.testing.assert_array_equal(a.aux, b.aux)
        np.testing.assert_array_equal(a.last, b.last)
    for pack in ("zstd",) if s3 else ("zstd", "none"):
        here, other = tmp_path / f"{pack}.zarr", url(tmp_path, f"{pack}.zarr", scheme)
        recode(local, here, aux_bits=4, last_bits=4, pack=pack)
        recode(remote, other, aux_bits=4, last_bits=4, pack=pack)
        assert_same(here, other)
        pair = zip(dspark.cache.open(other), dspark.cache.open(here), strict=True)
        assert all((a.aux == b.aux).all() for a, b in pair)
    merge(url(tmp_path, "merged.zarr", scheme), [remote])
    assert_same(local, url(tmp_path, "merged.zarr", scheme))
    if s3:
        assert min(s3.count[kind] for kind in ("500", "503", "cut", "cut before the answer")) > 3, (
            s3.count
        )
        s3.faults = 0.0
        return
    merge(url(tmp_path, "there.zarr"), [local])
    merge(tmp_path / "here.zarr", [remote])
    merge(url(tmp_path, "both.zarr"), [remote, url(tmp_path, "there.zarr")])
    for name in ("there.zarr", "both.zarr"):
        assert_same(local, url(tmp_path, name))
    assert verify(tmp_path / "here.zarr").ok


def test_reads_are_few(s3: Faulty, tmp_path: Path) -> None:
    remote = url(tmp_path, "a.zarr", "s3")
    write_store(remote, LENGTHS[:6])
    s3.count.clear()
    store = dspark.cache.open(remote)
    assert len(store) == 6
    assert s3.count.total() <= 10  # manifest, the index and its eight arrays
    info(remote)
    assert s3.count.total() <= 25
    for i in range(len(store)):
        store.read(i)
    s3.count.clear()
    for i in range(len(store)):
        store.read(i)
    assert s3.count.total() == 0  # from the pieces that are kept here
    reader = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(reader.read(3).tokens.input_ids, store.read(3).tokens.input_ids)
    assert s3.count.total() == 1  # the record of a part


def test_what_has_no_record_counts_for_nothing(tmp_path: Path) -> None:
    local, remote = tmp_path / "a.zarr", url(tmp_path, "a.zarr")
    samples = write_store(local, LENGTHS)
    write_store(remote, LENGTHS, finish=False)
    place = place_of(remote)
    place.remove("parts/000000000002/zarr.json")  # as after a kill just before it was written
    with pytest.raises(IncompleteCacheError):
        dspark.cache.open(remote)
    writer = StoreWriter.resume(remote, manifest())
    assert sorted(writer.committed) == [0, 1, 3]
    with pytest.raises(CacheError, match="block 2"):
        writer.finish()
    commit(writer, 2, samples)
    writer.finish()
    assert_same(local, remote)
    with pytest.raises(ExistsError):
        write_store(remote, LENGTHS)


def test_a_replacement_that_was_killed_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old store's manifest is deleted first, and something that tells whose it was last."""
    import obstore

    local, remote = tmp_path / "a.zarr", url(tmp_path, "a.zarr")
    write_store(local, LENGTHS)
    write_store(remote, LENGTHS)
    delete = obstore.delete

    def killed(store: object, names: list[str]) -> None:
        delete(store, names[:-1])  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as stop:
        stop.setattr(obstore, "delete", killed)
        with pytest.raises(KeyboardInterrupt):
            place_of(remote).remove("")
    with pytest.raises(NotACacheError):
        dspark.cache.open(remote)
    with pytest.raises(ExistsError):
        write_store(remote, LENGTHS)
    write_store(remote, LENGTHS, overwrite=True)
    assert_same(local, remote)
    place = place_of(url(tmp_path, "mine"))
    place.write("zarr.json", b"{}")
    with pytest.raises(ExistsError, match="is not a dspark store"):
        write_store(url(tmp_path, "mine"), LENGTHS, overwrite=True)


def test_damage_is_found_and_mended(tmp_path: Path) -> None:
    local, remote = tmp_path / "a.zarr", url(tmp_path, "a.zarr")
    samples = write_store(local, LENGTHS)
    write_store(remote, LENGTHS)
    place = place_of(remote)
    name = "parts/000000000001/aux_code/c/0/0/0"
    data = bytearray(place.read(name))
    data[100] ^= 1
    place.write(name, bytes(data))
    report = verify(remote)
    assert report.damaged == {"000000000001"}
    assert all(f"{remote}/parts/000000000001/aux_code" in finding for finding in report.findings)
    with pytest.raises(DamagedCacheError, match="aux_code"):
        [dspark.cache.open(remote).read(i) for i in range(10)]
    drop_damaged(remote, report)
    writer = StoreWriter.resume(remote, manifest())
    commit(writer, 1, samples)
    writer.finish()
    assert_same(local, remote)
    place.remove("index")
    with pytest.raises(DamagedCacheError, match="rebuild-index"):
        len(dspark.cache.open(remote))
    rebuild(remote)
    assert verify(remote).ok


@pytest.mark.parametrize("at", [5, 100, -9])  # in the tag, a chunk, the shard's index
def test_what_was_damaged_when_it_was_fetched_is_not_kept(tmp_path: Path, at: int) -> None:
    """Else a store that was repaired would never be read again on this node."""
    remote = url(tmp_path, "a.zarr")
    write_store(remote, LENGTHS)
    place, name = place_of(remote), "parts/000000000001/aux_code/c/0/0/0"
    data = place.read(name)
    damaged = bytearray(data)
    damaged[at] ^= 1
    place.write(name, bytes(damaged))
    with pytest.raises(DamagedCacheError, match="aux_code"):
        [dspark.cache.open(remote).read(i) for i in range(10)]
    place.write(name, data)
    [dspark.cache.open(remote).read(i) for i in range(10)]
    place.write(name, bytes(damaged))
    [dspark.cache.open(remote).read(i) for i in range(10)]  # from pieces, which are sound


@pytest.mark.parametrize("command", ["merge", "subset"])
def test_what_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    write_store(tmp_path / "a.zarr", LENGTHS)
    out = url(tmp_path, "out.zarr")

    def fails(*args: object) -> None:
        raise RuntimeError("stop")

    def make() -> None:
        if command == "merge":
            merge(out, [tmp_path / "a.zarr"])
        else:
            subset(tmp_path / "a.zarr", out, ["tokens>=30"])

    with monkeypatch.context() as broken:
        for module in ("stores.merge", "writer"):
            broken.setattr(f"dspark.cache.{module}.write_index", fails)
        with pytest.raises(RuntimeError, match="stop"):
            make()
    assert not place_of(out).exists()
    make()
    assert verify(out).ok
    with pytest.raises(ExistsError, match="another name"):
        make()
    place_of(out).remove("zarr.json")
    with pytest.raises(ExistsError, match="no zarr.json: what a command left"):
        make()


def test_a_store_there_is_repaired_by_one_command_at_a_time(tmp_path: Path) -> None:
    remote = url(tmp_path, "a.zarr")
    write_store(remote, LENGTHS)
    with owned(where(remote), "another"):
        out = CliRunner().invoke(main, ["verify", remote, "--drop-damaged"])
    assert (out.exit_code, "another" in out.stderr) == (1, True)
    assert CliRunner().invoke(main, ["verify", remote, "--drop-damaged"]).exit_code == 0


def test_metadata_is_read_within_bounds(
    s3: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no record of ours can be is not read whole, wherever it lies."""
    for store in (tmp_path / "a.zarr", url(tmp_path, "a.zarr"), url(tmp_path, "a.zarr", "s3")):
        write_store(store, LENGTHS[:2])
        place_of(store).write("zarr.json", b"[" * 100_000)
        with pytest.raises(DamagedCacheError, match="nested too deep"):
            dspark.cache.open(store)
        with monkeypatch.context() as small:
            small.setattr("dspark.cache.json_text.LARGEST", 99_999)
            with pytest.raises(DamagedCacheError, match="100,000 bytes, more than any"):
                dspark.cache.open(store)


def test_a_part_that_is_committed_while_another_shard_looks_does_not_stop_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = url(tmp_path, "a.zarr")
    write_store(remote, LENGTHS)
    whole = sorted(scan_parts(remote))
    read = bucket.Bucket.read
    late = "parts/000000000002/zarr.json"

    def too_early(self: bucket.Bucket, name: str, limit: int | None = None) -> bytes:
        if name == late:
            raise object_service.AbsentError(errno.ENOENT, "no such object", name)
        return read(self, name, limit)

    monkeypatch.setattr(bucket.Bucket, "read", too_early)
    assert sorted(scan_parts(remote)) == [n for n in whole if n != 2]
    monkeypatch.undo()
    place_of(remote).write(late, b"{}")
    with pytest.raises(DamagedCacheError, match="no Zarr v3 group"):
        scan_parts(remote)


def test_missing_credentials_are_said() -> None:
    """A service's library looks for a machine's role last, and its error names that address."""
    found = "Error performing PUT http://169.254.169.254/latest/api/token in 11ms - 403 Forbidden"
    with (
        pytest.raises(
            object_service.RemoteError, match="no credentials were found: set them as for"
        ),
        object_service.service_errors(Url("s3://bkt/a.zarr")),
    ):
        raise OSError(found)


def test_errors_name_the_store_and_no_secret(s3: Faulty, tmp_path: Path) -> None:
    with pytest.raises(NotACacheError):
        dspark.cache.open(url(tmp_path, "none.zarr", "s3"))
    began = time.monotonic()
    with pytest.raises(
        CacheError, match=f"^{NOWHERE}: the service has no bucket no-such"
    ) as caught:
        dspark.cache.open(NOWHERE)
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)
    with pytest.raises(CacheError, match="could not be written: the service has no bucket no-such"):
        place_of(NOWHERE).write("a", b"")
    assert time.monotonic() - began < 5  # it is not asked again and again


@pytest.mark.parametrize("scheme", ["memory", "s3"])
def test_one_writer_at_a_time(s3: Faulty, tmp_path: Path, scheme: str) -> None:
    store = where(url(tmp_path, "a.zarr", scheme))
    with owned(store, "one") as lock:
        lock.check()
        with pytest.raises(LockedError, match="one"), owned(store, "two"):
            pass
    with owned(store, "two"):
        pass


def test_append_there(tmp_path: Path) -> None:
    import dataclasses

    from dspark.cache.manifest import SourceInfo

    remote = url(tmp_path, "a.zarr")
    write_store(remote, LENGTHS)
    second = dataclasses.replace(
        manifest(), sources=[SourceInfo(id="more", sha256="1", limit=None)]
    )
    write_store(tmp_path / "b.zarr", LENGTHS[:4], m=second)
    append(remote, [tmp_path / "b.zarr"])
    assert verify(remote).ok
    assert len(dspark.cache.open(remote)) == 14


def test_kept_pieces_are_bounded_checked_and_shared(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 256, 40 * BLOCK + 77, dtype=np.uint8).tobytes()
    asked: list[tuple[int, int]] = []

    def fetch(start: int, length: int) -> bytes:
        asked.append((start, length))
        return data[start : start + length]

    kept = BlockCache(tmp_path / "o", 10 * BLOCK)
    other = BlockCache(tmp_path / "o", 10 * BLOCK)  # as another process
    for start, length in [
        (5, 10),
        (BLOCK - 3, 9),
        (3 * BLOCK, 2 * BLOCK + 1),
        (40 * BLOCK + 70, 100),
        (0, 0),
    ]:
        assert (
            kept.read("x", len(data), start, length, fetch).tobytes()
            == data[start : start + length]
        )
    assert asked == [(0, BLOCK), (BLOCK, BLOCK), (3 * BLOCK, 3 * BLOCK), (40 * BLOCK, 77)]
    asked.clear()
    assert other.read("x", len(data), 5, 10, fetch).tobytes() == data[5:15]
    assert not asked
    broken = next(
        p for p in (tmp_path / "o").rglob("*") if p.is_file() and p.stat().st_size > BLOCK
    )
    broken.write_bytes(b"\0" * broken.stat().st_size)
    assert kept.read("x", len(data), 0, 6 * BLOCK, fetch).tobytes() == data[: 6 * BLOCK]
    for i in range(0, 40, 2):
        kept.read("x", len(data), i * BLOCK, BLOCK, fetch)
    assert sum(p.stat().st_size for p in (tmp_path / "o").rglob("*") if p.is_file()) <= 11 * BLOCK
    nothing = BlockCache(tmp_path / "n", 0)
    assert nothing.read("x", len(data), 5, 10, fetch).tobytes() == data[5:15]
    assert not (tmp_path / "n").exists()


def test_a_folder_that_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces are read again where they cannot be kept; the target's files must be here."""
    (tmp_path / "file").write_text("")
    remote = url(tmp_path, "a.zarr")
    write_store(remote, LENGTHS)
    monkeypatch.setenv("DSPARK_CACHE_DIR", str(tmp_path / "file" / "objects"))
    bucket._pieces.cache_clear()
    store = dspark.cache.open(remote)
    assert store.read(3).tokens.row == 3
    with pytest.raises(StoreWriteError, match="Set DSPARK_CACHE_DIR to a folder with free space"):
        _ = store.target


def test_threads_that_read_one_piece_at_once_keep_it(tmp_path: Path) -> None:
    data = bytes(range(256)) * 64
    kept = BlockCache(tmp_path / "o", 1 << 30)
    together = threading.Barrier(8)

    def fetch(start: int, length: int) -> bytes:
        together.wait(10)
        return data[start : start + length]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: kept.read("x", len(data), i, 9, fetch), range(8)))
    assert [f.tobytes() for f in found] == [data[i : i + 9] for i in range(8)]
    assert not kept._broken
    assert len([p for p in (tmp_path / "o").rglob("*") if p.is_file()]) == 1


@pytest.mark.parametrize("size", [50, BLOCK, BLOCK + 7])
def test_both_ends_of_an_object(size: int) -> None:
    data = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8).tobytes()
    first, last = ends(Memory(data), 16, 36)
    assert (first.tobytes(), last.tobytes()) == (data[:16], data[-36:])
    assert ends(Memory(data[:20]), 16, 36)[1].tobytes() == data[:20]
