"""The page of ``report`` and the view of ``watch``: what they read, that the page needs nothing but
itself, that nothing is written.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from small_trainings import small_training

from dspark.cache.errors import DraftError, UsageError
from dspark.cache.files.urls import Url
from dspark.cache.stores.merge import merge
from dspark.tools.cli import main
from dspark.tools.report.charts import Line, bars, lines, number, ticks
from dspark.tools.report.sources import kind_of, metrics, read
from dspark.tools.report.watch import look, sparkline
from dspark.train.loop import train

LINE = {
    "prompts": 3,
    "drafts": 9,
    "mean_accepted_length": 1.75,
    "mean_accepted_length_se": 0.125,
    "accept_rate": [0.5, 0.25],
    "lossless": True,
    "tokens_per_second": 10.0,
    "tokens_per_second_target": 8.0,
    "speedup": 1.25,
    "theoretical_gain": 1.5,
}
REPORT = LINE | {
    "engine": "transformers",
    "dtype": "float32",
    "temperature": 0.0,
    "max_tokens": 8,
    "block_size": 2,
    "compared": 3,
    "per_source": {"code <b>": LINE, "chat": LINE | {"mean_accepted_length": 1.5}},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, a training with held-out rows and a calibration, and an evaluation, in one
    folder.
    """
    folder = tmp_path_factory.mktemp("made")
    train(
        small_training(
            folder, [60, 71, 52, 64, 48, 66], max_steps=6, checkpoint_freq=1, device="cpu"
        )
    )
    (folder / "eval.json").write_text(json.dumps(REPORT))
    (folder / "notes.json").write_text("{}")
    side = {k: [0.1, 0.2] for k in ("ece", "brier", "auroc", "confidence", "accepted")} | {
        "diagram": [[{"confidence": 0.2, "accepted": 0.1}, {"confidence": 0.8, "accepted": 0.9}]]
        * 2
    }
    point = {"threshold": 0.1, "verified": 1.0, "tokens": 1.5, "accepted_share": 0.5}
    calibration = {
        "temperature": [1.0, 1.0],
        "before": {"survival": side},
        "after": {"survival": side},
        "sweep": [point],
    }
    (folder / "draft" / "calibration.json").write_text(json.dumps(calibration))
    return folder


