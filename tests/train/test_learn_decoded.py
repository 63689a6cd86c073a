"""What bench/decoded.py makes of answers, and bench/end_to_end.py of a training's log."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner

import tiny_models as tiny
from dspark.dump.cli import main as dump
from dspark.tools.decode.target import greedy_alone
from dspark.train.draft.saved.folder import save_draft


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    import decoded

    yield decoded
    for name in ("decoded", "end_to_end", "common"):
        sys.modules.pop(name, None)


def answer(draft: str, where: str, blocks: int, accepted: int, source: str) -> dict[str, object]:
    said = {"draft": draft, "where": where, "blocks": blocks, "accepted": accepted}
    return said | {"source": source, "tokens": blocks + accepted, "same": None}


def test_drafts_are_compared_prompt_by_prompt(bench: ModuleType) -> None:
    rows = [
        answer("old", "a", 10, 10, "x"), answer("new", "a", 8, 12, "x"),
        answer("old", "b", 5, 15, "y"), answer("new", "b", 4, 16, "y"),
        answer("old", "c", 0, 0, "y"), answer("new", "c", 0, 0, "y"),
    ]  # fmt: skip
    old, new = bench.compared(rows, "old")
    assert (old["draft"], old["prompts"], old["paired"]["mean"]) == ("old", 2, 0.0)
    assert old["accepted_length"] == pytest.approx(1 + 25 / 15)
    assert new["accepted_length"] == pytest.approx(1 + 28 / 12)
    assert new["change"] == pytest.approx((1 + 28 / 12) / (1 + 25 / 15) - 1)
    # 2.5 - 2 and 5 - 4, each prompt the same weight
    assert new["paired"]["mean"] == pytest.approx(0.75)
    assert new["paired"]["high"] - new["paired"]["mean"] == pytest.approx(1.96 * 0.25)
    assert new["by_source"]["y"]["accepted_length"] == pytest.approx(5.0)
    third = [answer("weak", "a", 9, 11, "x")]
    *others, weak = bench.compared([*rows, *third], "old")
    assert [row["paired"] for row in others] == [old["paired"], new["paired"]]
    assert (weak["prompts"], weak["paired"]["mean"]) == (1, pytest.approx(11 / 9 - 1))
    fit = bench.line([1.0, 2.0, 3.0], [1.5, 2.5, 3.5])
    assert (fit["slope"], fit["intercept"]) == (pytest.approx(1.0), pytest.approx(0.5))
    assert fit["residual_rms"] == pytest.approx(0.0, abs=1e-9)
    assert "new" in bench.table([old | {"walk": None}, new | {"walk": 2.9}], fit)


def test_the_walk_over_the_answers_is_what_decoding_accepted(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three drafts of different strength, in the store's 16-bit states."""
    model = tiny.target()
    prompts = [[5, 6, 7, 8, 9], [50, 60, 70], [3, 4], [90, 4]]
    answers = [greedy_alone(model, p, max_tokens=30) for p in prompts]
    model.save_pretrained(tmp_path / "target")
    names = ["untaught", "taught", "well-taught"]
    draft = tiny.draft(model)
    for name, steps in zip(names, (0, 12, 20), strict=True):
        tiny.agree(model, draft, [p + a for p, a in zip(prompts, answers, strict=True)][:3], steps)
        save_draft(tmp_path / "drafts" / name, draft, dtype=torch.float32)
    path = tmp_path / "some.jsonl"
    rows = [{"input_ids": [*p, 1, 2], "loss_mask": [0] * len(p) + [1, 1]} for p in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = [(str(at), names) for at in range(len(prompts))]
    path.with_suffix(".tasks").write_text(json.dumps(tasks))
    args = argparse.Namespace(
        worker=path, model=str(tmp_path / "target"), learn=tmp_path, drafts=names, device="cpu",
        max_tokens=30, seconds=1e9, work=tmp_path,
    )  # fmt: skip
    bench.worker(args)
    decoded = list(bench.answered(tmp_path).values())
    assert [row["answer"] for row in decoded if "answer" in row] == answers

    def dumped(tool: str, *words: object, log: Path) -> None:
        done = CliRunner().invoke(dump, [*map(str, words), "--mask-token-id", "159"])
        assert done.exit_code == 0, done.output

    monkeypatch.setattr(bench, "command", dumped)
    found = bench.walked(args, decoded, tiny.LAYERS)
    assert [row["draft"] for row in found] == names
    for row in found:
        assert row["walk"] == pytest.approx(row["tokens_per_block"], rel=0.01)
        assert row["tokens_per_block"] <= row["accepted_length"] < row["tokens_per_block"] * 1.2
    lengths = [row["tokens_per_block"] for row in found]
    assert lengths[0] < 1.2 < lengths[1] < lengths[2]
    fit = bench.line([row["walk"] for row in found], lengths)
    assert fit["slope"] == pytest.approx(1, abs=0.02)
    assert "| taught |" in bench.own_table(found, fit)


def test_the_log_tells_when_a_training_reached_a_tau(bench: ModuleType, tmp_path: Path) -> None:
    import end_to_end

    began = datetime.datetime(2026, 11, 26, 10, 0, 0)
    rows, lines = [], []
    for step, tau in ((20, 1.2), (40, 1.6), (60, 1.9)):
        rows += [{"step": step, "loss": 1.0}]
        rows += [{"step": step, "epoch": 0, "validation": True, "mean_accepted_length": tau}]
        moment = began + datetime.timedelta(seconds=step)
        lines.append(f"{moment:%Y-%m-%d %H:%M:%S},500 step={step} epoch=0 validation=True ce=1")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "train.log").write_text("\n".join(lines))
    found = end_to_end.reached(tmp_path, 1.5, began.timestamp())
    assert found == {"step": 40, "train_seconds": pytest.approx(40.5)}
    assert end_to_end.reached(tmp_path, 2.5, 0.0) == {"step": None, "train_seconds": None}


def test_a_later_call_decodes_what_is_left(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[list[list[object]]] = []

    class Worker:
        """Decodes its first prompt."""

        returncode = 0

        def __init__(self, call: list[str], **rest: object) -> None:
            path = Path(call[call.index("--worker") + 1])
            tasks = json.loads(path.with_suffix(".tasks").read_text())
            begun.append(tasks)
            where, names = tasks[0]
            rows = [answer(name, where, 2, 3, "x") for name in names]
            path.with_suffix(".out").write_text("".join(json.dumps(row) + "\n" for row in rows))

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(bench.subprocess, "Popen", Worker)
    monkeypatch.setattr(bench, "chosen", lambda *a: [{"source": "x"}] * 3)
    args = argparse.Namespace(
        work=tmp_path, store=None, data=None, per_source=3, drafts=["new", "old", "weak"],
        core=["new", "old"], whole=1, processes=2, model="m", learn=tmp_path, device="cpu",
        max_tokens=4, seconds=1.0, gpus=["0"],
    )  # fmt: skip
    rows = bench.decode(args)
    assert begun == [[["0", args.drafts], ["2", args.core]], [["1", args.core]]]
    assert [(r["draft"], r["where"]) for r in rows if r["draft"] == "weak"] == [("weak", "0")]
    assert len(bench.decode(args)) == 7
    assert begun[2:] == [[["2", args.core]]]
