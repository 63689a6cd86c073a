"""The shipped conversations of ``make demo``: no judged prompt has a near-duplicate among the
training ones.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def choosing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("choose_code", EXAMPLES / "choose_code.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (EXAMPLES / name).read_text().splitlines()]


def test_no_judged_prompt_is_near_a_training_prompt(choosing: ModuleType) -> None:
    training, held = rows("code.jsonl"), rows("code_held_out.jsonl")
    assert (len(training), len(held)) == (choosing.TRAINING, choosing.HELD_OUT)
    assert len(held) >= 20
    prompts = [choosing.triples(choosing.prompt_of(r)) for r in (*training, *held)]
    known, judged = prompts[: len(training)], prompts[len(training) :]
    worst = max(choosing.similarity(a, b) for a in judged for b in known)
    assert worst < choosing.NEAR

    # The same by another measure: pairs of neighbouring words of the task itself, shared over the
    # union.
    def pairs(row: dict[str, Any]) -> set[tuple[str, str]]:
        words = re.findall(r"\w+", choosing.prompt_of(row).split("Input:")[0].lower())
        return set(itertools.pairwise(words))

    overlap = [len(pairs(a) & pairs(b)) / len(pairs(a) | pairs(b)) for a in held for b in training]
    assert max(overlap) < 0.5


def test_a_rewording_counts_as_near(choosing: ModuleType) -> None:
    task = choosing.prompt_of(rows("code.jsonl")[0])
    words = task.split()
    reworded = " ".join(w for i, w in enumerate(words) if i % 9 != 4)  # every ninth word is gone
    one, other = choosing.triples(task), choosing.triples(reworded)
    assert choosing.similarity(one, other) > choosing.NEAR
    unlike = choosing.triples(
        "Sort the words of a sentence by their length and return them as a list of strings."
    )
    assert choosing.similarity(one, unlike) < choosing.NEAR


def test_the_choice_drops_near_duplicates_of_judged_prompts(choosing: ModuleType) -> None:
    judged = rows("code_held_out.jsonl")
    twin = json.loads(json.dumps(judged[0]))
    twin["messages"][0]["content"] += " Answer in one function."
    training, held = choosing.choose([*rows("code.jsonl"), *judged, twin])
    assert [choosing.prompt_of(r) for r in held] == [choosing.prompt_of(r) for r in judged]
    assert twin not in training
    assert len(training) == choosing.TRAINING
