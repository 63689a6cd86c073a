"""Prompts for decoding, from the same rows a dump takes: everything before the answer, as the target's
template writes it.

A chat row's trailing assistant turn is dropped and the generation prompt added; a tokenised row is cut before
its first supervised token. ``source`` (or ``category``) of a row names its line in the report.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark.cache.errors import DataError, UsageError
from dspark.dump.corpus.shapes import ChatRow, TokenRow, parse_row
from dspark.dump.corpus.template import Template
from dspark.dump.corpus.turns import Chat, Dropped
from dspark.tools.decode.promptsets import NAMES, is_named, named_rows


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, the name of their source (None: none given), and file:line for messages."""

    ids: list[int]
    source: str | None
    where: str


def read_prompts(
    data: Path | str, tokenizer: Any, *, vocab_size: int, room: int | None, limit: int | None = None
) -> list[Prompt]:
    """The first ``limit`` prompts of a JSONL file (also .gz) or of a named set. ``room``: longest prompt the
    target leaves space for.
    """
    out: list[Prompt] = []
    template: Template | None = None
    rows = named_rows(str(data)) if is_named(str(data)) else _lines(Path(data))
    for where, value in rows:
        if len(out) == limit:
            break
        row = parse_row(value, where)
        if isinstance(row, TokenRow):
            ids = _given(row, where)
        else:
            if template is None and tokenizer is not None:
                template = Template(tokenizer)
            ids = tokenizer(_rendered(row, template, where), add_special_tokens=False)["input_ids"]
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            raise DataError(
                f"{where}: token ids {min(ids)}..{max(ids)}, the target's vocabulary has {vocab_size}"
            )
        if room is not None and len(ids) > room:
            raise DataError(
                f"{where}: a prompt of {len(ids)} tokens; the target has room for {room} before the answer"
            )
        source = value.get("source") or value.get("category")
        out.append(Prompt(ids, None if source is None else str(source), where))
    if not out:
        raise DataError(f"{data}: no rows")
    return out


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(file:line, parsed) of the lines that are not blank."""
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}:{number}"
                    try:
                        yield where, json.loads(line)
                    except ValueError as error:
                        raise DataError(
                            f"{where}: not JSON ({error}); every line is one JSON object"
                        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a complete text or gzip file: {error}") from error
    except OSError as error:
        raise UsageError(
            f"--data {path}: {error.strerror or error}; expected a JSONL file or one of {NAMES}"
        ) from error


def _given(row: TokenRow, where: str) -> list[int]:
    if True not in row.loss_mask or row.loss_mask[0]:
        raise DataError(
            f"{where}: expected a loss_mask that starts with 0 and has a 1: the prompt is what comes before"
        )
    return row.input_ids[: row.loss_mask.index(True)]


def _rendered(row: ChatRow, template: Template | None, where: str) -> str:
    """The text that the target was served before the last answer."""
    if template is None:
        raise DataError(
            f"{where}: a chat row, but the target has no tokenizer; give rows of input_ids and loss_mask"
        )
    count = len(row.messages) - (row.messages[-1]["role"] == "assistant")
    if not count:
        raise DataError(f"{where}: nothing but an assistant turn; expected a question before it")
    try:
        return Chat(template, row).prompt(count)
    except Dropped as error:
        raise DataError(f"{where}: the target's chat template refuses it: {error.detail}") from error
