"""Answers beside a store: joined in order, from wherever a part's are; none lost by what stops a
dump, none taken from another store.
"""

from __future__ import annotations

import dataclasses
import datetime
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from dump_runs import files

from dspark.cache.errors import (
    DamagedCacheError,
    EngineError,
    ExistsError,
    StoreWriteError,
    UsageError,
)
from dspark.cache.parts.record import PartRecord
from dspark.cache.stored_manifest import read_manifest
from dspark.cache.stores.verify import drop_damaged, verify
from dspark.cache.writer import StoreWriter
from dspark.dump.config import DumpConfig
from dspark.dump.progress import Display
from dspark.dump.regenerate import conversations as regenerate
from dspark.dump.regenerate.answer_files import AnswerFiles
from dspark.dump.run import dump
from dump_targets import chat


def line(row: int, said: str = "x") -> dict[str, object]:
    return {"row": row, "messages": said}


def record(index: int, rows: range, samples: int) -> PartRecord:
    return PartRecord(
        index=index,
        row_start=rows.start,
        row_stop=rows.stop,
        samples=samples,
        tokens=9,
        supervised_tokens=9,
        last_rows=8,
        truncated=0,
        dropped={},
        files={},
    )


RECORDS = {0: record(0, range(3), 2), 1: record(1, range(3, 5), 2), 2: record(2, range(5, 9), 1)}


@pytest.fixture
def answers(tmp_path: Path) -> AnswerFiles:
    """Those of a whole store of three parts, row 1 and rows 6 to 8 dropped."""
    out = AnswerFiles(tmp_path / "hs.zarr")
    for index, rows in enumerate(((0, 2), (3, 4), (5,))):
        out.save(index, [line(row) for row in rows])
    out.join(RECORDS)
    out.clear()
    return out


def said(answers: AnswerFiles) -> list[tuple[int, str]]:
    return [
        (a["row"], a["messages"]) for a in map(json.loads, answers.joined.read_text().splitlines())
    ]


def test_a_part_that_was_answered_again_takes_the_place_of_its_old_answers(
    answers: AnswerFiles,
) -> None:
    answers.save(1, [line(3, "new"), line(4, "new")])
    answers.check(RECORDS)
    answers.join(RECORDS)
    assert said(answers) == [(0, "x"), (2, "x"), (3, "new"), (4, "new"), (5, "x")]
    answers.join(RECORDS)  # once more, as after a crash before the parts' files were deleted
    assert [row for row, _ in said(answers)] == [0, 2, 3, 4, 5]


def test_answers_that_are_nowhere_are_named_and_what_is_there_is_kept(answers: AnswerFiles) -> None:
    before = answers.joined.read_bytes().splitlines(keepends=True)
    answers.joined.write_bytes(b"".join(before[:3]))
    answers.save(2, [line(5)])
    with pytest.raises(
        DamagedCacheError, match=r"found 1 answers to the rows 3 to 4, expected 2: .*part 1"
    ):
        answers.join(RECORDS)
    assert answers.joined.read_bytes() == b"".join(before[:3])
    answers.joined.unlink()
    with pytest.raises(DamagedCacheError, match="found 0 answers to the rows 0 to 2"):
        answers.check(RECORDS)


@pytest.mark.parametrize("broken", [b"{", b"[1]\n", b'{"messages": []}\n', b'{"row": 3}'])
def test_a_line_that_is_no_answer_is_named(broken: bytes, answers: AnswerFiles) -> None:
    answers.save(2, [])
    (answers.folder / "00000002.jsonl").write_bytes(broken)
    with pytest.raises(DamagedCacheError, match=r"00000002\.jsonl:1: found"):
        answers.check(RECORDS)


def test_a_file_that_cannot_be_read_is_a_sentence(answers: AnswerFiles) -> None:
    answers.joined.unlink()
    answers.joined.mkdir()
    with pytest.raises(DamagedCacheError, match="could not be read"):
        answers.check(RECORDS)


def test_a_join_that_fails_leaves_nothing_behind(answers: AnswerFiles) -> None:
    before = said(answers)
    answers.save(1, [line(3)])
    with pytest.raises(DamagedCacheError, match="found 1 answers"):
        answers.join(RECORDS)
    assert said(answers) == before
    assert {p.name for p in answers.joined.parent.iterdir()} == {
        answers.joined.name,
        answers.folder.name,
    }


