"""Rows that another process reads: the same parts, notes, counts and errors as read here."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark.cache.errors import DataError, EngineError
from dspark.dump.corpus.masks import SampleMaker
from dspark.dump.corpus.parts import PartReader, PartRows, SourcesReader
from dspark.dump.corpus.reading import RowsProcess
from dspark.dump.corpus.rows import Corpus, JsonlCorpus, SharedCorpus, TableCorpus, is_read_by_lines
from dspark.dump.job import all_parts

MAKER = SampleMaker(None, tokenised=True, vocab_size=99, seq_length=16, min_supervised=1)


@pytest.fixture(scope="module")
def process() -> Iterator[RowsProcess]:
    process = RowsProcess(MAKER, 1)
    process.wait_until_started()
    yield process
    process.close()


def corpus(path: Path, rows: list[Any]) -> Corpus:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return JsonlCorpus(path)


def rows(count: int) -> list[Any]:
    rng = np.random.default_rng(count)
    made: list[Any] = [
        {
            "input_ids": rng.integers(0, 99, n).tolist(),
            "loss_mask": [0] * (n // 2) + [1] * (n - n // 2),
        }
        for n in rng.integers(1, 24, count)
    ]
    made[3] = {"nothing": "known"}
    made[7]["loss_mask"] = [0] * len(made[7]["loss_mask"])
    return made


def readers(*sources: Corpus, max_dropped: float = 0.5) -> tuple[list[str], list[PartReader]]:
    lines: list[str] = []
    return lines, [
        PartReader(
            source,
            MAKER,
            block_rows=8,
            limit=30,
            max_dropped=max_dropped,
            source=number,
            note=lines.append,
            takes=all_parts,
        )
        for number, source in enumerate(sources)
    ]


def plain(part: PartRows) -> Any:
    samples = [
        (s.row, s.key, s.turn, s.input_ids.tolist(), s.loss_mask.tolist()) for s in part.samples
    ]
    rest = (part.dropped, part.truncated, part.rows_sha256)
    return part.index, part.row_start, part.row_stop, samples, rest


def counted(reader: PartReader) -> Any:
    return reader.total, reader.rows_read, reader.dropped, reader.notes, reader.harmed


def test_the_same_as_read_here(process: RowsProcess, tmp_path: Path) -> None:
    sources = corpus(tmp_path / "a.jsonl", rows(40)), corpus(tmp_path / "b.jsonl", rows(11))
    here, there = readers(*sources), readers(*sources)
    want = [plain(p) for p in SourcesReader(here[1]).parts({})]
    got = [plain(p) for p in process.reader(there[1]).parts({})]
    assert got == want
    assert len(want) == 4 + 2
    assert there[0] == here[0] != []
    assert [counted(r) for r in there[1]] == [counted(r) for r in here[1]]
    assert len(here[1][0].dropped) == 3


def test_an_error_comes_at_its_place(process: RowsProcess, tmp_path: Path) -> None:
    bad = rows(30)
    bad[20]["input_ids"][0] = 100
    source = corpus(tmp_path / "a.jsonl", bad)
    found = []
    for there in (False, True):
        lines, made = readers(source)
        sources = process.reader(made) if there else SourcesReader(made)
        got: list[Any] = []
        with pytest.raises(DataError, match=r"a.jsonl:21: token id 100"):
            got.extend(map(plain, sources.parts({})))
        found.append((got, lines))
    assert found[0] == found[1]
    assert len(found[0][0]) == 2


def begun_twice(
    process: RowsProcess, source: Any
) -> Iterator[tuple[PartReader, Iterator[PartRows]]]:
    """The reader of a source and its parts after the first: read here, then in the process."""
    for there in (False, True):
        _, made = readers(source)
        made[0].limit = None
        parts = (process.reader(made) if there else SourcesReader(made)).parts({})
        next(parts)
        yield made[0], parts


def test_a_file_that_is_only_touched_is_read_to_its_end(
    process: RowsProcess, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    source = corpus(path, rows(600))
    for made, parts in begun_twice(process, source):
        os.utime(path)
        assert list(parts)
        assert made.rows_read == 600


@pytest.mark.parametrize("change", ["shorter", "longer", "gone"])
def test_a_file_that_changes_while_it_is_read_is_refused(
    process: RowsProcess, tmp_path: Path, change: str
) -> None:
    path = tmp_path / "a.jsonl"
    source = corpus(path, rows(600))
    for _, parts in begun_twice(process, source):
        before = path.stat()
        if change == "shorter":
            os.truncate(path, 100)
        elif change == "longer":
            path.write_bytes(path.read_bytes() + b"{}\n")
        else:
            path.rename(tmp_path / "b.jsonl")
        with pytest.raises(DataError, match=r"a.jsonl: (changed while|cannot be read any more)"):
            list(parts)
        corpus(path, rows(600))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_too_many_dropped_rows_stop_it(process: RowsProcess, tmp_path: Path) -> None:
    _, made = readers(corpus(tmp_path / "a.jsonl", rows(40)), max_dropped=0.01)
    sources = process.reader(made)
    assert len(list(sources.parts({}))) == 4
    with pytest.raises(DataError, match="of the first 30 rows gave no sample"):
        sources.check_dropped(at_end=True)


def test_a_part_travels_as_a_few_arrays(tmp_path: Path) -> None:
    _, made = readers(corpus(tmp_path / "a.jsonl", rows(40)))
    for part in [*made[0].parts({}), PartRows(3, 24, 32)]:
        sent = pickle.dumps(part)
        assert b"TokenSample" not in sent
        assert plain(pickle.loads(sent)) == plain(part)


def test_a_table_is_not_sent(tmp_path: Path) -> None:
    lines = corpus(tmp_path / "a.jsonl", [])
    assert is_read_by_lines(SharedCorpus(lines, 0.5))
    assert not is_read_by_lines(SharedCorpus(TableCorpus([], "table", None), 0.5))


def test_a_killed_one_names_the_workers_asked_for(tmp_path: Path) -> None:
    before = multiprocessing.active_children()
    process = RowsProcess(MAKER, 2)
    process.wait_until_started()
    (mine,) = (p for p in multiprocessing.active_children() if p not in before)
    mine.kill()
    _, made = readers(corpus(tmp_path / "a.jsonl", rows(40)))
    with pytest.raises(EngineError, match="reads rows ended early.*fewer --workers than 2"):
        list(process.reader(made).parts({}))
    process.close()


def test_nothing_stays_behind() -> None:
    before = multiprocessing.active_children()
    process = RowsProcess(MAKER, 1)
    process.wait_until_started()
    mine = [p for p in multiprocessing.active_children() if p not in before]
    process.close()
    for child in mine:  # it waits for those below it
        child.join(timeout=30)
        assert child.exitcode == 0
