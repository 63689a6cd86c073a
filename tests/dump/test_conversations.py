"""Kinds of conversation that went wrong, each with a template of its kind: what is supervised
stands between « and ».
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dspark.cache.errors import DataError
from dspark.dump.corpus.masks import MALFORMED, Made, SampleMaker, sample_key
from dspark.dump.corpus.rows import row_of
from dspark.dump.target.presets import presets
from dump_targets import CHATML, build_tokenizer

END = "<|im_end|>"
HEAD, GO = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n",
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
)
CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
WITH_CALLS = f"{HEAD}{{{{ m.content }}}}{CALLS}{END}\n{{% endfor %}}{GO}"
NO_END = f"{HEAD}{{{{ m.content }}}}{CALLS}{{% endfor %}}{GO}"
THINKS = (
    f"{HEAD}{{% if m.role == 'assistant' and m.reasoning_content %}}<think>{{{{ "
    f"m.reasoning_content }}}}</think>"
    f"{{% elif m.role == 'assistant' and loop.last %}}<think></think>{{% endif %}}{{{{ m.content "
    f"}}}}{CALLS}{END}\n{{% endfor %}}{GO}"
)
STRIPS = f"{HEAD}{{{{ m.content.split('</think>')[-1] }}}}{END}\n{{% endfor %}}{GO}"
NULL_ONLY = (
    f"{HEAD}{{% if m.content is none %}}{CALLS}{{% else %}}{{{{ m.content }}}}{{% endif "
    f"%}}{END}\n{{% endfor %}}{GO}"
)
OPENS = (
    f"{HEAD}{{{{ m.content }}}}{END}\n{{% endfor "
    f"%}}{GO.replace('{% endif %}', '<think>{% endif %}')}"
)
OTHER_END = (
    "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}{% if m.role == 'assistant' "
    "and loop.last %}<|spare|>"
    f"{{% else %}}{END}{{% endif %}}{{% endfor %}}{{% if add_generation_prompt "
    f"%}}<|im_start|>assistant{{% endif %}}"
)
SYSTEM = (
    f"{{% if messages[0].role != 'system' %}}<|im_start|>system\nno fuss{END}\n{{% endif "
    f"%}}{CHATML}"
)

ASK = {"role": "user", "content": "any news?"}
SAY = {"role": "assistant", "content": "none yet"}
RESULT = {"role": "tool", "content": "rain"}


def call(arguments: Any, content: Any = "") -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"function": {"name": "look", "arguments": arguments}}],
    }


def make(row: dict[str, Any], template: str = CHATML, **options: Any) -> Made:
    settings: dict[str, Any] = {"vocab_size": 400, "seq_length": 1000, "min_supervised": 2}
    return SampleMaker(build_tokenizer(template), tokenised=False, **(settings | options)).make(
        row_of(0, "f:1", row)
    )


def supervised(made: Made) -> list[list[str]]:
    """Per sample, the supervised texts."""
    out = []
    for sample in made.samples:
        texts, run = [], []
        for token, on in [
            *zip(sample.input_ids.tolist(), sample.loss_mask.tolist(), strict=True),
            (0, False),
        ]:
            if on:
                run.append(token)
            elif run:
                texts.append(build_tokenizer().decode(run))
                run = []
        out.append(texts)
    return out


CALL = '<call>{"name": "look", "arguments": {"at": "sea"}}</call>'


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (NO_END, [ASK, call({"at": "sea"}, "wait"), RESULT, SAY], [[f"wait{CALL}", "none yet"]]),
        (WITH_CALLS, [ASK, call('{"at": "sea"}'), RESULT, SAY], [[CALL + END, "none yet" + END]]),
        (
            NULL_ONLY,
            [ASK, call({"at": "sea"}, None), RESULT, SAY],
            [[CALL + END, "none yet" + END]],
        ),
        (
            THINKS,
            [ASK, call({"at": "sea"}), RESULT, SAY],
            [[f"<think></think>{CALL}{END}"], [f"<think></think>none yet{END}"]],
        ),
        (THINKS, [ASK, SAY | {"reasoning": "hm"}], [[f"<think>hm</think>none yet{END}"]]),
        (
            STRIPS,
            [ASK, {"role": "assistant", "content": "<think>hm</think>none yet"}],
            [[f"<think>hm</think>none yet{END}"]],
        ),
        (OPENS, [ASK, SAY, ASK, SAY], [["none yet" + END] * 2]),
        (
            OPENS,
            [ASK, {"role": "assistant", "content": "hm</think>none yet"}],
            [[f"hm</think>none yet{END}"]],
        ),
        (OTHER_END, [ASK, SAY, ASK, SAY], [[":none yet<|spare|>"]] * 2),
        (
            SYSTEM,
            [{"role": "assistant", "content": "no fuss"}, ASK, SAY],
            [["no fuss" + END, "none yet" + END]],
        ),
        (SYSTEM, [{"role": "assistant", "content": ""}, ASK, SAY], [[END, "none yet" + END]]),
    ],
    ids=[
        "text and call, no end",
        "arguments as text",
        "null content",
        "call without text",
        "reasoning",
        "stripped thought",
        "opened thought",
        "opened thought, closed in the text",
        "another end",
        "repeats the system prompt",
        "empty first",
    ],
)
def test_what_the_target_wrote(
    template: str, messages: list[Any], expected: list[list[str]]
) -> None:
    made = make({"messages": messages}, template)
    assert supervised(made) == expected
    assert not any("rain" in t or "news" in t for texts in supervised(made) for t in texts)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASK, SAY], "meta": {"usage": {"finish_reason": "length"}}},
        {"messages": [ASK, SAY], "finished": False},
        {"messages": [ASK, SAY | {"finish_reason": "length"}]},
        {
            "request": {"messages": [ASK]},
            "response": {"choices": [{"message": SAY, "finish_reason": "length"}]},
        },
        {
            "request": json.dumps({"messages": [ASK]}),
            "response": json.dumps(
                {"body": {"choices": [{"message": SAY, "finish_reason": "length"}]}}
            ),
        },
    ],
)
def test_a_cut_answer_has_no_end_wherever_that_is_said(row: dict[str, Any]) -> None:
    assert supervised(make(row)) == [["none yet"]]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASK, SAY]},
        {"messages": json.dumps([ASK, SAY]), "tools": "[]"},
        {
            "conversations": [
                {"from": "human", "value": "any news?"},
                {"from": "chatgpt", "value": "none yet"},
            ]
        },
        {
            "conversations": [
                {"role": "user", "value": "any news?"},
                {"role": "assistant", "value": "none yet"},
            ]
        },
        {"prompt": "any news?", "completion": "none yet"},
        {"instruction": "any news?", "input": "", "output": "none yet"},
        {"custom_id": "1", "body": {"messages": [ASK, SAY]}},
        {"request": {"messages": [ASK]}, "response": "none yet"},
        {
            "messages": [
                ASK | {"name": None, "tool_calls": None},
                SAY | {"tool_calls": None, "reasoning_content": None},
            ]
        },
        {
            "messages": [
                ASK,
                {"role": "assistant", "content": [{"type": "text", "text": "none yet"}]},
            ]
        },
    ],
)
def test_shapes_of_rows(row: dict[str, Any]) -> None:
    assert supervised(make(row)) == [["none yet" + END]]


def test_a_system_prompt_beside_the_chat_comes_first() -> None:
    for name in ("system", "system_prompt"):
        made = make(
            {
                name: "no fuss",
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "none yet"},
                ],
            }
        )
        text = build_tokenizer().decode(made.samples[0].input_ids)
        assert text.startswith(f"<|im_start|>system\nno fuss{END}\n<|im_start|>user\na")


def test_a_message_without_content_names_row_and_key() -> None:
    made = make({"messages": [{"role": "user", "text": "hi"}, SAY]})
    assert (made.samples, made.dropped) == ([], MALFORMED)
    assert "f:1: messages[0] has no `content` (its keys: ['role', 'text'])" in made.detail


def test_a_token_beyond_the_vocabulary_is_named() -> None:
    with pytest.raises(
        DataError, match=r"f:1: token id \d+ \(.*\) is outside the target's vocabulary of 260"
    ):
        make({"messages": [ASK, SAY | {"content": "the cat sat on the mat"}]}, vocab_size=260)


def test_no_preset_takes_what_a_tool_said() -> None:
    import re

    text = "<|user|>q<|assistant|>call<|observation|>rain<|assistant|>wet<|system|>s<|user|>"
    for preset in presets().values():
        if preset.assistant_pattern:
            found = [m[1] for m in re.finditer(preset.assistant_pattern, text, re.DOTALL)]
            assert found == ["call", "wet"]


def test_turns() -> None:
    row = {"messages": [ASK, SAY, ASK, SAY]}
    one, two = ["none yet" + END], ["none yet" + END] * 2
    assert supervised(make(row)) == supervised(make(row, turns="whole")) == [two]
    assert supervised(make(row, turns="each")) == [one, one]
    assert supervised(make(row, turns="last")) == [one]
    assert (
        make(row, THINKS, turns="whole").dropped
        == "turns do not form one sample (--turns auto makes several)"
    )
    each = make(row, turns="each")
    assert [s.turn for s in each.samples] == [0, 1]
    assert len({s.key for s in each.samples}) == 1


def test_answers_of_one_conversation_that_come_as_tokens_have_one_key() -> None:
    maker = SampleMaker(None, tokenised=True, vocab_size=9, seq_length=9, min_supervised=1)
    rows = [
        {
            "input_ids": [1] * n,
            "loss_mask": [0] * (n - 2) + [1, 1],
            "id": f"c_{n}",
            "primary_id": "c",
        }
        for n in (3, 5)
    ]
    keys = {maker.make(row_of(0, "f", r)).samples[0].key for r in rows}
    assert keys == {sample_key("c")}


def test_a_date_is_the_store_s() -> None:
    template = "{{ strftime_now('%d %b %Y') }}" + CHATML
    made = make({"messages": [ASK, SAY]}, template, day="2031-02-03")
    assert build_tokenizer().decode(made.samples[0].input_ids).startswith("03 Feb 2031")


def test_what_lies_beyond_seq_length_is_not_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    from dspark.dump.corpus.template import Template

    rendered: list[int] = []
    render = Template.render
    monkeypatch.setattr(
        Template,
        "render",
        lambda self, forms, *a, **k: rendered.append(len(forms)) or render(self, forms, *a, **k),
    )
    made = make({"messages": [ASK, SAY] * 20_000}, seq_length=300)
    assert len(made.samples) == 1
    assert len(made.samples[0].input_ids) == 300
    assert max(rendered) < 100
    assert made.truncated == 1


def test_files_of_every_kind_give_the_same_rows(tmp_path: Path) -> None:
    import gzip

    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dspark.dump.corpus.sources import open_corpus

    rows = [{"messages": [ASK | {"content": f"q {i}"}, SAY]} for i in range(5)]
    lines = "".join(json.dumps(r) + "\n" for r in rows).encode()
    table = pa.Table.from_pylist(rows)
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (tmp_path / "c.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "d.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "e.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    with pa.CompressedOutputStream(str(tmp_path / "f.zst"), "zstd") as file:
        file.write(lines)
    pq.write_table(table, tmp_path / "g.parquet")
    with (
        pa.OSFile(str(tmp_path / "h.arrow"), "wb") as file,
        pa.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_table(table)
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    names = [
        "a.jsonl",
        "b.jsonl",
        "c.gz",
        "d.json",
        "e.json.gz",
        "f.zst",
        "g.parquet",
        "h.arrow",
        "saved",
        "*.jsonl",
    ]
    found = {n: [r.value for r in open_corpus(str(tmp_path / n)).rows()] for n in names}
    assert found.pop("*.jsonl") == found["a.jsonl"] * 2
    assert all(rows == found["a.jsonl"] for rows in found.values())
    share = [r.number for r in open_corpus(f"{tmp_path / 'a.jsonl'}=0.5").rows()]
    assert share == [r.number for r in open_corpus(f"{tmp_path / 'd.json'}=0.5").rows()]
    assert 0 < len(share) < 5
