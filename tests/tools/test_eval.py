"""``dspark-tools eval``: prompts, report, lossless check, exit codes; vLLM's part is faked here
(tests/vllm_cpu runs it).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from click.testing import CliRunner

import tiny_models as tiny
from dspark.cache.errors import DataError, EngineError, StoreWriteError, UsageError
from dspark.tools.decode import vllm_serve
from dspark.tools.decode.outcome import Outcome, summarise
from dspark.tools.decode.prompts import read_prompts
from dspark.tools.decode.target import greedy_alone
from dspark.tools.decode.vllm_serve import ServeRequest
from dspark.tools.judge.eval import eval_command
from dspark.tools.judge.evaluating import EvalConfig, evaluate
from dspark.train.draft.saved.folder import save_draft

PROMPTS = {"code": [50, 60, 70], "chat": [5, 6, 7, 8, 9]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target and a draft that has learnt its answer to the first prompt, and rows of tokens."""
    path = tmp_path_factory.mktemp("eval")
    model = tiny.target()
    draft = tiny.draft(model)
    tiny.agree(
        model,
        draft,
        [PROMPTS["code"] + greedy_alone(model, PROMPTS["code"], max_tokens=16)],
        steps=60,
    )
    model.save_pretrained(path / "target")
    save_draft(path / "draft", draft, dtype=torch.float32)
    rows = [
        {"input_ids": [*ids, 1, 2], "loss_mask": [0] * len(ids) + [1, 1], "source": name}
        for name, ids in PROMPTS.items()
    ]
    (path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def flags(folder: Path, *more: str) -> list[str]:
    return [
        "--model",
        str(folder / "target"),
        "--draft",
        str(folder / "draft"),
        "--data",
        str(folder / "rows.jsonl"),
        "--max-tokens",
        "16",
        "--device",
        "cpu",
        *more,
    ]


def test_report(folder: Path) -> None:
    result = CliRunner().invoke(eval_command, flags(folder, "--json"))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["lossless"] is True
    assert found["diverged"] == []
    assert found["prompts"] == 2
    assert found["tokens"] == 32
    rates = found["accept_rate"]
    assert len(rates) == 4
    assert rates == sorted(rates, reverse=True)
    assert found["mean_accepted_length"] == pytest.approx(1 + sum(rates))
    assert found["tokens_per_second"] > 0
    assert found["tokens_per_second_target"] > 0
    parts = found["per_source"]
    assert set(parts) == {"code", "chat"}
    assert parts["code"]["drafts"] + parts["chat"]["drafts"] == found["drafts"]
    assert parts["code"]["mean_accepted_length"] > 4.5  # learnt: 5 tokens a block
    assert parts["chat"]["mean_accepted_length"] < 3


def test_table_goes_to_stdout(folder: Path) -> None:
    result = CliRunner().invoke(eval_command, flags(folder, "--limit", "1"))
    assert result.exit_code == 0, result.output
    assert "code" in result.stdout
    assert "lossless" in result.stdout


def test_files_beside_the_report(folder: Path, tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in ("report.json", "table.md", "answers.jsonl")}
    result = CliRunner().invoke(
        eval_command,
        flags(
            folder,
            "--json",
            "--alone",
            "1",
            "--output",
            str(paths["report.json"]),
            "--markdown",
            str(paths["table.md"]),
            "--answers",
            str(paths["answers.jsonl"]),
        ),
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert json.loads(paths["report.json"].read_text()) == found
    # Only the first prompt (code) was decoded by the target alone.
    assert (found["compared"], found["per_source"]["chat"]["compared"]) == (1, 0)
    assert found["per_source"]["code"]["lossless"] is True
    assert found["per_source"]["chat"]["lossless"] is None
    assert found["per_source"]["chat"]["speedup"] is None
    assert found["speedup"] == pytest.approx(found["per_source"]["code"]["speedup"])
    answers = [json.loads(line) for line in paths["answers.jsonl"].read_text().splitlines()]
    assert [a["input_ids"] for a in answers] == list(PROMPTS.values())
    assert sum(a["drafts"] for a in answers) == found["drafts"]
    table = paths["table.md"].read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table if line.startswith("|")] == [
        "source", "---", "chat", "code", "all",
    ]  # fmt: skip
    assert f"{found['mean_accepted_length']:.3f}" in table[4]


def test_a_disk_that_is_full_at_the_end_does_not_take_the_report_with_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StoreWriteError("the disk is full")

    monkeypatch.setattr("dspark.tools.judge.eval.save", full)
    result = CliRunner().invoke(
        eval_command,
        flags(folder, "--json", "--limit", "1", "--output", str(tmp_path / "report.json")),
    )
    assert (result.exit_code, "the disk is full" in result.stderr) == (1, True)
    assert json.loads(result.stdout)["prompts"] == 1


def test_theoretical_gain_counts_what_is_read(folder: Path) -> None:
    """Draft of 2 layers beside a target of 4: its weights by hand, against the report's ratio."""
    found = json.loads(
        CliRunner().invoke(eval_command, flags(folder, "--json", "--alone", "0")).stdout
    )
    h, vocab, inner, heads, kv = tiny.HIDDEN, tiny.VOCAB, 64, 2 * 32, 1 * 32
    layer = h * heads + 2 * h * kv + heads * h + 3 * h * inner + 2 * h + 2 * 32
    target = 4 * layer + h + vocab * h
    draft = 2 * layer + (2 * h) * h + 2 * h + vocab * 8 + (h + 8) + 1 + vocab * h
    assert found["relative_cost"] == pytest.approx(draft / target)
    assert found["theoretical_gain"] == pytest.approx(
        found["mean_accepted_length"] / (1 + draft / target)
    )
    assert found["lossless"] is None


def test_temperature_is_not_called_lossless(folder: Path) -> None:
    result = CliRunner().invoke(
        eval_command, flags(folder, "--json", "--limit", "1", "--temperature", "1")
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["lossless"] is None


def test_a_wrong_answer_in_float32_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM is asked twice, with the draft and without; here it answers differently."""
    asked: list[ServeRequest] = []

    def run(request: ServeRequest, *, program: Sequence[str] = ()) -> list[Outcome]:
        asked.append(request)
        last = 7 if request.draft else 8
        return [Outcome([1, last], 0.5, 1, (1, 0, 0, 0)) for _ in request.prompts]

    monkeypatch.setattr(vllm_serve, "run_vllm", run)
    result = CliRunner().invoke(
        eval_command, flags(folder, "--json", "--engine", "vllm", "--dtype", "float32")
    )
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["lossless"] is False
    assert [w.rsplit(":", 1)[1] for w in found["diverged"]] == ["1", "2"]
    assert [r.draft for r in asked] == [str(folder / "draft"), None]
    assert asked[0].prompts == list(PROMPTS.values())
    assert asked[0].num_speculative_tokens == 4


def test_vllm_engine_says_what_it_needs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = ServeRequest(
        target="t", draft=None, num_speculative_tokens=1, prompts=[[1]], max_tokens=1
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match="pip install vllm"):
        vllm_serve.run_vllm(request)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.delenv(vllm_serve.INTERPRETER_ENV, raising=False)
    with pytest.raises(EngineError, match=vllm_serve.INTERPRETER_ENV):
        vllm_serve.run_vllm(request)


def test_what_the_child_prints_last_reaches_the_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "fails.py"
    program.write_text("raise SystemExit('no such layer')")
    monkeypatch.setattr(vllm_serve, "_environment", dict)
    request = ServeRequest(
        target="t", draft=None, num_speculative_tokens=1, prompts=[[1]], max_tokens=1
    )
    with pytest.raises(EngineError, match="(?s)exit code 1.*no such layer"):
        vllm_serve.run_vllm(request, program=[str(program)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--draft": "nowhere"}, "expected a draft folder"),
        ({"--model": "nowhere"}, "nowhere"),
        ({"--data": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_errors_are_one_message(folder: Path, change: dict[str, str], message: str) -> None:
    options = flags(folder)
    for flag, value in change.items():
        options[options.index(flag) + 1] = value
    result = CliRunner().invoke(eval_command, options)
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert "Traceback" not in result.output


class Template:
    """What prompts need of a tokenizer."""

    is_fast = True
    chat_template = "contents with | between them"
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        return "|".join(m["content"] for m in messages) + ">" * options["add_generation_prompt"]

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        assert options == {"add_special_tokens": False}
        return {"input_ids": [ord(c) for c in text]}


def test_prompts_end_before_the_answer(tmp_path: Path) -> None:
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    rows = [
        {"messages": chat, "category": "talk"},
        {"messages": [*chat, {"role": "assistant", "content": "d"}]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    first, second = read_prompts(path, Template(), vocab_size=256, room=10)
    assert first.ids == second.ids == [ord(c) for c in "a|b|c>"]
    assert (first.source, second.source) == ("talk", None)
    assert second.where == f"{path}:2"
    with pytest.raises(DataError, match="rows.jsonl:1: the prompt has 6 tokens"):
        read_prompts(path, Template(), vocab_size=256, room=5)
    with pytest.raises(DataError, match="no tokenizer"):
        read_prompts(path, None, vocab_size=256, room=5)
    path.write_text('{"messages": [{"role": "assistant", "content": "d"}]}\n')
    with pytest.raises(DataError, match="only an assistant turn"):
        read_prompts(path, Template(), vocab_size=256, room=5)
    path.write_text("\n")
    with pytest.raises(DataError, match="no rows"):
        read_prompts(path, Template(), vocab_size=256, room=5)


def test_named_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = ModuleType("datasets")
    asked = []

    def load(path: str, config: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((path, config, split))
        return [{"turns": [c, "more"], "category": c} for c in ("coding", "math", "coding")]

    monkeypatch.setattr(datasets, "load_dataset", load, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    got = read_prompts("speed-bench:coding", Template(), vocab_size=256, room=None, limit=None)
    assert asked == [("nvidia/SPEED-Bench", "qualitative", "test")]
    assert [(p.where, p.source) for p in got] == [
        ("speed-bench:0", "speed-bench/coding"),
        ("speed-bench:2", "speed-bench/coding"),
    ]
    assert got[0].ids == [ord(c) for c in "coding>"]
    with pytest.raises(UsageError, match="speed-bench has coding, math"):
        read_prompts("speed-bench:poetry", Template(), vocab_size=256, room=None)

    def offline(path: str, config: str | None, split: str) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UsageError, match="(?s)openai/gsm8k could not be loaded.*no route.*JSONL"):
        read_prompts("gsm8k", Template(), vocab_size=256, room=None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="pip install datasets"):
        read_prompts("gsm8k", Template(), vocab_size=256, room=None)


def test_error_of_the_mean_length_is_by_prompt() -> None:
    """Copies of a prompt's blocks inside one prompt do not make the mean any surer; more prompts
    do.
    """
    few = [Outcome([1], 1.0, 2, (2, 0)), Outcome([1], 1.0, 2, (0, 0))]
    many = [Outcome([1], 1.0, 20, (20, 0)), Outcome([1], 1.0, 20, (0, 0))]
    error = summarise(few)["mean_accepted_length_se"]
    assert summarise(many)["mean_accepted_length_se"] == pytest.approx(error)
    assert error == pytest.approx(0.5)  # the standard error of the mean of 0 and 1
    assert summarise(few * 8)["mean_accepted_length_se"] == pytest.approx(error * (1 / 15) ** 0.5)
    assert summarise(few[:1])["mean_accepted_length_se"] is None


def test_counts_add_up() -> None:
    total = summarise(
        [Outcome([1] * 6, 2.0, 2, (2, 1)), Outcome([1] * 2, 2.0, 1, (0, 0)), Outcome([1], 1.0)]
    )
    assert total["accept_rate"] == [2 / 3, 1 / 3]
    assert total["mean_accepted_length"] == 2.0
    assert total["tokens_per_second"] == 9 / 5
    assert summarise([Outcome([1], 1.0)])["mean_accepted_length"] is None


def test_answers_of_one_token_have_no_rates(folder: Path) -> None:
    config = EvalConfig(
        model=str(folder / "target"),
        draft=str(folder / "draft"),
        data=str(folder / "rows.jsonl"),
        max_tokens=1,
        device="cpu",
    )
    found = evaluate(config)
    assert found["drafts"] == 0
    assert found["mean_accepted_length"] is None
    assert found["lossless"] is True


def test_accepted_tokens_are_those_drafted_up_to_the_first_difference() -> None:
    from dspark.tools.judge.coloured import ACCEPTED, accepted, coloured, steps

    # Prompt of 5 tokens; the answer's first token (position 5) is the target's and the first
    # anchor.
    tokens = [10, 11, 12, 13, 14, 15]
    blocks = ((5, (11, 12, 99)), (8, (14, 77, 78)), (10, (1, 2, 3)))
    outcome = Outcome(tokens, 1.0, drafts=3, accepted_at=(2, 1, 0), drafted=blocks)
    marks = accepted(5, outcome)
    assert marks == [False, True, True, False, True, False]
    assert sum(marks) == sum(outcome.accepted_at)
    assert steps(outcome).startswith("6 tokens in 4 target steps: 1.50 tokens per step")

    class Letters:
        def decode(self, ids: list[int], **kwargs: object) -> str:
            return "".join(chr(87 + i) for i in ids)

    text = coloured(Letters(), tokens, marks)
    assert text.plain == "abcdef"
    assert [text.plain[s.start : s.end] for s in text.spans if s.style == ACCEPTED] == [
        "b",
        "c",
        "e",
    ]
    assert accepted(5, Outcome(tokens, 1.0)) == [False] * 6
