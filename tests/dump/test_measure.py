"""``--measure``: a plan whose size and time a dump of some rows has shown; nothing stays behind."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from dump_runs import corpus

from dspark.cache.errors import UsageError
from dspark.dump import measure as measuring
from dspark.dump.cli import main
from dspark.dump.config import DumpConfig
from dspark.dump.measure import Every, Trial, measure
from dspark.dump.pace import Pace, stated
from dspark.dump.progress import Display
from dspark.dump.run import dump


def on_disk(store: Path) -> int:
    return sum(p.stat().st_size for p in store.rglob("*") if p.is_file())


def test_a_trial_of_some_rows_gives_the_size_of_all(
    config: DumpConfig,
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measuring, "ENOUGH_SECONDS", 0.0)
    monkeypatch.setattr(measuring, "TRIAL_TOKENS", 4000)
    data = str(write_rows(corpus(200), "many.jsonl"))
    config = dataclasses.replace(config, data=data, aux_bits=4, last_bits=4, part_tokens=2000)
    plan = measure(config, Display())
    assert sorted(p.name for p in config.output.parent.iterdir()) == ["many.jsonl", "rows.jsonl"]
    pace = plan.measured
    assert pace is not None
    assert pace.tokens
    assert pace.before > 0
    assert "measured on" in pace.why
    assert f"{plan.tokens:,}" not in pace.why  # some rows, not all
    assert plan.seconds == pytest.approx(pace.before + (plan.tokens or 0) / pace.tokens)
    dump(config, Display())
    assert plan.bytes == pytest.approx(on_disk(config.output), rel=0.03)


def test_measuring_answers_shows_how_long_they_are(
    config: DumpConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "ENOUGH_SECONDS", 0.0)
    config = dataclasses.replace(
        config, regenerate=True, max_tokens=12, temperature=0.0, part_tokens=None, max_dropped=1.0
    )
    plan = measure(config, Display())
    assert plan.measured is not None
    made = dump(config, Display())
    assert plan.tokens == pytest.approx(made["tokens"], rel=0.25)
    assert "prompts and answers together" in plan.pace.words(answers=True)


def test_the_command_prints_the_plan_and_refuses_what_is_no_whole_dump(
    config: DumpConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "ENOUGH_SECONDS", 0.0)
    words = ["--model", config.model, "--data", str(config.data), "--output", str(tmp_path / "o")]
    out = CliRunner().invoke(main, [*words, "--measure", "--json"])
    assert out.exit_code == 0, out.output
    plan = json.loads(out.stdout)
    assert plan["fits"]
    assert plan["seconds"] > 0
    assert ", measured; fits: free" in out.stderr
    assert "calibration: tokens" in out.stderr
    assert not (tmp_path / "o").exists()
    with pytest.raises(UsageError, match="--measure times a whole dump"):
        DumpConfig(model="m", measure=True, dry_run=True)


def test_every_row_of_a_spread_is_numbered_anew(write_rows: Callable[..., Path]) -> None:
    from dspark.dump.corpus.sources import open_corpus

    whole = open_corpus(str(write_rows(corpus(10))))
    some = Every(whole, 3)
    assert (some.count(), len(some.weights())) == (3, 3)
    assert [row.number for row in some.rows()] == [0, 1, 2]
    assert [row.where for row in some.pick(lambda n: n == 2)] == [
        row.where for row in whole.pick(lambda n: n == 7)
    ]


def test_pace_by_hand() -> None:
    assert Pace(tokens=100.0, why="").seconds(1000) == 10.0
    assert Pace(tokens=100.0, why="").seconds(1000, calibration=500) == 15.0
    assert Pace(tokens=100.0, before=2.0, why="").seconds(1000, calibration=500) == 12.0
    assert Pace(tokens=100.0, answers=10.0, why="").seconds(1000, answers=200) == 28.0
    assert stated("cpu", None).seconds(1000) is None
    slow, fast = stated("cpu", 2 * 269_000_000), stated("cpu", 269_000_000)
    assert slow.tokens == pytest.approx((fast.tokens or 0) / 2)


def test_a_trial_grows_with_rows_tokens_and_states(config: DumpConfig) -> None:
    from dspark.dump.job import prepare

    plan = dataclasses.replace(
        prepare(config).plan, rows=100, tokens=1000, last_rows=500, block_rows=10
    )
    trial = Trial(
        rows=10,
        tokens=100,
        last_rows=25,
        seconds=1.0,
        token_bytes=400,
        last_bytes=50,
        sample_bytes=30,
        parts=2,
        part_bytes=16,
        fixed_bytes=7,
    )
    assert trial.size(plan) == 7 + 8 * 10 + 3 * 100 + 4 * 1000 + 2 * 500
