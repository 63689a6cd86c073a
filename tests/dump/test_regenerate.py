"""The target answers: its own tokens, the states of the run that made them, turn by turn; stopped
and resumed to the same store.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import dspark.cache
from dspark.cache.codec import registry
from dspark.cache.errors import DataError, EngineError, MismatchError, UsageError
from dspark.cache.parts.committed import scan_parts
from dspark.cache.records import KEY_BYTES, TokenSample
from dspark.cache.settings import LOSSLESS
from dspark.cache.stored_manifest import read_manifest
from dspark.cache.writer import StoreWriter
from dspark.dump import job as job_module
from dspark.dump import plan as planning
from dspark.dump.cli import main
from dspark.dump.config import DumpConfig
from dspark.dump.corpus import parts
from dspark.dump.corpus.rows import ChatRow, Row
from dspark.dump.engines.answers import Ask, Sampling, recommended, seed_of, stored_runs
from dspark.dump.engines.engine import CodedStates
from dspark.dump.engines.hf import TransformersEngine
from dspark.dump.job import prepare
from dspark.dump.progress import Display
from dspark.dump.regenerate import conversations as regenerate
from dspark.dump.run import dump
from dump_targets import chat, engine

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=9, thinking=None)
ROWS = [
    chat("u: say hello", "a: an answer that is not used"),
    chat("s: be brief", "u: the cat", "a: x", "u: the mat", "a: y", "u: and?"),
    chat("a: nobody asked"),
    *[chat(f"u: {'one two ' * i}") for i in range(1, 7)],
]


@pytest.fixture
def config(tiny: Path, tmp_path: Path, write_rows: Callable[..., Path]) -> DumpConfig:
    return DumpConfig(
        model=str(tiny),
        data=str(write_rows(ROWS)),
        output=tmp_path / "hs.zarr",
        regenerate=True,
        max_tokens=12,
        temperature=0.7,
        aux_bits=16,
        last_bits=16,
        seq_length=200,
    )


def test_answers_are_the_target_s_and_states_those_of_a_second_pass(
    config: DumpConfig, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regenerate, "PART_ROWS", 3)
    greedy = dataclasses.replace(config, temperature=0.0)
    out = dump(greedy, Display())
    assert (out["rows_read"], out["samples"], out["dropped"]) == (9, 8, {"no user turn": 1})
    store = dspark.cache.open(config.output)
    assert (
        store.manifest.dump.mask_rule
        == "regenerate (temperature 0, top_p 1, top_k 0, max_tokens 12)"
    )
    rows = [
        json.loads(line) for line in Path(f"{config.output}.answers.jsonl").read_text().splitlines()
    ]
    assert [r["row"] for r in rows] == [0, 1, 3, 4, 5, 6, 7, 8]
    assert [m["role"] for m in rows[1]["messages"]] == ["system", *["user", "assistant"] * 3]
    assert not Path(f"{config.output}.answers").exists()
    job = prepare(greedy)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    for i in range(len(store)):
        sample = store[i]
        spans = np.flatnonzero(np.diff(sample.loss_mask.astype(int), prepend=0, append=0)).reshape(
            -1, 2
        )
        assert spans[-1, 1] == len(sample.input_ids)
        with torch.inference_mode():
            found = model(
                torch.from_numpy(sample.input_ids).long()[None], output_hidden_states=True
            )
        for a, b in spans.tolist():
            assert (
                found.logits[0, a - 1 : b - 1].argmax(-1).tolist() == sample.input_ids[a:b].tolist()
            )
        expected = torch.stack(
            [found.hidden_states[j + 1][0] for j in store.manifest.layers], dim=1
        ).numpy()
        np.testing.assert_allclose(sample.aux[:-1], expected[:-1], rtol=2**-7, atol=2e-3)
        np.testing.assert_array_equal(sample.aux[-1], sample.aux[-2])
        last = found.hidden_states[-1][0].numpy()
        np.testing.assert_allclose(
            sample.last[sample.last_mask], last[sample.last_mask], rtol=2**-7, atol=2e-3
        )
        answer = job.target.tokenizer.decode(
            sample.input_ids[spans[-1, 0] :], skip_special_tokens=True
        )
        assert rows[i]["messages"][-1]["content"] == answer


def test_it_resumes_to_the_same_store_and_refuses_other_sampling(
    config: DumpConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regenerate, "PART_ROWS", 3)
    dump(config, Display())
    answers = Path(f"{config.output}.answers.jsonl").read_bytes()

    def files() -> dict[str, bytes]:
        return {
            str(p.relative_to(config.output)): p.read_bytes()
            for p in config.output.rglob("*")
            if p.is_file()
        }

    before = files()
    shutil.rmtree(config.output / "parts" / "000000000001")
    folder = Path(f"{config.output}.answers")
    folder.mkdir()
    lines = answers.decode().splitlines(keepends=True)
    for part, rows in (("000000000000", range(3)), ("000000000002", range(6, 9))):
        kept = [line for line in lines if json.loads(line)["row"] in rows]
        (folder / f"{part}.jsonl").write_text("".join(kept))
    StoreWriter.resume(config.output, prepare(config).manifest).reopen()
    with pytest.raises(MismatchError, match="mask_rule"):
        dump(dataclasses.replace(config, resume=True, temperature=0.5), Display())
    # Its parts' size is the store's, not this machine's default.
    monkeypatch.setattr(planning, "CPU_PART_TOKENS", 777)
    dump(dataclasses.replace(config, resume=True), Display())
    assert files() == before
    assert Path(f"{config.output}.answers.jsonl").read_bytes() == answers


def test_too_many_dropped_rows_stop_it_as_without(
    config: DumpConfig, monkeypatch: pytest.MonkeyPatch, write_rows: Callable[..., Path]
) -> None:
    rows = [chat("u: the cat"), *[chat("a: nobody asked")] * 3, chat("u: the mat")]
    config = dataclasses.replace(config, data=str(write_rows(rows)), max_dropped=0.5)
    said = (
        r"3 of the first 5 rows gave no sample \(no user turn: 3\), more than the allowed share "
        r"of 50%"
    )
    with pytest.raises(DataError, match=said):
        dump(config, Display())
    assert not read_manifest(config.output).complete
    out = dump(dataclasses.replace(config, resume=True, max_dropped=0.6), Display())
    assert (out["samples"], out["dropped"], out["rows_read"]) == (2, {"no user turn": 3}, 5)


def test_too_many_dropped_rows_stop_it_early(
    config: DumpConfig, monkeypatch: pytest.MonkeyPatch, write_rows: Callable[..., Path]
) -> None:
    """Behind the first parts of a thousand rows, and what was answered until then is kept."""
    monkeypatch.setattr(regenerate, "PART_ROWS", 3)
    monkeypatch.setattr(parts, "EARLY_ROWS", 9)
    # else the self-check reads as far and stops it
    monkeypatch.setattr(job_module, "PROBE_TOKENS", 20)
    rows = [*[chat("u: one two")] * 9, *[chat("a: nobody asked")] * 15, *[chat("u: the mat")] * 30]
    config = dataclasses.replace(config, data=str(write_rows(rows)), max_tokens=4, temperature=0.0)
    with pytest.raises(DataError, match="12 of the first 21 rows gave no sample"):
        dump(config, Display())
    assert [r.row_stop for r in scan_parts(config.output).values()] == [3, 6, 9, 12, 15, 18, 21]


def test_rows_that_are_no_text_are_dropped_and_counted(
    config: DumpConfig, write_rows: Callable[..., Path]
) -> None:
    rows = [chat("u: the cat"), chat("u: half \ud83d"), chat("u: the mat")]
    out = dump(dataclasses.replace(config, data=str(write_rows(rows)), max_dropped=0.5), Display())
    assert (out["samples"], out["dropped"]) == (2, {"not Unicode text": 1})


def test_a_turn_that_the_template_refuses_drops_its_row(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = (
        "{% if messages[-1]['content'] == 'no' %}{{ raise_exception('not this') }}{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", refusing + tokenizer.chat_template)
    prompts = regenerate.Prompts(tokenizer, GREEDY, 200)
    first, second = (
        Row(0, "x", ChatRow([{"role": "user", "content": c} for c in said], None, True))
        for said in (("no", "b"), ("a", "no"))
    )
    made = prompts.make(first)
    assert (made.samples, made.dropped, made.detail) == ([], "template refuses the row", "not this")
    assert prompts.make(second).samples
    talk = regenerate.Conversation(second, regenerate.turns(second))
    assert isinstance(talk.ask(0, prompts), Ask)
    talk.said.append({"role": "assistant", "content": "answer"})
    assert talk.ask(0, prompts) == "template refuses the row"


def test_answers_with_too_few_tokens_are_dropped(config: DumpConfig) -> None:
    # Long prompts leave less room.
    config = dataclasses.replace(config, temperature=0.0, max_dropped=1.0, seq_length=32)
    dump(config, Display())
    store = dspark.cache.open(config.output)
    given = [int(store[i].loss_mask.sum()) for i in range(len(store))]
    assert min(given) < max(given), given
    out = dump(dataclasses.replace(config, min_supervised=max(given), overwrite=True), Display())
    kept = given.count(max(given))
    assert (out["samples"], out["dropped"]["too few supervised tokens"]) == (
        kept,
        len(given) - kept,
    )
    assert len(Path(f"{config.output}.answers.jsonl").read_text().splitlines()) == kept


def test_a_history_that_the_template_rewrites_is_context_only(tokenizer: Any) -> None:
    row = Row(0, "x", ChatRow([{"role": "user", "content": c} for c in ("a", "b")], None, True))
    prompts = regenerate.Prompts(tokenizer, GREEDY, 200)
    for text, spans in (("hello", 1), ("wrong", 0)):
        talk = regenerate.Conversation(row, regenerate.turns(row))
        first = talk.ask(0, prompts)
        assert isinstance(first, Ask)
        ids = tokenizer("hello<|im_end|>", add_special_tokens=False)["input_ids"]
        talk.hear(regenerate.Answered(first, ids, True, None), tokenizer)
        talk.said[-1]["content"] = text
        second = talk.ask(0, prompts)
        assert isinstance(second, Ask)
        assert (first.keep, second.keep, len(second.spans)) == (False, True, spans)
        if spans:
            a, b = second.spans[0]
            assert second.prompt[a:b] == ids
            assert stored_runs(second) == [[a, b - 1], [len(second.prompt), None]]


def test_batched_answers_do_not_depend_on_the_batch() -> None:
    rng = np.random.default_rng(0)
    asks = [
        Ask(i, rng.integers(0, 120, n).tolist(), 9, seed_of(i, 1), i != 1, ())
        for i, n in enumerate((7, 30, 12))
    ]
    codec = registry.make(LOSSLESS)
    together = {
        a.ask.key: a for a in engine("qwen3", batch_tokens=500).answer(asks, GREEDY, [3], codec)
    }
    alone = {a.ask.key: a for a in engine("qwen3", batch_tokens=1).answer(asks, GREEDY, [3], codec)}
    assert together[1].states is None
    for key, found in alone.items():
        assert found.ids == together[key].ids
        assert found.finished == (found.ids[-1] == 3)
        if found.states is None:
            continue
        ids = np.array([*found.ask.prompt, *found.ids], np.int32)
        sample = TokenSample(0, bytes(KEY_BYTES), ids, np.arange(len(ids)) >= len(found.ask.prompt))
        (_, states), *_ = engine("qwen3").capture([sample])
        aux = torch.from_numpy(found.states.arrays["aux_code"]).view(torch.bfloat16).float()
        torch.testing.assert_close(aux[:-1], states.aux[:-1], rtol=2**-7, atol=2e-3)
        last = torch.from_numpy(found.states.arrays["last_code"]).view(torch.bfloat16).float()
        torch.testing.assert_close(last, states.last, rtol=2**-7, atol=2e-3)


def test_recommended_sampling(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20})
    )
    own = recommended(str(tmp_path), None, None, None, None)
    assert (own.temperature, own.top_p, own.top_k, own.max_tokens) == (0.6, 0.95, 20, 2048)
    asked = recommended(str(tmp_path), 0.0, 0.5, 7, False)
    assert (asked.greedy, asked.top_p, asked.max_tokens, asked.thinking) == (True, 0.5, 7, False)
    with pytest.raises(UsageError, match="--top-p: found 2"):
        recommended(str(tmp_path), None, 2.0, None, None)


@pytest.mark.parametrize(
    ("own", "message"),
    [({"top_k": -2}, "top_k: found -2"), ({"temperature": math.inf}, "--temperature: found inf")],
)
def test_what_the_target_recommends_is_checked_too(
    own: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True, **own}))
    with pytest.raises(UsageError, match=message):
        recommended(str(tmp_path), None, None, None, None)


def test_no_limit_as_vllm_writes_it(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": -1}))
    assert recommended(str(tmp_path), None, None, None, None).top_k == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "1"], "so it needs --regenerate"),
        (["--regenerate", "--assistant-pattern", "(x)"], "omit --assistant-pattern"),
        (["--regenerate", "--part-tokens", "4096"], "omit --part-tokens"),
        (["--regenerate", "--temperature", "nan"], "--temperature: found nan"),
        (["--regenerate", "--temperature", "inf"], "--temperature: found inf"),
        (["--regenerate", "--temperature", "-1"], "--temperature: found -1"),
        (["--regenerate", "--top-p", "nan"], "--top-p: found nan"),
        (["--regenerate", "--top-p", "0"], "--top-p: found 0"),
        (["--regenerate", "--max-tokens", "0"], "--max-tokens: found 0, expected at least 2"),
        (["--max-dropped", "nan"], "--max-dropped: found nan"),
        (["--workers", "-1"], "--workers: found -1"),
        (["--workers", "1" + "0" * 30], "expected 0 to 256 processes"),
        (["--limit", "-1"], "--limit: found -1"),
        (["--limit", "1" + "0" * 30], "--limit: found 1000"),
        (["--part-tokens", "0"], "--part-tokens: found 0"),
        (["--seq-length", "0"], "--seq-length: found 0"),
    ],
)
def test_flags_that_are_refused_before_anything_is_read(
    words: list[str], message: str, tiny: Path, tmp_path: Path
) -> None:
    out = CliRunner().invoke(
        main, ["--model", str(tiny), "--data", "x.jsonl", "--output", str(tmp_path / "o"), *words]
    )
    assert out.exit_code == 2
    assert message in out.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("answers", [1, 2])
def test_a_state_that_is_not_finite_is_named(
    config: DumpConfig, monkeypatch: pytest.MonkeyPatch, answers: int
) -> None:
    """By its row in the data file, of several answers too."""
    coded = TransformersEngine._coded

    def spoilt(
        self: TransformersEngine, aux: torch.Tensor, last: torch.Tensor, ask: Ask, *more: Any
    ) -> CodedStates:
        if ask.named_row == 4:
            aux = aux.clone()
            aux[3, 1, 7] = torch.nan
        return coded(self, aux, last, ask, *more)

    monkeypatch.setattr(TransformersEngine, "_coded", spoilt)
    words = r"row 4 \(counted from 0; .*:5\), .*token 3, aux layer index 1, channel 7: found nan"
    with pytest.raises(EngineError, match=words):
        dump(dataclasses.replace(config, answers=answers), Display())


def test_several_answers_per_prompt(config: DumpConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each conversation goes on with its own answers; all of a row lie on one side of the split; a
    resumed run gives the same.
    """
    monkeypatch.setattr(regenerate, "PART_ROWS", 4)
    out = dump(dataclasses.replace(config, answers=3), Display())
    assert (out["rows_read"], out["samples"], out["dropped"]) == (9, 24, {"no user turn": 1})
    store = dspark.cache.open(config.output)
    assert store.manifest.dump.mask_rule.endswith("max_tokens 12, 3 answers)")
    rows = [
        json.loads(line) for line in Path(f"{config.output}.answers.jsonl").read_text().splitlines()
    ]
    assert [(r["row"], r["answer"]) for r in rows] == [
        (n, k) for n in (0, 1, 3, 4, 5, 6, 7, 8) for k in range(3)
    ]
    of_row = [[json.dumps(r["messages"]) for r in rows if r["row"] == n] for n in range(9)]
    assert all(len(set(said)) > 1 for said in of_row if said)
    index = store.index
    for n in {r["row"] for r in rows}:
        keys = {k.tobytes() for k in index["sample_key"][index["sample_row"] == n]}
        assert len(keys) == 1
    shutil.rmtree(next(iter(sorted((config.output / "parts").iterdir()))))
    StoreWriter.resume(config.output, read_manifest(config.output)).reopen()
    before = rows
    dump(dataclasses.replace(config, answers=3, resume=True), Display())
    assert [
        json.loads(line) for line in Path(f"{config.output}.answers.jsonl").read_text().splitlines()
    ] == before
    with pytest.raises(MismatchError, match="mask_rule"):
        dump(dataclasses.replace(config, answers=2, resume=True), Display())


def test_several_answers_need_a_temperature(config: DumpConfig) -> None:
    with pytest.raises(UsageError, match="all of them would be the same"):
        dump(dataclasses.replace(config, answers=2, temperature=0.0), Display())
    with pytest.raises(UsageError, match="--answers: found 0, expected 1 to 256"):
        dataclasses.replace(config, answers=0)
