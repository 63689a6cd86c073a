"""Prompts for decoding, from the same rows as a dump: everything before the answer, as the target's
template renders it.

A chat row's trailing assistant turn is dropped and the generation prompt added; a tokenised row is
cut before its first supervised token. ``source`` (or ``category``) of a row names its line in the
report.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark.cache.errors import DataError, UsageError
from dspark.dump.corpus.rows import BadRow, JsonlCorpus
from dspark.dump.corpus.shapes import ChatRow, TokenRow, parse_row
from dspark.dump.corpus.template import Template
from dspark.dump.corpus.turns import Chat, Dropped
from dspark.tools.decode.promptsets import NAMES, RESOLVE, is_named, is_placeholder, named_rows


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, the name of their source (None: none given), and file:line for messages."""

    ids: list[int]
    source: str | None
    where: str


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def read_prompts(
    data: Path | str,
    tokenizer: Any,
    *,
    vocab_size: int,
    room: int | None,
    limit: int | None = None,
    per_source: int | None = None,
    say: Callable[[str], None] = _say,
) -> list[Prompt]:
    """Read the first ``limit`` prompts of a JSONL file (also .gz) or of a named set, at most
    ``per_source`` per source. ``room``: the longest prompt that fits. Placeholder rows are left out
    and counted; ``say`` prints the count.
    """
    out: list[Prompt] = []
    taken, left_out = Counter[str](), Counter[str]()
    template: Template | None = None
    rows = named_rows(str(data)) if is_named(str(data)) else _lines(Path(data))
    for where, value in rows:
        if len(out) == limit:
            break
        name = _source(value)
        if is_placeholder(_first_words(value)):
            left_out[name or "no source"] += 1
            continue
        if per_source is not None and taken[name or ""] >= per_source:
            continue
        taken[name or ""] += 1
        row = parse_row(_first_turn(value), where)
        if isinstance(row, TokenRow):
            ids = _given(row, where)
        else:
            if template is None and tokenizer is not None:
                template = Template(tokenizer)
            ids = tokenizer(_rendered(row, template, where), add_special_tokens=False)["input_ids"]
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            raise DataError(
                f"{where}: token ids range over {min(ids)}..{max(ids)}, but the target's "
                f"vocabulary has {vocab_size}"
            )
        if room is not None and len(ids) > room:
            raise DataError(
                f"{where}: the prompt has {len(ids)} tokens; the target has room for {room} "
                "before the answer"
            )
        out.append(Prompt(ids, name, where))
    if left_out:
        found = ", ".join(f"{name} {count}" for name, count in sorted(left_out.items()))
        say(f"{data}: {left_out.total()} placeholder rows left out ({found}): {RESOLVE}")
    if not out and left_out:
        raise DataError(f"{data}: all {left_out.total()} rows are placeholders: {RESOLVE}")
    if not out:
        raise DataError(f"{data}: no rows")
    return out


def _source(value: Any) -> str | None:
    found = (value.get("source") or value.get("category")) if isinstance(value, Mapping) else None
    return None if found is None else str(found)


def _first_words(value: Any) -> str:
    """Return the first turn of a row, in ``messages`` or ``turns``; empty if it has none."""
    turns = (value.get("messages") or value.get("turns")) if isinstance(value, Mapping) else None
    for turn in turns if isinstance(turns, list) else ():
        text = turn.get("content") if isinstance(turn, Mapping) else turn
        if not isinstance(turn, Mapping) or turn.get("role") == "user":
            return text if isinstance(text, str) else ""
    return ""


def _first_turn(value: Any) -> Any:
    """Cut a SPEED-Bench row with several questions and no answers between them (``messages`` of
    users only) after the first, or convert its ``turns`` to messages: a later question needs the
    answer to the one before it.
    """
    if not isinstance(value, Mapping):
        return value
    messages, turns = value.get("messages"), value.get("turns")
    if messages is None and isinstance(turns, list) and turns and isinstance(turns[0], str):
        return {**value, "messages": [{"role": "user", "content": turns[0]}]}
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        return value
    roles = [m.get("role") for m in messages]
    if "assistant" in roles or roles.count("user") < 2:
        return value
    return {**value, "messages": messages[: roles.index("user") + 1]}


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (file:line, parsed) of the non-blank lines."""
    try:
        lines = JsonlCorpus(path)
    except OSError as error:
        raise UsageError(
            f"--data {path}: {error.strerror or error}; expected a JSONL file or one of {NAMES}"
        ) from error
    for _, where, value in lines.values():
        if isinstance(value, BadRow):
            raise DataError(value.detail)
        yield where, value


def _given(row: TokenRow, where: str) -> list[int]:
    if True not in row.loss_mask or row.loss_mask[0]:
        raise DataError(
            f"{where}: expected a loss_mask that starts with 0 and contains a 1: the prompt is "
            "what comes before it"
        )
    return row.input_ids[: row.loss_mask.index(True)]


def _rendered(row: ChatRow, template: Template | None, where: str) -> str:
    """Return the text that the target was served before the last answer."""
    if template is None:
        raise DataError(
            f"{where}: a chat row, but the target has no tokenizer; give rows of input_ids and "
            "loss_mask"
        )
    count = len(row.messages) - (row.messages[-1]["role"] == "assistant")
    if not count:
        raise DataError(f"{where}: only an assistant turn; expected a question before it")
    try:
        return Chat(template, row).prompt(count)
    except Dropped as error:
        raise DataError(
            f"{where}: the target's chat template refuses it: {error.detail}"
        ) from error
