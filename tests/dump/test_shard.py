"""Several dumps of one plan: into one store and into stores of their own that are merged; the bytes
are those of a single writer.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
from dump_runs import assert_same, files

import dspark.cache
from dspark.cache.errors import (
    DamagedCacheError,
    ExistsError,
    IncompleteCacheError,
    MismatchError,
    Stopped,
    UsageError,
)
from dspark.cache.files.place import place_of
from dspark.cache.files.urls import where
from dspark.cache.stores.merge import append, merge
from dspark.cache.stores.verify import drop_damaged, verify
from dspark.dump import actors, begin
from dspark.dump.config import DumpConfig
from dspark.dump.progress import Display
from dspark.dump.run import dump
from dspark.dump.shard import Shard


@pytest.mark.parametrize("text", ["2/2", "-1/2", "1", "a/b", "0/0", "1/99999999"])
def test_a_shard_that_cannot_be_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="I from 0 to N - 1"):
        Shard.parse(text)


def test_every_part_belongs_to_one_shard() -> None:
    parts = [source * 10**8 + block for source in range(3) for block in range(7)]
    for count in (1, 2, 4):
        shards = [Shard(i, count) for i in range(count)]
        assert all(sum(s.takes(p) for s in shards) == 1 for p in parts)


def shard(config: DumpConfig, text: str, output: Path) -> DumpConfig:
    return dataclasses.replace(config, shard=text, output=output)


def test_shards_give_the_bytes_of_one_writer(
    config: DumpConfig, show: Display, tmp_path: Path
) -> None:
    config = dataclasses.replace(config, aux_bits=4, last_bits=4)
    dump(config, show)
    parts = len(list((config.output / "parts").glob("0*")))
    assert parts > 4
    together = tmp_path / "together.zarr"
    first = dump(shard(config, "0/2", together), show)
    assert (first["complete"], 0 < first["parts"] < parts) == (False, True)
    with pytest.raises(IncompleteCacheError):
        dspark.cache.open(together)
    assert verify(together).ok
    assert dump(shard(config, "1/2", together), show)["complete"]
    assert_same(config.output, together)
    assert dump(shard(config, "1/2", together), show)["parts"] == parts  # nothing left to do
    own = [tmp_path / f"{i}.zarr" for i in range(2)]
    for i, output in enumerate(own):
        assert not dump(shard(config, f"{i}/2", output), show)["complete"]
    out = tmp_path / "merged.zarr"
    with pytest.raises(MismatchError, match=r"rows \d+-\d+, .* are missing"):
        merge(out, own[:1])
    assert not out.exists()
    merge(out, own)
    assert_same(config.output, out)
    assert verify(out).ok
    assert all(verify(o).ok for o in own)
    with pytest.raises(ExistsError):
        merge(out, own)
    # A part that is in both is taken once; one that differs is named.
    again = tmp_path / "again.zarr"
    merge(again, [*own, config.output])
    assert_same(config.output, again)


def test_one_shard_calibrates_for_all(
    config: DumpConfig, show: Display, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the lock meanwhile, so that another one waits; a shard that comes later does not."""
    together, held = tmp_path / "together.zarr", list[bool]()
    learn = begin.calibration

    def watched(*args: Any) -> Any:
        held.append(together.with_name("together.zarr.lock").exists())
        return learn(*args)

    monkeypatch.setattr(begin, "calibration", watched)
    for text in ("1/2", "0/2"):
        dump(shard(dataclasses.replace(config, aux_bits=4, last_bits=4), text, together), show)
    assert held == [True]
    assert dspark.cache.open(together).manifest.complete


def test_what_cannot_be_merged_is_refused(
    config: DumpConfig, show: Display, tmp_path: Path
) -> None:
    dump(config, show)
    other = dataclasses.replace(config, output=tmp_path / "other.zarr", seq_length=200)
    dump(other, show)
    with pytest.raises(MismatchError, match=r"run.seq_length"):
        merge(tmp_path / "out.zarr", [config.output, other.output])
    with pytest.raises(UsageError, match="--overwrite"):
        dataclasses.replace(config, shard="0/2", overwrite=True)
    assert [p.name for p in tmp_path.glob("*out*")] == []


def test_a_second_corpus_is_appended(config: DumpConfig, show: Display, tmp_path: Path) -> None:
    dump(config, show)
    rows = Path(config.sources[0]).read_text().splitlines()
    second = tmp_path / "second.jsonl"
    second.write_text("\n".join(rows[5:25]) + "\n")
    job = dataclasses.replace(config, data=str(second), output=tmp_path / "second.zarr")
    dump(job, show)
    if (plans := [dspark.cache.open(c.output).manifest.dump.block_rows for c in (config, job)])[
        0
    ] != plans[1]:
        pytest.fail(f"blocks of {plans} rows")
    before = [dspark.cache.open(c.output) for c in (config, job)]
    expected = [c[i] for c in before for i in range(len(c))]
    joined = tmp_path / "joined.zarr"
    merge(joined, [config.output, job.output])
    append(config.output, [job.output])
    assert_same(joined, config.output)
    assert verify(joined).ok, verify(joined).findings
    store = dspark.cache.open(config.output)
    assert [s.id for s in store.manifest.sources] == ["rows.jsonl", "second.jsonl"]
    assert len(store) == len(expected)
    for a, b in zip(store, expected, strict=True):
        assert (a.row, a.key) == (b.row, b.key)
        assert (a.aux == b.aux).all()
    with pytest.raises(MismatchError, match="is already in"):
        append(config.output, [job.output])


