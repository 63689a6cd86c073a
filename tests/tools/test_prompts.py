"""Prompts of named sets and of SPEED-Bench's files: placeholders are never decoded, and
--per-source takes some of each.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dspark.cache.errors import DataError
from dspark.tools.decode.prompts import read_prompts
from dspark.tools.decode.promptsets import PLACEHOLDER, PROMPT_SETS


class Words:
    """A template and tokenizer that keep a conversation readable: an id per letter."""

    is_fast = True
    chat_template = "contents with | between them"
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def apply_chat_template(self, messages: list[dict[str, Any]], **unused: Any) -> str:
        return "|".join(m["content"] for m in messages)

    def __call__(self, text: str, **unused: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def texts(path: Path, rows: list[dict[str, Any]], **options: Any) -> tuple[list[str], list[str]]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said: list[str] = []
    found = read_prompts(path, Words(), vocab_size=256, room=None, say=said.append, **options)
    return ["".join(map(chr, p.ids)) for p in found], said


def prepared(text: str, category: str, *more: str) -> dict[str, Any]:
    """A row as NVIDIA's prepare.py writes it: questions alone, one after the other."""
    turns = [{"role": "user", "content": t} for t in (text, *more)]
    return {"question_id": text, "category": category, "messages": turns}


def test_a_prepared_file_gives_first_turns_and_so_many_of_each_category(tmp_path: Path) -> None:
    rows = [
        prepared("a1", "math", "later"),
        prepared("a2", "math"),
        prepared("b1", "qa"),
        prepared("b2", "qa"),
    ]
    assert texts(tmp_path / "q.jsonl", rows)[0] == ["a1", "a2", "b1", "b2"]
    assert texts(tmp_path / "q.jsonl", rows, per_source=1)[0] == ["a1", "b1"]
    assert texts(tmp_path / "q.jsonl", rows, per_source=1, limit=1)[0] == ["a1"]


def test_placeholders_are_left_out_counted_and_the_way_out_is_named(tmp_path: Path) -> None:
    notice = f"{PLACEHOLDER} and so on"
    rows = [
        prepared(notice, "math"),
        prepared("a2", "math"),
        {"category": "qa", "turns": [notice]},
        {"category": "qa", "turns": ["b2", "x"]},
    ]
    found, (said,) = texts(tmp_path / "q.jsonl", rows, per_source=1)
    assert found == ["a2", "b2"]
    assert "2 placeholder rows left out (math 1, qa 1)" in said
    assert "prepare.py" in said
    assert "qualitative.jsonl" in said
    with pytest.raises(DataError, match="all 1 rows are placeholders"):
        texts(tmp_path / "q.jsonl", rows[:1])


def test_the_papers_sets_have_names_and_take_their_rows() -> None:
    names = (
        "gsm8k math500 aime25 mbpp humaneval livecodebench mt-bench alpaca arena-hard c-eval "
        "speed-bench"
    )
    assert set(names.split()) == set(PROMPT_SETS)
    taken = {
        "mbpp": (
            {"text": "do", "test_list": ["assert f()"]},
            "do\nYour code should pass these tests:\nassert f()",
        ),
        "alpaca": ({"instruction": "do", "input": "it"}, "do\n\nit"),
        "arena-hard": ({"turns": [{"content": "q"}]}, "q"),
        "c-eval": (
            {"question": "q", "A": "1", "B": "2", "C": "3", "D": "4"},
            "q\nA. 1\nB. 2\nC. 3\nD. 4",
        ),
        "livecodebench": ({"question_content": "q", "starter_code": "s"}, "q\n\ns"),
        "math500": ({"problem": "p"}, "p"),
        "aime25": ({"problem": "p"}, "p"),
    }
    for name, (row, text) in taken.items():
        assert PROMPT_SETS[name].prompt(row) == text
