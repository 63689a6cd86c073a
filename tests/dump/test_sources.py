"""Several ``--data``: numbered sources, parts of one source each, shares, and sources that are
appended later.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from dump_runs import assert_same, corpus, files

import dspark.cache
from dspark.cache.errors import DataError, MismatchError, UsageError
from dspark.cache.parts.committed import scan_parts
from dspark.cache.stored_manifest import read_manifest
from dspark.cache.stores.verify import verify
from dspark.dump.cli import main
from dspark.dump.config import DumpConfig
from dspark.dump.corpus.sources import open_corpus
from dspark.dump.progress import Display
from dspark.dump.run import dump
from dspark.tools.report import page_stores
from dspark.tools.stores.info import info
from dump_targets import chat


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    out = []
    for n, rows in enumerate((20, 13)):
        path = tmp_path / f"{'ab'[n]}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in corpus(rows, seed=n)))
        out.append(str(path))
    return out[0], out[1]


def test_parts_hold_rows_of_one_source(
    two: tuple[str, str], config: DumpConfig, show: Display
) -> None:
    both = dataclasses.replace(config, data=two)
    out = dump(both, show)
    manifest = read_manifest(config.output)
    assert [(s.id, s.limit) for s in manifest.sources] == [("a.jsonl", None), ("b.jsonl", None)]
    records = scan_parts(config.output)
    rows = manifest.dump.block_rows
    for number, record in records.items():
        assert number == record.source * 10**8 + record.row_start // rows
        assert record.source_id == manifest.sources[record.source].id
    assert {
        r.source: max(x.row_stop for x in records.values() if x.source == r.source)
        for r in records.values()
    } == {0: 20, 1: 13}
    found = info(config.output)["per_source"]
    assert out["per_source"] == found
    assert [(s["id"], s["rows"], s["samples"]) for s in found] == [
        ("a.jsonl", 20, 18),
        ("b.jsonl", 13, 12),
    ]
    assert len(dspark.cache.open(config.output)) == 30
    assert verify(config.output).ok
    view = SimpleNamespace(name="both", info=info(config.output))
    assert all(
        said in page_stores._sources([view]) for said in ("0: a.jsonl", "1: b.jsonl", ">13<")
    )  # type: ignore[list-item]
    # The same list goes on, byte for byte; another order does not.
    before = files(config.output)
    dump(dataclasses.replace(both, resume=True), show)
    assert files(config.output) == before
    with pytest.raises(MismatchError, match=r"a\.jsonl"):
        dump(dataclasses.replace(both, data=two[::-1], resume=True), show)


def test_a_source_that_is_appended_changes_nothing_that_is_there(
    two: tuple[str, str], config: DumpConfig, show: Display
) -> None:
    dump(dataclasses.replace(config, data=two[0]), show)
    before, digest = files(config.output / "parts"), read_manifest(config.output).digest()
    assert not info(config.output)["per_source"]
    dump(dataclasses.replace(config, data=two, resume=True), show)
    after, manifest = files(config.output / "parts"), read_manifest(config.output)
    assert (manifest.complete, manifest.digest()) == (True, digest)
    assert {name: after[name] for name in before} == before
    assert len(after) > len(before)
    assert verify(config.output).ok
    # Fewer sources than the store has are not the same store.
    with pytest.raises(MismatchError):
        dump(dataclasses.replace(config, data=two[0], resume=True), show)


def test_a_source_that_is_not_understood_is_not_hidden_by_the_others(
    two: tuple[str, str], config: DumpConfig, show: Display, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(json.dumps(chat("u: hi")) + "\n" for _ in range(3)))
    with pytest.raises(DataError, match=r"bad\.jsonl: 3 of the first 3 rows gave no sample"):
        dump(dataclasses.replace(config, data=(*two, str(bad))), show)


def test_a_share_and_a_limit_of_each_source(
    two: tuple[str, str], config: DumpConfig, show: Display
) -> None:
    out = dump(dataclasses.replace(config, data=(f"{two[0]}=0.5", two[1]), limit=10), show)
    taken = [row.number for row in open_corpus(f"{two[0]}=0.5").rows() if row.number < 10]
    cache = dspark.cache.open(config.output)
    answered = [n for n in taken if n % 7 != 6]
    assert [s["samples"] for s in out["per_source"]] == [len(answered), 9]
    assert [int(r) for r in cache.index["sample_row"][: len(answered)]] == answered
    assert [s.id for s in read_manifest(config.output).sources] == ["a.jsonl=0.5", "b.jsonl"]


def test_the_command_takes_them_and_says_what_each_has(
    two: tuple[str, str], tiny: Path, tmp_path: Path
) -> None:
    words = [
        "--model",
        str(tiny),
        "--data",
        two[0],
        "--data",
        two[1],
        "--output",
        str(tmp_path / "o"),
        "--dry-run",
    ]
    out = CliRunner().invoke(main, [*words, "--json"])
    assert out.exit_code == 0, out.output
    assert json.loads(out.stdout)["sources"] == [["a.jsonl", 20], ["b.jsonl", 13]]
    assert "source   1: b.jsonl: 13 rows" in out.stderr
    refused = CliRunner().invoke(main, [*words, "--regenerate"])
    assert refused.exit_code == 2
    assert "--regenerate takes one --data" in refused.stderr


def test_one_source_is_written_as_ever(
    two: tuple[str, str], config: DumpConfig, show: Display, tmp_path: Path
) -> None:
    dump(dataclasses.replace(config, data=two[0]), show)
    other = dataclasses.replace(config, data=(two[0],), output=tmp_path / "other.zarr")
    dump(other, show)
    assert_same(config.output, other.output)


def test_a_share_must_be_one(two: tuple[str, str]) -> None:
    with pytest.raises(UsageError, match="found the share 0"):
        open_corpus(f"{two[0]}=0")