@pytest.fixture
def two(config: DumpConfig, show: Display, tmp_path: Path) -> list[Path]:
    """Stores of three corpora with one plan."""
    rows = Path(config.sources[0]).read_text().splitlines()
    out = []
    for name, chosen in (("a", rows[:20]), ("b", rows[5:25]), ("c", rows[10:30])):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("\n".join(chosen) + "\n")
        out.append(tmp_path / f"{name}.zarr")
        dump(dataclasses.replace(config, data=str(data), output=out[-1]), show)
    return out


def test_parts_that_a_stopped_append_left_are_not_taken_for_others(
    two: list[Path], tmp_path: Path
) -> None:
    """They have the numbers of the next corpus's parts."""
    a, b, c = two
    expected = tmp_path / "expected.zarr"
    merge(expected, [a, c])
    left = tmp_path / "left.zarr"
    shutil.copytree(a, left)
    append(left, [b])
    stray = sorted((left / "parts").glob("00010000*"))[0]
    shutil.copytree(stray, a / "parts" / stray.name)
    found = verify(a)
    assert [f"{a / 'parts' / stray.name}: a part of a source" in f for f in found.findings] == [
        True
    ]
    healed = tmp_path / "healed.zarr"
    shutil.copytree(a, healed)
    assert drop_damaged(healed, found) == [stray.name]
    assert verify(healed).ok
    append(a, [c])
    assert_same(expected, a)


@pytest.mark.parametrize("how", ["gone", "cut"])
def test_what_is_not_whole_is_not_joined(two: list[Path], tmp_path: Path, how: str) -> None:
    a, b, _ = two
    before = files(a)
    file = next((b / "parts").glob("0*/aux_code/c/0/0/0"))
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    for join in (lambda: append(a, [b]), lambda: merge(tmp_path / "out.zarr", [a, b])):
        with pytest.raises(DamagedCacheError, match=rf"{file}: .*Nothing was changed. Run"):
            join()
    assert files(a) == before
    assert not list(tmp_path.glob("*out.zarr*"))


def test_an_object_store_holds_the_same(
    config: DumpConfig, show: Display, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dump there, in shards, one of them begun again; its log is here."""
    pytest.importorskip("obstore")
    monkeypatch.chdir(tmp_path)
    dump(config, show)
    there = f"memory://bucket/{tmp_path.name}/there.zarr"
    for text in ("0/2", "0/2", "1/2"):
        out = dump(dataclasses.replace(config, output=where(there), shard=text), show)
    assert out["complete"]
    place = place_of(there)
    assert {n: place.read(n) for n in place.sizes("")} == files(config.output)
    assert (tmp_path / "there.zarr.shard-1-of-2.log").is_file()
    whole = dataclasses.replace(config, output=where(f"{there}2"))
    assert dump(whole, show)["complete"]
    with pytest.raises(ExistsError):
        dump(whole, show)
    assert dump(dataclasses.replace(whole, overwrite=True), show)["complete"]
    assert verify(f"{there}2").ok


def test_what_ray_is_given(config: DumpConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards whose paths hold on any node, and GPUs only where there are some."""
    monkeypatch.chdir(config.output.parent)
    asked = dataclasses.replace(
        config, ray=3, data="rows.jsonl", tensor_parallel_size=4, engine="vllm"
    )
    made = actors.shards(asked)
    assert [c.shard for c in made] == ["0/3", "1/3", "2/3"]
    assert all(c.ray is None and c.break_lock and Path(c.sources[0]).is_absolute() for c in made)
    assert actors.gpus_of(asked, 8) == 4
    assert (
        actors.gpus_of(asked, 0) == actors.gpus_of(dataclasses.replace(asked, device="cpu"), 8) == 0
    )
    with pytest.raises(UsageError, match="--ray or --shard"):
        dataclasses.replace(config, ray=2, shard="0/2")


def test_a_shard_that_a_cluster_stops_has_not_failed(
    config: DumpConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray makes again what has no process; an error that is returned ends the dump."""

    def ended(code: int) -> NoReturn:
        raise SystemExit(code)

    def stopped(config: DumpConfig, show: Display) -> NoReturn:
        raise given

    monkeypatch.setattr("dspark.dump.run.dump", stopped)
    monkeypatch.setattr(os, "_exit", ended)
    given: Exception = Stopped("stopped.")
    with pytest.raises(SystemExit):
        actors.run_shard(config)
    given = UsageError("of another kind")
    assert actors.run_shard(config) == (None, "of another kind")
