"""Common prompt sets by name, as chat rows with a ``source``, as in ``--data gsm8k``. Only the
prompts are used, the first turn of each (a later turn needs the answer to the one before it). They
come from the Hugging Face hub through ``datasets``; without a network, or for anything else,
``--data`` takes a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dspark.cache.errors import UsageError, first_line


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Where a set is on the hub. ``prompt`` extracts the question from a row, ``category`` its line
    in the report.
    """

    path: str
    config: str | None
    split: str
    prompt: Callable[[Mapping[str, Any]], str]
    category: Callable[[Mapping[str, Any]], str]


EVERY = "*"  # as a config: all of the set's, one after the other
# What the public rows of SPEED-Bench say in the place of prompts that may not be passed on.
PLACEHOLDER = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH"
RESOLVE = (
    "they stand for prompts from other data sets, which SPEED-Bench's prepare.py (NVIDIA) "
    "downloads; give the qualitative.jsonl that it writes as --data"
)


def is_placeholder(text: str) -> bool:
    """Tell whether a prompt is SPEED-Bench's placeholder notice."""
    return text.strip().upper().startswith(PLACEHOLDER)


def _instruction(row: Mapping[str, Any]) -> str:
    given = str(row.get("input") or "").strip()
    return str(row["instruction"]) + (f"\n\n{given}" if given else "")


def _choices(row: Mapping[str, Any]) -> str:
    return "\n".join([str(row["question"]), *(f"{letter}. {row[letter]}" for letter in "ABCD")])


PROMPT_SETS: dict[str, PromptSet] = {
    "gsm8k": PromptSet(
        "openai/gsm8k", "main", "test", lambda r: str(r["question"]), lambda r: "gsm8k"
    ),
    "humaneval": PromptSet(
        "openai/openai_humaneval",
        None,
        "test",
        lambda r: f"Complete the following Python function.\n\n```python\n{r['prompt']}```",
        lambda r: "humaneval",
    ),
    "math500": PromptSet(
        "HuggingFaceH4/MATH-500", None, "test", lambda r: str(r["problem"]), lambda r: "math500"
    ),
    "aime25": PromptSet(
        "math-ai/aime25", None, "test", lambda r: str(r["problem"]), lambda r: "aime25"
    ),
    "mbpp": PromptSet(
        "google-research-datasets/mbpp",
        "full",
        "test",
        lambda r: "\n".join(
            [str(r["text"]), "Your code should pass these tests:", *map(str, r["test_list"])]
        ),
        lambda r: "mbpp",
    ),
    "livecodebench": PromptSet(
        "livecodebench/code_generation",
        None,
        "test",
        lambda r: "\n\n".join(
            filter(None, [str(r["question_content"]), str(r.get("starter_code") or "")])
        ),
        lambda r: f"livecodebench/{r['platform']}",
    ),
    "alpaca": PromptSet("tatsu-lab/alpaca", None, "train", _instruction, lambda r: "alpaca"),
    "arena-hard": PromptSet(
        "lmarena-ai/arena-hard-auto-v0.1",
        None,
        "train",
        lambda r: str(r["turns"][0]["content"]),
        lambda r: "arena-hard",
    ),
    "c-eval": PromptSet(
        "ceval/ceval-exam", EVERY, "val", _choices, lambda r: f"c-eval/{r['config']}"
    ),
    "mt-bench": PromptSet(
        "HuggingFaceH4/mt_bench_prompts",
        None,
        "train",
        lambda r: str(r["prompt"][0]),
        lambda r: f"mt-bench/{r['category']}",
    ),
    "speed-bench": PromptSet(
        "nvidia/SPEED-Bench",
        "qualitative",
        "test",
        lambda r: str(r["turns"][0]),
        lambda r: f"speed-bench/{r['category']}",
    ),
}
NAMES = ", ".join(PROMPT_SETS)


def is_named(data: str) -> bool:
    """Tell whether ``--data`` names a set (``speed-bench:coding``: one category of it), not a
    file.
    """
    return data.partition(":")[0] in PROMPT_SETS


def named_rows(data: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (set:row, chat row) of the named set, in order. Raises UsageError if it cannot be
    loaded.
    """
    name, _, wanted = data.partition(":")
    chosen = PROMPT_SETS[name]
    found = set()
    for number, row in enumerate(_load(name, chosen)):
        category = chosen.category(row)
        found.add(category.partition("/")[2])
        if not wanted or category == f"{name}/{wanted}":
            yield (
                f"{name}:{number}",
                {"messages": [{"role": "user", "content": chosen.prompt(row)}], "source": category},
            )
    if wanted and wanted not in found:
        raise UsageError(
            f"--data {data}: no such category; {name} has {', '.join(sorted(found)) or 'none'}"
        )


def _load(name: str, chosen: PromptSet) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UsageError(
            f"--data {name} needs the package datasets: pip install datasets, or give a JSONL file"
        ) from error
    try:
        if chosen.config == EVERY:
            from datasets import get_dataset_config_names

            return [
                {**row, "config": config}
                for config in get_dataset_config_names(chosen.path)
                for row in load_dataset(chosen.path, config, split=chosen.split)
            ]
        return load_dataset(chosen.path, chosen.config, split=chosen.split)
    # Offline, gated, moved or changed: datasets has a family of errors of its own for each, and
    # lets others through.
    except Exception as error:
        raise UsageError(
            f"--data {name}: {chosen.path} could not be loaded from the Hugging Face hub "
            f"({first_line(error)}). Without a network, give a JSONL file of chat rows "
            "with a `source`."
        ) from error
