"""Rows of every dialect: what is supervised stands between « and », and a row that gives no label
says what to do.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from dspark.cache.errors import DataError
from dspark.dump.corpus.masks import MALFORMED, NO_ANSWER, NOT_TEXT, UNTAUGHT, Made, SampleMaker
from dspark.dump.corpus.parts import PartReader, PartRows
from dspark.dump.corpus.rows import row_of
from dspark.dump.corpus.turns import WAY_OUT
from dump_targets import build_tokenizer

# Writes tools, thoughts and calls, and marks every message's role.
TEMPLATE = (
    "{% if tools %}T{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ "
    "m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content "
    "or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor "
    "%}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENIZER = build_tokenizer(TEMPLATE)
ASK, SAY = {"role": "user", "content": "any news?"}, {"role": "assistant", "content": "none yet"}
RAIN = {"role": "tool", "content": "rain"}
FUNCTION = {"name": "look", "arguments": '{"at": "sea"}'}
CALL = {"id": "c1", "type": "function", "function": FUNCTION}
CHOICES = {"choices": [{"message": SAY, "finish_reason": "stop"}]}
CUT = {"choices": [{"message": SAY, "finish_reason": "length"}]}
ONE = "U:any news? A:«none yet.»"
SHORT = "U:any news? A:«none yet»."
CALLED = '<call>{"name": "look", "arguments": {"at": "sea"}}</call>'
TOOL_CHAT = f"U:any news? A:«{CALLED}.» T:rain A:«none yet.»"
THOUGHT = "U:any news? A:«<think>hm well</think>none yet.»"
SYSTEM = f"S:no fuss {ONE}"


def maker(**options: Any) -> SampleMaker:
    settings: dict[str, Any] = {"vocab_size": 400, "seq_length": 1000, "min_supervised": 2}
    return SampleMaker(TOKENIZER, tokenised=False, **(settings | options))


def make(row: Any) -> Made:
    return maker().make(row_of(0, "f:1", row))


def marked(made: Made) -> str:
    """The samples' text, their roles and ends short, with « and »."""
    out = []
    for sample in made.samples:
        text, on = "", False
        for token, flag in zip(sample.input_ids.tolist(), sample.loss_mask.tolist(), strict=True):
            text += "»" if on and not flag else "«" if flag and not on else ""
            text, on = text + TOKENIZER.decode([token]), flag
        text += "»" if on else ""
        for role, short in (("user", "U"), ("assistant", "A"), ("system", "S"), ("tool", "T")):
            text = text.replace(f"<|im_start|>{role}\n", f"{short}:")
        text = (
            text.replace("<|im_end|>»\n", ".» ")
            .replace("»<|im_end|>\n", "». ")
            .replace("<|im_end|>\n", " ")
        )
        out.append(text.strip())
    return " | ".join(out)


