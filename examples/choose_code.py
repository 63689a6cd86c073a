"""How ``code.jsonl`` and ``code_held_out.jsonl`` were chosen from a larger corpus: ``choose_code.py
CORPUS.jsonl.gz``.

Short Python tasks whose answers ended by themselves. Prompts that share too much text are
near-duplicates (the source words one task several ways): none of the judged prompts has one in the
training file. ``similarity`` says what "too much" means, and ``tests/test_examples.py`` holds the
shipped files to it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

SOURCE = "reasoning-gym-codeio"
BOILERPLATE = "Write a Python function that solves the following task."
TRAINING, HELD_OUT = 240, 24
LONGEST_PROMPT, LONGEST_ANSWER = 900, 800  # characters
# shared share of the smaller prompt's word triples from which two prompts are near-duplicates
NEAR = 0.25


def triples(prompt: str) -> frozenset[tuple[str, ...]]:
    """Every three neighbouring words of ``prompt``, lower case, without what all prompts begin
    with.
    """
    words = re.findall(r"\w+", prompt.replace(BOILERPLATE, "").lower())
    return frozenset(tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2)))


def similarity(a: frozenset[Any], b: frozenset[Any]) -> float:
    """Shared triples over those of the smaller prompt: 1 where one contains the other."""
    return len(a & b) / max(1, min(len(a), len(b)))


def prompt_of(row: dict[str, Any]) -> str:
    return str(row["messages"][0]["content"])


def choose(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training rows, held-out rows). Rows come in the order of their prompts' hashes; the held-out
    ones first, unlike each other.
    """
    fit = [
        row
        for row in rows
        if row["source"] == SOURCE
        and row["finished"]
        and len(row["messages"]) == 2
        and len(prompt_of(row)) <= LONGEST_PROMPT
        and len(row["messages"][1]["content"]) <= LONGEST_ANSWER
    ]
    fit.sort(key=lambda row: hashlib.sha256(prompt_of(row).encode()).hexdigest())
    held: list[dict[str, Any]] = []
    training: list[dict[str, Any]] = []
    judged: list[frozenset[Any]] = []
    for row in fit:
        own = triples(prompt_of(row))
        if any(similarity(own, other) >= NEAR for other in judged):
            continue
        if len(held) < HELD_OUT:
            held.append(row)
            judged.append(own)
        elif len(training) < TRAINING:
            training.append(row)
    return training, held


def main() -> None:
    with gzip.open(sys.argv[1], "rt") as file:
        training, held = choose([json.loads(line) for line in file])
    for name, rows in (("code.jsonl", training), ("code_held_out.jsonl", held)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        Path(__file__).with_name(name).write_text(text)
        print(name, len(rows), "rows", len(text), "bytes")


if __name__ == "__main__":
    main()
