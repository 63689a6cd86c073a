"""Loss masks by hand: the supervised part of the rendered chat stands between « and »."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dump_runs import corpus

from dspark.cache.errors import DataError, UsageError
from dspark.dump.config import DumpConfig
from dspark.dump.corpus.masks import (
    BEYOND,
    NO_ANSWER,
    NO_MATCH,
    NOT_TEXT,
    NOT_UNICODE,
    REFUSED,
    TOO_FEW,
    Made,
    SampleMaker,
    sample_key,
)
from dspark.dump.corpus.rows import Row, parse_row
from dspark.dump.progress import Display
from dspark.dump.run import dump
from dump_targets import CHATML, build_tokenizer, chat

TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content "
    "}}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3: the last answer gets an empty thought in front, earlier ones lose theirs.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{{ m.content }}"
    "{% elif m.role == 'assistant' %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content "
    "}}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As GLM: no end-of-turn token, the next turn begins at once.
ENDLESS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}{% if "
    "add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PATTERN = r"<\|im_start\|>assistant\n((?:(?!<\|im_start\|>).)*)"


def make(row: dict[str, Any], template: str | None = CHATML, **options: Any) -> Made:
    settings: dict[str, Any] = {
        "tokenised": False,
        "vocab_size": 400,
        "seq_length": 1000,
        "min_supervised": 2,
    }
    maker = SampleMaker(build_tokenizer(template), **(settings | options))
    return maker.make(Row(3, "f:4", parse_row(row, "f:4")))


def marked(made: Made) -> str:
    assert len(made.samples) == 1, made
    tokenizer = build_tokenizer()
    out, on = "", False
    for token, flag in zip(
        made.samples[0].input_ids.tolist(), made.samples[0].loss_mask.tolist(), strict=True
    ):
        out += "»" if on and not flag else "«" if flag and not on else ""
        out, on = out + tokenizer.decode([token]), flag
    return out + ("»" if on else "")


ONE = chat("u: hi", "a: yes.")
TWO = chat("s: be brief", "u: hi", "a: yes", "u: why", "a: no")
U, A = "<|im_start|>user\n", "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (ONE, f"{U}hi<|im_end|>\n{A}«yes.<|im_end|>»\n"),
        (
            TWO,
            "<|im_start|>system\nbe "
            f"brief<|im_end|>\n{U}hi<|im_end|>\n{A}«yes<|im_end|>»\n{U}why<|im_end|>\n{A}«no<|im_end|>»\n",
        ),
        (ONE | {"finished": False}, f"{U}hi<|im_end|>\n{A}«yes.»<|im_end|>\n"),
        (
            TWO | {"finish_reason": "length"},
            "<|im_start|>system\nbe "
            f"brief<|im_end|>\n{U}hi<|im_end|>\n{A}«yes<|im_end|>»\n{U}why<|im_end|>\n{A}«no»<|im_end|>\n",
        ),
        (chat("u: hi", "a: yes", "u: more"), f"{U}hi<|im_end|>\n{A}«yes<|im_end|>»\n"),
        (chat("a: hello you"), f"{A}«hello you<|im_end|>»\n"),
        # The answer repeats its own end as text inside: only the real end ends it.
        (chat("u: hi", "a: no\nno"), f"{U}hi<|im_end|>\n{A}«no\nno<|im_end|>»\n"),
        (chat("u: hi", "a: \n one \n"), f"{U}hi<|im_end|>\n{A}«\n one \n<|im_end|>»\n"),
    ],
    ids=[
        "single",
        "multi",
        "cut",
        "multi cut",
        "user last",
        "answer first",
        "repeats",
        "whitespace",
    ],
)
@pytest.mark.parametrize("template", [CHATML, TAGGED], ids=["difference", "tag"])
def test_masks(row: dict[str, Any], expected: str, template: str) -> None:
    assert marked(make(row, template)) == expected


def test_pattern() -> None:
    text = marked(make(TWO, assistant_pattern=PATTERN))
    # It narrows what the target wrote, which ends with its end token.
    assert text.endswith(f"{A}«yes<|im_end|>»\n{U}why<|im_end|>\n{A}«no<|im_end|>»\n")
    assert marked(make(TWO | {"finished": False}, assistant_pattern=PATTERN)).endswith(
        f"{A}«no»<|im_end|>\n"
    )


def test_pattern_of_the_glm_kind_spans_lines() -> None:
    row = chat("u: hi", "a: one\ntwo", "u: why", "a: no")
    assert (
        marked(make(row, ENDLESS, assistant_pattern=PATTERN)) == f"{U}hi{A}«one\ntwo»{U}why{A}«no»"
    )
    assert marked(make(row, ENDLESS)) == f"{U}hi{A}«one\ntwo»{U}why{A}«no»"


def test_bytes_of_one_character_stay_together() -> None:
    made = make(chat("u: é", "a: é你"), TAGGED)
    assert int(made.samples[0].loss_mask.sum()) == 2 + 3 + 1


@pytest.mark.parametrize(
    ("row", "template", "options", "reason"),
    [
        (chat("u: hi"), CHATML, {}, NO_ANSWER),
        (chat("u: hi", "a: "), CHATML, {}, TOO_FEW),
        (chat("u: hi", "a: yes"), CHATML, {"min_supervised": 90}, TOO_FEW),
        (chat("u: hi", "a: yes"), CHATML, {"seq_length": 5}, BEYOND),
        (chat("u: hi", "a: yes"), CHATML, {"assistant_pattern": "BOT(.*)"}, NO_MATCH),
        (chat("u: hi", "a: yes"), "{{ raise_exception('roles') }}", {}, REFUSED),
    ],
)
def test_drops(row: dict[str, Any], template: str, options: dict[str, Any], reason: str) -> None:
    made = make(row, template, **options)
    assert (made.samples, made.dropped) == ([], reason)


HALF = "hello \ud83d"  # an emoji cut in two, as JSON can write it and UTF-8 cannot
CALL = {"type": "function", "function": {"name": "f", "arguments": {"q": HALF}}}


@pytest.mark.parametrize(
    "row",
    [
        chat(f"u: {HALF}", "a: yes it is"),
        chat("u: hi", f"a: {HALF}"),
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": HALF}]},
                *chat("a: yes")["messages"],
            ]
        },
        {
            "conversations": [
                {"from": "human", "value": HALF},
                {"from": "gpt", "value": "yes it is"},
            ]
        },
        {
            "messages": [
                *chat("u: hi")["messages"],
                {"role": "assistant", "content": "yes", "tool_calls": [CALL]},
            ]
        },
        {
            "messages": [
                *chat("u: hi")["messages"],
                {"role": "assistant", "content": "yes", "reasoning_content": HALF},
            ]
        },
        chat(
            "u: hi",
            "a: yes it is",
            tools=[{"type": "function", "function": {"name": "f", "description": HALF}}],
        ),
        chat("u: hi", "a: yes it is", tools=[{"type": "function", "function": {HALF: 1}}]),
    ],
    ids=["prompt", "answer", "part", "sharegpt", "tool call", "reasoning", "tools", "key"],
)
@pytest.mark.parametrize(
    "rule", [{}, {"assistant_pattern": PATTERN}], ids=["difference", "pattern"]
)
def test_half_a_character_drops_the_row(row: dict[str, Any], rule: dict[str, Any]) -> None:
    """Tokenizers refuse it with an error that names no row."""
    made = make(row, **rule)
    assert (made.samples, made.dropped) == ([], NOT_UNICODE)
    assert r"half a character, '\ud83d', after" in made.detail
    made.detail.encode()  # it goes to a log


def test_half_a_character_in_the_middle_of_a_dump_is_counted(
    config: DumpConfig, show: Display, write_rows: Callable[..., Path]
) -> None:
    rows = corpus(20)
    rows[9] = chat(f"u: {HALF}", "a: yes it is")
    out = dump(dataclasses.replace(config, data=str(write_rows(rows))), show)
    assert out["dropped"] == {NO_ANSWER: 2, NOT_UNICODE: 1}
    assert (out["rows_read"], out["samples"]) == (20, 17)
    log = config.output.with_name("hs.zarr.log").read_text()
    assert rf"rows.jsonl:10: dropped: {NOT_UNICODE} (half a character, '\ud83d', after" in log
    many = write_rows(rows[:2] + [rows[9]] * 3, "many.jsonl")
    with pytest.raises(
        DataError, match=rf"3 of the first 5 rows gave no sample \({NOT_UNICODE}: 3\)"
    ):
        dump(dataclasses.replace(config, data=str(many), overwrite=True), show)


def test_both_halves_are_a_character() -> None:
    row = json.loads(json.dumps(chat("u: hi", "a: \U0001f600")))  # JSON writes it as two halves
    (sample,) = make(row).samples
    assert build_tokenizer().decode(sample.input_ids[sample.loss_mask]) == "\U0001f600<|im_end|>"


def test_a_content_in_parts() -> None:
    """Text parts are their text, whatever the template does with lists; a part that is no text
    drops the row.
    """
    parts = [{"type": "text", "text": "yes"}, {"type": "text", "text": "."}]
    for template in (CHATML, TAGGED):
        row = {
            "messages": [
                {"role": "user", "content": ["hi"]},
                {"role": "assistant", "content": parts},
            ]
        }
        assert marked(make(row, template)) == marked(make(ONE, template))
        row["messages"][0]["content"] = [*parts, {"type": "image", "url": "a.png"}]
        made = make(row, template)
        assert (made.dropped, made.detail) == (NOT_TEXT, "messages[0] has parts other than text")


def test_nul_characters_are_text_like_any_other() -> None:
    assert marked(make(chat("u: a\0b", "a: x\0y"))) == f"{U}a\0b<|im_end|>\n{A}«x\0y<|im_end|>»\n"


def test_a_date_in_a_message_of_a_data_set() -> None:
    row = chat("u: hi", "a: yes.")
    row["messages"][0]["date"] = datetime.date(2026, 11, 22)
    assert marked(make(row)) == marked(make(ONE))


def test_a_template_that_rewrites_its_history_gives_a_sample_per_answer() -> None:
    made = make(chat("u: hi", "a: <think>a</think>yes", "u: why", "a: no"), THINKING)
    first, second = (marked(dataclasses.replace(made, samples=[s])) for s in made.samples)
    assert first == f"{U}hi<|im_end|>\n{A}«<think></think><think>a</think>yes<|im_end|>»\n"
    history = f"{U}hi<|im_end|>\n{A}yes<|im_end|>\n{U}why<|im_end|>\n"
    assert second == f"{history}{A}«<think></think>no<|im_end|>»\n"
    assert [s.turn for s in made.samples] == [0, 1]
    assert made.samples[0].key == made.samples[1].key


def test_truncation_is_counted_and_keeps_what_fits() -> None:
    whole = make(ONE)
    cut = make(ONE, seq_length=len(whole.samples[0].input_ids) - 2)
    assert cut.truncated
    assert not whole.truncated
    assert marked(cut).endswith("yes.»")


def test_keys_are_the_prompt_s() -> None:
    a, b = make(chat("u: hi", "a: yes")), make(chat("u: hi", "a: no, never"))
    assert a.samples[0].key == b.samples[0].key == sample_key([{"role": "user", "content": "hi"}])
    assert make(chat("u: ho", "a: yes")).samples[0].key != a.samples[0].key


def test_tokenised_rows_pass_through() -> None:
    maker = SampleMaker(None, tokenised=True, vocab_size=10, seq_length=4, min_supervised=2)
    made = maker.make(
        Row(
            0, "f:1", parse_row({"input_ids": [1, 2, 3, 4, 5], "loss_mask": [0, 0, 1, 1, 1]}, "f:1")
        )
    )
    assert made.truncated
    np.testing.assert_array_equal(made.samples[0].input_ids, [1, 2, 3, 4])
    np.testing.assert_array_equal(made.samples[0].loss_mask, [False, False, True, True])
    assert made.samples[0].key == sample_key([1, 2])
    assert maker.mask_rule == "given"


@pytest.mark.parametrize("bad", [-1, 10, 10**30])
def test_ids_outside_the_vocabulary(bad: int) -> None:
    maker = SampleMaker(None, tokenised=True, vocab_size=10, seq_length=4, min_supervised=2)
    with pytest.raises(
        DataError, match=f"f:1: token id {bad} is outside the target's vocabulary of 10"
    ):
        maker.make(Row(0, "f:1", parse_row({"input_ids": [1, bad], "loss_mask": [1, 1]}, "f:1")))


def test_kinds_of_rows_do_not_mix() -> None:
    with pytest.raises(
        DataError, match="f:4: found one of tokenised rows in a corpus that began with chat rows"
    ):
        make({"input_ids": [1], "loss_mask": [1]})


def test_no_template_no_tokenizer_bad_pattern() -> None:
    with pytest.raises(UsageError, match="has no chat template"):
        make(ONE, None)
    with pytest.raises(UsageError, match="has no tokenizer"):
        SampleMaker(None, tokenised=False, vocab_size=10, seq_length=4, min_supervised=2)
    with pytest.raises(UsageError, match="not a regular expression"):
        make(ONE, assistant_pattern="(")
    with pytest.raises(UsageError, match="has no group"):
        make(ONE, assistant_pattern="a")


def test_rule_is_named_for_the_manifest() -> None:
    def rule(template: str, pattern: str | None = None) -> str:
        return SampleMaker(
            build_tokenizer(template),
            tokenised=False,
            vocab_size=9,
            seq_length=9,
            min_supervised=2,
            assistant_pattern=pattern,
        ).mask_rule

    assert rule(CHATML) == "render-difference"
    assert rule(TAGGED) == "render-difference"
    assert rule(TAGGED, PATTERN) == "assistant-pattern"