def blocks(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return list(parts)


def text(kind: str, said: str) -> dict[str, str]:
    return {"type": kind, "text": said}


ROWS: dict[str, tuple[Any, str]] = {
    # An answer beside its chat.
    "messages, response": ({"messages": [ASK], "response": "none yet"}, ONE),
    "messages, completion": ({"messages": [ASK], "completion": [SAY]}, ONE),
    "messages, response of a server": ({"messages": [ASK], "response": CUT}, SHORT),
    "messages, response as text of JSON": (
        {"messages": [ASK], "response": json.dumps(CHOICES)},
        ONE,
    ),
    "messages, choices": ({"messages": json.dumps([ASK]), "choices": CHOICES["choices"]}, ONE),
    "conversations, response": (
        {"conversations": [{"from": "human", "value": "any news?"}], "response": SAY},
        ONE,
    ),
    "prompt of messages": ({"prompt": [ASK], "completion": [SAY]}, ONE),
    "an answer that is JSON": (
        {"prompt": "any news?", "completion": '{"a": 1}'},
        'U:any news? A:«{"a": 1}.»',
    ),
    "an answer that is there already": ({"messages": [ASK, SAY], "response": "none yet"}, ONE),
    "question and answer": ({"question": "any news?", "answer": "none yet"}, ONE),
    "history": (
        {"instruction": "any news?", "output": "none yet", "history": [["so?", "no"]]},
        f"U:so? A:«no.» {ONE}",
    ),
    "thought beside the answer": (
        {"prompt": "any news?", "reasoning": "hm well", "response": "none yet"},
        THOUGHT,
    ),
    "a setting that is no thought": (
        {"prompt": "any news?", "reasoning": "on", "response": "none yet"},
        ONE,
    ),
    # Logs.
    "gateway": ({"request": {"messages": [ASK]}, "response": CHOICES}, ONE),
    "gateway of text": (
        {"request": json.dumps({"messages": [ASK]}), "response": json.dumps(CUT)},
        SHORT,
    ),
    "gateway with bodies": ({"request_body": {"messages": [ASK]}, "response_body": CHOICES}, ONE),
    "trace": ({"input": {"messages": [ASK]}, "output": CHOICES}, ONE),
    "trace of messages": ({"input": [ASK], "output": SAY}, ONE),
    "filtered answer": (
        {
            "request": {"messages": [ASK]},
            "response": {"choices": [{"message": SAY, "finish_reason": "content_filter"}]},
        },
        SHORT,
    ),
    "local server": (
        {"request": {"messages": [ASK]}, "response": {"message": SAY, "done_reason": "length"}},
        SHORT,
    ),
    "batch": (
        {
            "custom_id": "1",
            "body": {"messages": [ASK]},
            "response": {"status_code": 200, "body": CHOICES},
        },
        ONE,
    ),
    "batch of one file": (
        {"custom_id": "1", "method": "POST", "body": {"messages": [ASK, SAY]}},
        ONE,
    ),
    "several answers": (
        {
            "request": {"messages": [ASK]},
            "response": {"choices": [*CHOICES["choices"], *CUT["choices"]]},
        },
        ONE,
    ),
    "responses": (
        {
            "request": {"instructions": "no fuss", "input": "any news?"},
            "response": {
                "output": [
                    {
                        "type": "message",
                        "role": "assistant",
                        "content": [text("output_text", "none yet")],
                    }
                ]
            },
        },
        SYSTEM,
    ),
    "responses with a thought": (
        {
            "input": [ASK],
            "output": [
                {"type": "reasoning", "summary": [text("summary_text", "hm well")]},
                {
                    "type": "message",
                    "role": "assistant",
                    "content": [text("output_text", "none yet")],
                },
            ],
        },
        THOUGHT,
    ),
    "responses with calls": (
        {
            "request": {
                "input": [
                    ASK,
                    {"type": "function_call", "call_id": "c", **FUNCTION},
                    {"type": "function_call_output", "call_id": "c", "output": "rain"},
                ]
            },
            "response": {
                "incomplete_details": {"reason": "max_output_tokens"},
                "output": [SAY | {"type": "message"}],
            },
        },
        TOOL_CHAT.replace("yet.»", "yet»."),
    ),
    # Blocks and parts.
    "blocks": (
        {
            "system": [text("text", "no fuss")],
            "messages": [
                ASK | {"content": [text("text", "any news?")]},
                {
                    "role": "assistant",
                    "content": blocks(
                        {"type": "thinking", "thinking": "hm well"}, text("text", "none yet")
                    ),
                },
            ],
        },
        f"S:no fuss {THOUGHT}",
    ),
    "blocks with calls": (
        {
            "messages": [
                ASK,
                {
                    "role": "assistant",
                    "content": blocks(
                        {"type": "tool_use", "id": "t", "name": "look", "input": {"at": "sea"}}
                    ),
                },
                {
                    "role": "user",
                    "content": blocks(
                        {
                            "type": "tool_result",
                            "tool_use_id": "t",
                            "content": [text("text", "rain")],
                        }
                    ),
                },
                SAY,
            ]
        },
        TOOL_CHAT,
    ),
    "result and question in one message": (
        {
            "messages": [
                ASK,
                {
                    "role": "assistant",
                    "content": blocks(
                        {"type": "tool_use", "id": "t", "name": "look", "input": {"at": "sea"}}
                    ),
                },
                {
                    "role": "user",
                    "content": blocks(
                        {"type": "tool_result", "content": "rain"}, text("text", "so?")
                    ),
                },
                SAY,
            ]
        },
        TOOL_CHAT.replace("rain", "rain U:so?"),
    ),
    "parts of a request": (
        {
            "messages": [
                ASK | {"content": [text("input_text", "any "), text("input_text", "news?")]},
                SAY,
            ]
        },
        ONE,
    ),
    "one part": ({"messages": [ASK | {"content": text("text", "any news?")}, SAY]}, ONE),
    "contents": (
        {
            "contents": [
                {"role": "user", "parts": [{"text": "any news?"}]},
                {"role": "model", "parts": [{"text": "none yet"}]},
            ]
        },
        ONE,
    ),
    "refusal": (
        {"messages": [ASK, {"role": "assistant", "content": None, "refusal": "none yet"}]},
        ONE,
    ),
    "result that is an object": (
        {
            "messages": [
                ASK,
                SAY | {"tool_calls": [CALL], "content": None},
                RAIN | {"content": {"a": 1}},
                SAY,
            ]
        },
        TOOL_CHAT.replace("rain", '{"a": 1}'),
    ),
    # Calls.
    "calls as text": (
        {
            "messages": [
                ASK,
                {"role": "assistant", "content": None, "tool_calls": json.dumps([CALL])},
                RAIN,
                SAY,
            ]
        },
        TOOL_CHAT,
    ),
    "a list of calls as text": (
        {"messages": [ASK, {"role": "assistant", "tool_calls": [json.dumps(CALL)]}, RAIN, SAY]},
        TOOL_CHAT,
    ),
    "one call": (
        {"messages": [ASK, {"role": "assistant", "tool_calls": CALL}, RAIN, SAY]},
        TOOL_CHAT,
    ),
    "function call": (
        {
            "messages": [
                ASK,
                {"role": "assistant", "content": None, "function_call": FUNCTION},
                RAIN | {"role": "function"},
                SAY,
            ]
        },
        TOOL_CHAT,
    ),
    "function call as text": (
        {
            "messages": [
                ASK,
                {"role": "assistant", "function_call": json.dumps(FUNCTION)},
                RAIN,
                SAY,
            ]
        },
        TOOL_CHAT,
    ),
    "a speaker who calls": (
        {
            "conversations": [
                {"from": "human", "value": "any news?"},
                {"from": "function_call", "value": json.dumps(FUNCTION)},
                {"from": "observation", "value": "rain"},
                {"from": "gpt", "value": "none yet"},
            ]
        },
        TOOL_CHAT,
    ),
    "a call in its tag": (
        {
            "conversations": [
                {"from": "human", "value": "any news?"},
                {
                    "from": "tool_call",
                    "value": f"<tool_call>\n{json.dumps(FUNCTION)}\n</tool_call>",
                },
                {"from": "tool", "value": "rain"},
                {"from": "gpt", "value": "none yet"},
            ]
        },
        TOOL_CHAT,
    ),
    "a null that was written": (
        {
            "messages": [
                ASK,
                SAY | {"tool_calls": [{"function": {"name": "look", "arguments": '{"at": null}'}}]},
            ]
        },
        'U:any news? A:«none yet<call>{"name": "look", "arguments": {"at": null}}</call>.»',
    ),
    "tools with another name": (
        {"functions": [{"name": "look"}], "messages": [ASK, SAY]},
        f'T[{{"type": "function", "function": {{"name": "look"}}}}]\n{ONE}',
    ),
    "tools as text, one by one": (
        {"tools": [json.dumps({"name": "look", "input_schema": {}})], "messages": [ASK, SAY]},
        f'T[{{"type": "function", "function": {{"name": "look", "parameters": {{}}}}}}]\n{ONE}',
    ),
    # Speakers.
    **{
        f"speakers {a}, {b}": (
            {"messages": [{"role": a, "content": "any news?"}, {"role": b, "content": "none yet"}]},
            ONE,
        )
        for a, b in (
            ("human", "ai"),
            ("user", "model"),
            ("USER", "ASSISTANT"),
            ("prompter", "bot"),
            ("Human", "ChatGPT"),
        )
    },
    "an observation": (
        {
            "messages": [
                ASK,
                SAY | {"content": "", "tool_calls": [CALL]},
                RAIN | {"role": "observation"},
                SAY,
            ]
        },
        TOOL_CHAT,
    ),
    # Thoughts, ends, nulls, weights.
    "reasoning": (
        {"messages": [ASK, SAY | {"reasoning": "hm well", "reasoning_content": "hm well"}]},
        THOUGHT,
    ),
    "reasoning in details": (
        {
            "messages": [
                ASK,
                SAY | {"reasoning_details": [{"type": "reasoning.text", "text": "hm well"}]},
            ]
        },
        THOUGHT,
    ),
    "a list of reasons": (
        {"messages": [ASK, SAY, ASK, SAY], "finish_reasons": ["length", "stop"]},
        f"{SHORT} {ONE}",
    ),
    "truncated": ({"messages": [ASK, SAY], "meta": {"truncated": True}}, SHORT),
    "padded with null": (
        {
            "messages": [
                ASK | {"tool_calls": None, "name": None},
                SAY | {"refusal": None, "audio": None, "function_call": None, "tool_calls": []},
            ],
            "tools": None,
            "system": None,
            "response": None,
            "input_ids": None,
            "conversations": [],
        },
        ONE,
    ),
    "weight": (
        {"messages": [ASK, SAY | {"weight": 0}, ASK, SAY | {"weight": 1}]},
        f"U:any news? A:none yet {ONE}",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_a_dialect(name: str) -> None:
    row, expected = ROWS[name]
    made = make(row)
    assert marked(made) == expected, made


DROPS: dict[str, tuple[Any, str, str]] = {
    "preferences": (
        {"prompt": "any news?", "chosen": "none yet", "rejected": "no"},
        NO_ANSWER,
        "is read from `response`",
    ),
    "lists of preferences": (
        {"chosen": [ASK, SAY], "rejected": [ASK]},
        MALFORMED,
        "rename the column",
    ),
    "an error": (
        {"request": {"messages": [ASK]}, "response": {"error": {"message": "late"}}},
        MALFORMED,
        "there is no answer",
    ),
    "half a batch": (
        {"custom_id": "1", "response": {"body": CHOICES}},
        MALFORMED,
        "Join output and input file",
    ),
    "raw completions": (
        {"request": {"prompt": "any news?"}, "response": CHOICES},
        MALFORMED,
        "give tokens",
    ),
    "a stream": (
        {"request": {"messages": [ASK]}, "response": {"chunks": []}},
        MALFORMED,
        "into one message",
    ),
    "two thoughts": (
        {"messages": [ASK, SAY | {"reasoning": "a b", "thinking": "c d"}]},
        MALFORMED,
        "two different thoughts",
    ),
    "a call that is none": (
        {
            "conversations": [
                {"from": "human", "value": "any news?"},
                {"from": "function_call", "value": "look(sea)"},
            ]
        },
        MALFORMED,
        "not a JSON call",
    ),
    "text behind a call": (
        {
            "messages": [
                ASK,
                SAY
                | {
                    "content": blocks(
                        {"type": "tool_use", "name": "look", "input": {}}, text("text", "so")
                    )
                },
            ]
        },
        NOT_TEXT,
        "messages[1]",
    ),
    "a thought that is not shown": (
        {
            "messages": [
                ASK,
                SAY | {"reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]},
            ]
        },
        f"the answer's `reasoning_details` is not in the text ({WAY_OUT})",
        "",
    ),
    "sound": (
        {"messages": [ASK, SAY | {"audio": {"id": "a"}}]},
        f"the answer's `audio` is not in the text ({WAY_OUT})",
        "",
    ),
    "nothing to learn": ({"messages": [ASK, SAY | {"train": False}]}, UNTAUGHT, ""),
}


@pytest.mark.parametrize("name", DROPS)
def test_a_row_that_gives_no_label_says_what_to_do(name: str) -> None:
    row, reason, detail = DROPS[name]
    made = make(row)
    assert (made.samples, made.dropped) == ([], reason)
    assert detail in made.detail


def test_what_is_not_in_the_samples_is_counted() -> None:
    assert make(
        {"request": {"messages": [ASK]}, "response": {"choices": [{"message": SAY}] * 3}}
    ).notes == Counter({"further answers in a log, ignored": 2})
    other = make({"messages": [ASK, SAY], "response": "something else"})
    assert marked(other) == ONE
    assert other.notes == Counter(
        {"an answer beside a chat that already ends with one, ignored": 1}
    )
    named = make({"messages": [ASK, SAY | {"name": "bo", "score": 0.5}]})
    assert named.notes == Counter(
        {f"field `{n}` of an answer is not in the text": 1 for n in ("name", "score")}
    )
    padded = {
        "function": {
            "name": "look",
            "arguments": {"at": "sea", "deg": None, "of": {"x": None, "y": 1}},
        }
    }
    made = make({"messages": [ASK, SAY | {"tool_calls": [padded]}]})
    assert '{"at": "sea", "of": {"y": 1}}' in marked(made)
    assert made.notes == Counter({"null in a call's arguments, taken as a data frame's padding": 1})


def test_a_lost_answer_counts_towards_the_limit_on_dropped_rows() -> None:
    """A row that keeps one answer and loses another, whose thought nothing shows, is not sound."""
    lost = {"messages": [ASK, SAY | {"reasoning_details": [{"data": "x"}]}, ASK, SAY]}
    rows = [row_of(i, f"f:{i}", lost if i < 3 else {"messages": [ASK, SAY]}) for i in range(5)]

    class Fixed:
        id, sha256 = "f", None

        def rows(self, start: int = 0) -> Any:
            return iter(rows[start:])

    def read(most: float) -> list[PartRows]:
        reader = PartReader(Fixed(), maker(), block_rows=5, limit=None, max_dropped=most)  # type: ignore[arg-type]
        parts = list(reader.parts({}))
        assert sum(reader.notes.values()) == 3
        reader.check_dropped(at_end=True)
        return parts

    (part,) = read(0.6)
    assert len(part.samples) == 5
    with pytest.raises(
        DataError,
        match=r"0 of the first 5 rows gave no sample, and 3 lost an answer \(answer left out: the "
        r"answer's",
    ):
        read(0.5)


def test_labels_are_a_mask_where_that_is_what_a_row_has() -> None:
    tokens = SampleMaker(None, tokenised=True, vocab_size=9, seq_length=9, min_supervised=1)
    for named in (
        {"labels": [-100, 2, 3]},
        {"assistant_masks": [0, 1, 1]},
        {"loss_mask": [0.0, 1.0, 1.0]},
    ):
        (sample,) = tokens.make(row_of(0, "f", {"input_ids": [1, 2, 3], **named})).samples
        assert sample.loss_mask.tolist() == [False, True, True]
