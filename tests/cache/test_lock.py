"""The owner lock: one writer, the second learns who; a dead owner's lock is taken over; one
elsewhere is judged by its age.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dspark.cache.errors import LockedError, LostLockError
from dspark.cache.files import lock, lock_files
from dspark.cache.files.lock import Lock, Owner, hold, take
from dspark.cache.files.lock_files import FolderLocks, owned

HOLDER = """
import sys, time
from pathlib import Path
from dspark.cache.files.lock_files import owned
with owned(Path(sys.argv[1]), "dspark-dump"):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(output: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock of ``output``."""
    found = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(output)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert found.stdout is not None
    assert found.stdout.readline() == "held\n"
    found.stdout.close()
    return found


def elsewhere(folder: Path, seconds: float, **changes: object) -> None:
    """A lock of a process on another machine, touched ``seconds`` ago."""
    owner = dataclasses.replace(
        Owner.here("dspark-dump"), host="node7", machine="node7 boot", **changes
    )
    path = folder / "hs.zarr.lock"
    path.write_text(json.dumps(dataclasses.asdict(owner)))
    os.utime(path, (time.time() - seconds,) * 2)


def test_second_writer_learns_who_writes_and_a_killed_one_is_taken_over(tmp_path: Path) -> None:
    output = tmp_path / "hs.zarr"
    other = holder(output)
    with pytest.raises(LockedError) as refused, owned(output, "dspark-dump", break_lock=True):
        pass
    assert f"pid {other.pid}" in str(refused.value)
    assert "being written by dspark-dump (host" in str(refused.value)
    assert str(refused.value).count(". ") == 0
    os.kill(other.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while lock.started(other.pid) and time.monotonic() < deadline:  # a zombie counts as gone
        time.sleep(0.01)
    with owned(output, "dspark-dump"):
        assert json.loads((tmp_path / "hs.zarr.lock").read_text())["pid"] == os.getpid()
    other.wait()
    assert not list(tmp_path.iterdir())


def test_a_process_id_that_is_used_again_is_not_the_owner(tmp_path: Path) -> None:
    mine = Owner.here("dspark-dump")
    (tmp_path / "x").write_text(json.dumps(dataclasses.asdict(mine)))
    assert not isinstance(take(FolderLocks(tmp_path), "x", mine, of="x"), Lock)
    (tmp_path / "x").write_text(
        json.dumps(dataclasses.asdict(dataclasses.replace(mine, started="1")))
    )
    got = take(FolderLocks(tmp_path), "x", mine, of="x")
    assert isinstance(got, Lock)
    got.release()


@pytest.mark.parametrize("token", ["{", "[1]", '{"who": 3}', "[" * 5000, ""])
def test_a_lock_that_names_nobody_counts_by_its_age(tmp_path: Path, token: str) -> None:
    path = tmp_path / "hs.zarr.lock"
    path.write_text(token)
    with pytest.raises(LockedError, match="by another process"), owned(tmp_path / "hs.zarr", "x"):
        pass
    os.utime(path, (1, 1))
    with pytest.raises(LockedError, match="--break-lock"), owned(tmp_path / "hs.zarr", "x"):
        pass
    with owned(tmp_path / "hs.zarr", "x", break_lock=True):
        pass


def test_another_machine_is_refused_while_young_and_broken_on_demand_when_old(
    tmp_path: Path,
) -> None:
    output = tmp_path / "hs.zarr"
    elsewhere(tmp_path, 0)
    for flag in (False, True):
        with (
            pytest.raises(LockedError, match=r"host node7, pid \d+, since"),
            owned(output, "x", break_lock=flag),
        ):
            pass
    elsewhere(tmp_path, 500)
    with pytest.raises(LockedError, match="give --break-lock"), owned(output, "x"):
        pass
    with owned(output, "x", break_lock=True):
        pass
    assert not list(tmp_path.iterdir())


def test_holder_whose_lock_was_broken_stops(tmp_path: Path) -> None:
    with owned(tmp_path / "hs.zarr", "x") as held:
        held.check()
        elsewhere(tmp_path, 0)
        with pytest.raises(LostLockError, match="lost its lock"):
            held.check()
    assert (tmp_path / "hs.zarr.lock").exists()  # the other's


def test_the_heartbeat_keeps_a_lock_young(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.02)
    path = tmp_path / "hs.zarr.lock"
    with owned(tmp_path / "hs.zarr", "x"):
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        found = FolderLocks(tmp_path).read(path.name)
        assert found is not None
        assert found.age < 5


def test_waits_for_a_lock_that_is_released_in_time(tmp_path: Path) -> None:
    where = FolderLocks(tmp_path)
    first = hold(where, "x", "a", of="x")
    threading.Timer(0.3, first.release).start()
    hold(where, "x", "b", of="x", wait=10).release()


def test_without_hard_links_a_lock_is_made_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(next(iter(lock_files.NO_LINKS)), "no links here")

    monkeypatch.setattr(os, "link", refuse)
    with (
        owned(tmp_path / "hs.zarr", "x"),
        pytest.raises(LockedError),
        owned(tmp_path / "hs.zarr", "y"),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_of_many_that_take_over_at_once_one_wins(tmp_path: Path) -> None:
    """Threads stand for processes: each with an owner of its own, and delays at random between the
    calls.
    """
    where = FolderLocks(tmp_path)
    dead = dataclasses.replace(Owner.here("x"), started="1")
    for _ in range(20):
        (tmp_path / "x").write_text(json.dumps(dataclasses.asdict(dead)))
        meet, won = threading.Barrier(4), []

        def one(meet: threading.Barrier = meet, won: list[Lock] = won) -> None:  # type: ignore[assignment]
            meet.wait()
            got = take(where, "x", Owner.here("x"), of="x")
            if isinstance(got, Lock):
                won.append(got)

        threads = [threading.Thread(target=one) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert len(won) == 1
        won[0].check()
        won[0].release()
        assert not list(tmp_path.iterdir())


def test_a_taker_that_died_half_way_stops_nobody(tmp_path: Path) -> None:
    where = FolderLocks(tmp_path)
    dead = dataclasses.replace(Owner.here("x"), started="1")
    data = json.dumps(dataclasses.asdict(dead)).encode()
    (tmp_path / "x").write_bytes(data)
    found = where.read("x")
    assert found is not None
    (tmp_path / f"x.{found.version}").write_bytes(data)
    got = take(where, "x", Owner.here("x"), of="x")
    assert isinstance(got, Lock)
    got.release()
    assert not list(tmp_path.iterdir())


def test_folders_made_for_a_lock_go_with_it_unless_something_is_in_them(tmp_path: Path) -> None:
    with owned(tmp_path / "a" / "b" / "hs.zarr", "x"):
        pass
    assert not list(tmp_path.iterdir())
    with owned(tmp_path / "a" / "run", "x", inside=True):
        (tmp_path / "a" / "run" / "kept").touch()
    assert [p.name for p in (tmp_path / "a" / "run").iterdir()] == ["kept"]


def test_what_a_killed_replacement_left_is_deleted_by_the_next_writer(tmp_path: Path) -> None:
    """Not only by the next that replaces: a store's worth of disk would be lost."""
    output = tmp_path / "hs.zarr"
    for name in ("hs.zarr", ".staging-hs.zarr", ".staging-hs.zarr.old", ".staging-other"):
        (tmp_path / name / "parts").mkdir(parents=True)
    with pytest.raises(LockedError), owned(output, "first"), owned(output, "second"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [".staging-other", "hs.zarr"]