class Page(HTMLParser):
    """Tags, addresses and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            str(v) for k, v in attrs if k in ("src", "href", "srcset", "action", "data")
        ]

    def handle_data(self, data: str) -> None:
        self.words += data + "\n"


def drawn(*paths: Path, to: Path) -> tuple[str, Page]:
    result = CliRunner().invoke(
        main, ["report", *map(str, paths), "-o", str(to / "r.html"), "--json"]
    )
    assert result.exit_code == 0, result.output
    text = (to / "r.html").read_text()
    assert json.loads(result.stdout)["bytes"] == len(text.encode())
    return text, Page(text)


def test_the_page_is_whole_in_itself(made: Path, tmp_path: Path) -> None:
    text, page = drawn(made, to=tmp_path)
    assert page.addresses == []
    assert "url(" not in text
    assert {"script", "link", "img", "iframe"}.isdisjoint(page.tags)
    assert page.tags.count("section") == 4
    pictures = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(pictures) >= 12
    for picture in pictures:
        ElementTree.fromstring(picture)
        assert "nan" not in picture.lower()
    rows = [json.loads(x) for x in (made / "draft" / "metrics.jsonl").read_text().splitlines()]
    held = [r for r in rows if r.get("validation")]
    assert f"{held[-1]['mean_accepted_length']:.3f}" in page.words
    assert "1.75 ± 0.12" in page.words  # the evaluation's length with its error
    assert "code <b>" in page.words  # a name is text, not markup
    assert "random/tiny" in page.words


def test_every_logged_value_is_a_mark_of_its_chart(made: Path, tmp_path: Path) -> None:
    text, _ = drawn(made / "draft", to=tmp_path)
    chart = re.search(r"<h3>Cross entropy</h3>(.*?)</svg>", text, re.S)
    assert chart is not None
    found = re.findall(r"<title>(.*?): (\S+) at (\S+)</title>", chart[1])
    rows = [json.loads(x) for x in (made / "draft" / "metrics.jsonl").read_text().splitlines()]
    expected = [
        (
            "draft" + (", held out" if r.get("validation") else ""),
            number(r["ce_loss"]),
            number(r["step"]),
        )
        for r in rows
    ]
    assert sorted(found) == sorted(expected)


def test_several_runs_are_drawn_over_one_another(made: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "draft"
    shutil.copytree(made / "draft", other)
    text, page = drawn(made / "draft", other, to=tmp_path)
    names = [f"{p.parent.name}/draft" for p in (made / "draft", other)]
    chart = re.search(r"<h3>Loss</h3>(.*?)</ul>", text, re.S)
    assert chart is not None
    assert all(f"</span>{name}</li>" in chart[1] for name in names)
    assert "Last accept rates by slot" in page.words


def test_what_a_path_is(made: Path, tmp_path: Path) -> None:
    assert [kind_of(made / n) for n in ("hs.zarr", "draft", "eval.json")] == [
        "store",
        "run",
        "eval",
    ]
    found = read([made])  # notes.json is no report and was not named
    assert [len(x) for x in (found.stores, found.runs, found.evals)] == [1, 1, 1]
    assert found.stores[0].stored.keys() >= {"aux", "last", "tokens"}
    with pytest.raises(DraftError, match="notes.json"):
        read([made / "notes.json"])
    with pytest.raises(UsageError, match="no such file or folder"):
        read([tmp_path / "none"])
    with pytest.raises(UsageError, match="not a store, a draft folder or a report"):
        read([tmp_path])


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert list(metrics(tmp_path)) == [{"step": 1}]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(DraftError, match="metrics.jsonl:1 is not JSON"):
        list(metrics(tmp_path))


def test_watch_only_reads(made: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in made.rglob("*")}
    run, store = look(made / "draft"), look(made / "hs.zarr")
    assert (run["step"], run["max_steps"], run["complete"]) == (6, 6, True)
    assert len(run["losses"]) == 6
    assert run["log"]
    assert (store["complete"], store["samples"]) == (True, 6)
    for name in ("draft", "hs.zarr"):
        result = CliRunner().invoke(main, ["watch", str(made / name)])
        assert result.exit_code == 0, result.output
        assert "done" in result.stdout
    assert {p: p.stat().st_mtime_ns for p in made.rglob("*")} == before
    assert CliRunner().invoke(main, ["watch", str(made)]).exit_code == 2


def test_a_store_may_be_at_a_url(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("obstore")
    monkeypatch.setenv("DSPARK_CACHE_DIR", str(tmp_path / "objects"))
    there = Url("memory://bucket/report.zarr")
    merge(there, [made / "hs.zarr"])
    found, expected = read([there]).stores[0], read([made / "hs.zarr"]).stores[0]
    assert (found.stored, found.stats) == (expected.stored, expected.stats)
    assert (look(there)["complete"], look(there)["samples"]) == (True, 6)
    assert CliRunner().invoke(main, ["watch", "memory://b/none.zarr"]).exit_code == 2


def test_charts_place_what_they_are_given() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(3, 3) == [3]
    picture = lines([Line("a", [(0, 0), (10, 1)]), Line("b", [])], x="x", y="y", low=0.0, high=1.0)
    assert 'points="52.0,212.0 470.0,10.0"' in picture
    assert lines([Line("a", [])], x="x", y="y") == '<p class="none">no data yet</p>'
    assert bars(["p", "q"], [("s", [1.0, 2.0])], x="x", y="y").count("<rect") == 2
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert len(sparkline(list(range(1000)))) <= 60


PROFILE_IN_USE = 21  # exit code of a chromium that did not get its lock, seen under load


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_draws_it_at_phone_width(made: Path, tmp_path: Path) -> None:
    """Chromium lays the page out without a console message, and every card fits a narrow window."""
    drawn(made, to=tmp_path)
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=390,900"]
    page = [f"--screenshot={tmp_path / 'r.png'}", f"file://{tmp_path / 'r.html'}"]
    for profile in ("profile", "another"):
        call = ["chromium", *flags, f"--user-data-dir={tmp_path / profile}", *page]
        done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=60)
        if done.returncode != PROFILE_IN_USE:
            break
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    assert (tmp_path / "r.png").stat().st_size > 5000