def test_a_date_in_a_message_is_written_as_text(answers: AnswerFiles) -> None:
    """Data sets with a time in each message give dates, which JSON has not."""
    answers.save(
        0, [line(0), {"row": 2, "messages": [{"content": "x", "at": datetime.date(2026, 1, 2)}]}]
    )
    answers.join(RECORDS)
    assert '"at": "2026-01-02"' in answers.joined.read_text()


def test_the_answers_of_another_store_are_neither_lost_nor_taken(answers: AnswerFiles) -> None:
    with pytest.raises(ExistsError, match="answers of an earlier store"):
        answers.refuse_other((), overwrite=False)
    answers.refuse_other((), overwrite=True)
    with pytest.raises(UsageError, match="Choose another --output"):
        answers.refuse_other((str(answers.joined),), overwrite=True)
    answers.begin()
    assert not answers.joined.exists()
    answers.refuse_other(("org/name",), overwrite=False)
    answers.save(0, [line(0)])
    with pytest.raises(ExistsError):
        answers.refuse_other((), overwrite=False)


@pytest.fixture
def config(
    tiny: Path, tmp_path: Path, write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> DumpConfig:
    """Three parts of three rows."""
    monkeypatch.setattr(regenerate, "PART_ROWS", 3)
    return DumpConfig(
        model=str(tiny),
        data=str(write_rows([chat(f"u: {'one two ' * i}") for i in range(1, 10)])),
        output=tmp_path / "hs.zarr",
        regenerate=True,
        max_tokens=4,
        temperature=0.0,
        aux_bits=16,
        last_bits=16,
        seq_length=200,
    )


def again(config: DumpConfig) -> DumpConfig:
    return dataclasses.replace(config, resume=True)


def test_a_repaired_store_has_all_its_answers(config: DumpConfig) -> None:
    dump(config, Display())
    answers = AnswerFiles(config.output)
    before, store = answers.joined.read_bytes(), files(config.output)
    shard = max(
        (config.output / "parts" / "000000000001").rglob("c/0*"), key=lambda p: p.stat().st_size
    )
    shard = shard if shard.is_file() else next(p for p in shard.rglob("*") if p.is_file())
    data = bytearray(shard.read_bytes())
    data[:64] = bytes(64)
    shard.write_bytes(data)
    assert drop_damaged(config.output, verify(config.output)) == ["000000000001"]
    moved = answers.joined.rename(answers.joined.with_suffix(".away"))

    def no_engine(*_: object) -> None:
        raise AssertionError("weights are read")

    with pytest.raises(DamagedCacheError, match="moved or changed, restore it"):
        dump(again(config), Display(), engine_for=no_engine)  # type: ignore[arg-type]
    moved.rename(answers.joined)
    dump(again(config), Display())
    assert answers.joined.read_bytes() == before
    assert files(config.output) == store
    assert not answers.folder.exists()


def test_a_disk_error_while_joining_leaves_a_store_that_is_gone_on_with(
    config: DumpConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = AnswerFiles(config.output)
    begin = AnswerFiles.begin

    def and_a_folder_in_the_way(self: AnswerFiles) -> None:
        begin(self)
        self.joined.mkdir()

    with monkeypatch.context() as patch:
        patch.setattr(AnswerFiles, "begin", and_a_folder_in_the_way)
        with pytest.raises(
            StoreWriteError, match=r"answers.jsonl could not be written: .*--resume"
        ):
            dump(config, Display())
    assert not read_manifest(config.output).complete
    answers.joined.rmdir()
    out = dump(again(config), Display())
    assert (out["complete"], out["new_tokens"]) == (True, 0)
    assert [row for row, _ in said(answers)] == list(range(9))
    assert not answers.folder.exists()


@pytest.mark.parametrize("stopped", ["finish", "clear"])
def test_stopped_at_the_end_it_does_the_rest(
    stopped: str, config: DumpConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    def kill(*_: object, **__: object) -> None:
        raise Killed

    calls = {"finish": StoreWriter, "clear": AnswerFiles}
    begin = AnswerFiles.begin
    with monkeypatch.context() as patch:
        if stopped == "clear":  # which begin calls too
            patch.setattr(AnswerFiles, "begin", lambda self: self.joined.unlink(missing_ok=True))
        patch.setattr(calls[stopped], stopped, kill)
        with pytest.raises(Killed):
            dump(config, Display())
    assert begin is AnswerFiles.begin
    answers = AnswerFiles(config.output)
    assert read_manifest(config.output).complete == (stopped == "clear")
    (answers.folder / "00000000.jsonl").unlink()  # half deleted: its lines are in the joined file
    dump(again(config), Display())
    assert [row for row, _ in said(answers)] == list(range(9))
    assert not answers.folder.exists()
    assert read_manifest(config.output).complete


def test_a_complete_store_of_an_older_release_is_joined(config: DumpConfig) -> None:
    """It finished the store first: a repaired part's answers lay in the folder and the joined file
    was the old one.
    """
    dump(config, Display())
    answers = AnswerFiles(config.output)
    before = answers.joined.read_bytes()
    lines = before.decode().splitlines(keepends=True)
    answers.folder.mkdir()
    (answers.folder / "00000001.jsonl").write_text("".join(lines[3:6]))
    answers.joined.write_text(
        "".join([*lines[:3], *(x.replace("one", "old") for x in lines[3:6]), *lines[6:]])
    )
    dump(again(config), Display())
    assert answers.joined.read_bytes() == before
    assert not answers.folder.exists()


@pytest.mark.parametrize("whole", [True, False])
def test_an_ordinary_store_that_replaces_it_takes_its_answers_away(
    config: DumpConfig, write_rows: Callable[..., Path], whole: bool
) -> None:
    """Once the old store is gone, not before. Where they are the corpus, the dump is refused."""
    dump(config, Display())
    answers = AnswerFiles(config.output)
    if not whole:
        answers.save(0, [line(0)])
    rows = write_rows([chat("u: one two", "a: three one two") for _ in range(9)], "ordinary.jsonl")
    ordinary = dataclasses.replace(
        config, data=str(rows), regenerate=False, max_tokens=None, temperature=None, overwrite=True
    )

    def beside() -> dict[str, bytes]:
        """But for the log, which says why a dump stopped."""
        return {n: b for n, b in files(config.output.parent).items() if not n.endswith(".log")}

    def no_engine(*_: object) -> None:
        raise EngineError("no memory")

    before = beside()
    with pytest.raises(UsageError, match="Choose another --output"):
        dump(dataclasses.replace(ordinary, data=str(answers.joined)), Display(), no_engine)  # type: ignore[arg-type]
    with pytest.raises(EngineError):
        dump(ordinary, Display(), no_engine)  # type: ignore[arg-type]
    assert beside() == before
    dump(ordinary, Display())
    assert {p.name for p in config.output.parent.iterdir()} == {
        "hs.zarr", "hs.zarr.log", "hs.zarr.yaml", "ordinary.jsonl", "rows.jsonl",
    }  # fmt: skip
    # Beside an ordinary store they are none of its own.
    answers.joined.write_text("mine")
    dump(ordinary, Display())
    assert answers.joined.read_text() == "mine"


@pytest.mark.parametrize("regenerate", [True, False])
def test_a_store_that_cannot_be_replaced_keeps_its_answers(
    config: DumpConfig, monkeypatch: pytest.MonkeyPatch, regenerate: bool
) -> None:
    dump(config, Display())
    before = AnswerFiles(config.output).joined.read_bytes()
    other = dataclasses.replace(config, limit=4, overwrite=True)
    if not regenerate:
        (data := config.output.with_name("ordinary.jsonl")).write_bytes(before)
        other = dataclasses.replace(
            other, data=str(data), regenerate=False, max_tokens=None, temperature=None
        )

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dspark.cache.writer.write_target", full)
    with pytest.raises(StoreWriteError, match="the disk is full"):
        dump(other, Display())
    assert AnswerFiles(config.output).joined.read_bytes() == before
    assert read_manifest(config.output).complete


def test_a_new_store_does_not_replace_answers_unasked(config: DumpConfig) -> None:
    dump(config, Display())
    answers = AnswerFiles(config.output)
    before = answers.joined.read_bytes()
    shutil.rmtree(config.output)
    with pytest.raises(ExistsError, match="answers of an earlier store"):
        dump(config, Display())
    assert answers.joined.read_bytes() == before
    assert not config.output.exists()
    dump(dataclasses.replace(config, overwrite=True, limit=4), Display())
    assert [row for row, _ in said(answers)] == list(range(4))
