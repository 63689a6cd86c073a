"""The corpus: rows in order, from any row on. A malformed row is an error that names file and line; nothing is skipped here.

A row is a chat (``messages``, or ``conversations`` as ShareGPT writes them) or already tokens (``input_ids`` and ``loss_mask``).
Rows are numbered from 0 over the non-blank lines, so a resumed dump continues exactly where it stopped.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from dspark.cache.errors import DataError, UsageError
from dspark.cache.target.frozen import file_sha256

Message = dict[str, Any]
DATASET_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(:(?P<split>[\w.\[\]%:+-]+))?")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}


@dataclass(frozen=True, slots=True)
class ChatRow:
    """A conversation. ``finished`` False: its last answer was cut short, so its end must not be taught."""

    messages: list[Message]
    tools: list[Any] | None
    finished: bool


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Tokens with their loss mask, as given."""

    input_ids: list[int]
    loss_mask: list[bool]


@dataclass(frozen=True, slots=True)
class Row:
    """Row ``number`` of the corpus, 0-based; ``where``: file:line for messages."""

    number: int
    where: str
    value: ChatRow | TokenRow


class Corpus(Protocol):
    """``id``: file name or data set id; ``sha256``: of the file, None for a hub data set."""

    @property
    def id(self) -> str: ...
    @property
    def sha256(self) -> str | None: ...
    def rows(self, start: int = 0) -> Iterator[Row]: ...
    def pick(self, wanted: Callable[[int], bool]) -> Iterator[Row]: ...
    def count(self) -> int: ...
    def weights(self) -> list[int]:
        """What is known of each row's length without parsing it: the bytes of its line, or 1 each."""
        ...


def open_corpus(data: str) -> Corpus:
    """A JSONL file (also .gz), or a data set id (``org/name`` or ``org/name:split``) when no such file exists."""
    path = Path(data)
    if path.is_file():
        return JsonlCorpus(path)
    match = DATASET_ID.fullmatch(data)
    if path.exists() or match is None or path.suffix in (".jsonl", ".json", ".gz", ".txt"):
        what = "not a file" if path.exists() else "no such file"
        raise UsageError(
            f"--data {data}: {what}. Expected a JSONL file (.jsonl, .jsonl.gz) or a data set id such as org/name."
        )
    return HubCorpus(match["id"], match["split"] or "train")


class JsonlCorpus:
    """One JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.id = path.name
        self.sha256: str | None = file_sha256(path)

    def _open(self) -> BinaryIO:
        return cast(BinaryIO, gzip.open(self.path)) if self.path.suffix == ".gz" else open(self.path, "rb")

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """(line number from 1, line) of the non-blank lines."""
        number = 0
        try:
            with self._open() as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield number, line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(
                f"{self.path}: not a whole gzip file, broken after line {number}: {error}"
            ) from error

    def count(self) -> int:
        return sum(1 for _ in self._lines())

    def weights(self) -> list[int]:
        return [len(line) for _, line in self._lines()]

    def rows(self, start: int = 0) -> Iterator[Row]:
        return self.pick(lambda n: n >= start)

    def pick(self, wanted: Callable[[int], bool]) -> Iterator[Row]:
        """Only the rows whose number is ``wanted``; the others are not parsed."""
        for number, (line, text) in enumerate(self._lines()):
            if not wanted(number):
                continue
            where = f"{self.path}:{line}"
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{where}: not JSON ({error}). Every line must be one JSON object."
                ) from error
            yield Row(number, where, parse_row(value, where))


class HubCorpus:
    """A data set of the Hugging Face hub, or of its local cache when offline."""

    def __init__(self, name: str, split: str) -> None:
        try:
            import datasets
        except ImportError as error:
            raise UsageError(
                f"--data {name} is a data set id, and the package `datasets` is not installed: pip install 'dspark[hub]', "
                "or give a JSONL file."
            ) from error
        self.id = f"{name}:{split}"
        self.sha256: str | None = None
        try:
            self._rows = datasets.load_dataset(name, split=split)
        except (
            Exception
        ) as error:  # datasets raises a dozen unrelated kinds: offline, not found, gated, no such split
            raise DataError(
                f"--data {name}: not a file here, and the data set (split {split!r}) could not be loaded: "
                f"{type(error).__name__}: {_first_line(error)}. Check the name, the split (org/name:split) and the network, or give a JSONL file."
            ) from error

    def count(self) -> int:
        return len(self._rows)

    def weights(self) -> list[int]:
        return [1] * len(self._rows)

    def rows(self, start: int = 0) -> Iterator[Row]:
        for number in range(start, len(self._rows)):
            where = f"{self.id} row {number}"
            yield Row(number, where, parse_row(self._rows[number], where))

    def pick(self, wanted: Callable[[int], bool]) -> Iterator[Row]:
        for number in range(len(self._rows)):
            if wanted(number):
                where = f"{self.id} row {number}"
                yield Row(number, where, parse_row(self._rows[number], where))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def parse_row(value: Any, where: str) -> ChatRow | TokenRow:
    """Check one row's form."""
    if not isinstance(value, Mapping):
        raise DataError(
            f"{where}: found a JSON {type(value).__name__}, expected an object with `messages` or `input_ids`."
        )
    if value.get("input_ids") is not None:
        return _token_row(value, where)
    if value.get("messages") is not None:
        messages = _messages(value["messages"], where)
    elif value.get("conversations") is not None:
        messages = _messages(
            [_from_sharegpt(m, where) for m in _list(value["conversations"], "conversations", where)], where
        )
    else:
        raise DataError(
            f"{where}: found keys {sorted(map(str, value))}, expected `messages` (a chat) or `input_ids` and `loss_mask` (tokens)."
        )
    finished = value.get("finished", True)
    cut = finished is False or value.get("finish_reason") == "length"
    return ChatRow(messages, value.get("tools") or None, not cut)


def _list(value: Any, name: str, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{where}: `{name}` is a {type(value).__name__}, expected a list.")
    return value


def _from_sharegpt(message: Any, where: str) -> Any:
    if isinstance(message, Mapping) and "from" in message and "value" in message:
        role = SHAREGPT_ROLES.get(str(message["from"]))
        if role is None:
            raise DataError(
                f"{where}: unknown speaker {message['from']!r}, expected one of {sorted(SHAREGPT_ROLES)}."
            )
        return {"role": role, "content": message["value"]}
    return message


def _messages(value: Any, where: str) -> list[Message]:
    out = []
    for i, message in enumerate(_list(value, "messages", where)):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(
                f"{where}: messages[{i}] is {str(message)[:80]!r}, expected an object with `role` and `content`."
            )
        content = message.get("content")
        if not isinstance(content, str | list | None):
            raise DataError(f"{where}: messages[{i}].content is a {type(content).__name__}, expected text.")
        # Data sets give every message every key: absent ones as None, which templates would take for present.
        out.append({k: v for k, v in message.items() if v is not None} | {"content": _joined(content)})
    if not out:
        raise DataError(f"{where}: `messages` is empty.")
    return out


def _joined(content: str | list[Any] | None) -> str | list[Any]:
    """A list of text parts as the text that they make: most templates take text only, and print a list as Python writes it or refuse it. A list
    with something else in it stays: that row is dropped (``tokens.unusable``)."""
    if not isinstance(content, list):
        return content or ""
    texts: list[str] = []
    for part in content:
        text = part
        if isinstance(part, Mapping):
            text = part.get("text") if part.get("type", "text") == "text" else None
        if not isinstance(text, str):
            return content
        texts.append(text)
    return "".join(texts)


def _token_row(value: Mapping[str, Any], where: str) -> TokenRow:
    ids = _list(value["input_ids"], "input_ids", where)
    if "loss_mask" not in value:
        raise DataError(f"{where}: `input_ids` without `loss_mask`; give one 0/1 a token.")
    mask = _list(value["loss_mask"], "loss_mask", where)
    if len(ids) != len(mask):
        raise DataError(
            f"{where}: {len(ids)} input_ids but {len(mask)} values of loss_mask; they must be as many."
        )
    if not ids:
        raise DataError(f"{where}: `input_ids` is empty.")
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise DataError(f"{where}: `input_ids` holds something that is not an integer.")
    if not all(isinstance(m, bool | int) and m in (0, 1) for m in mask):
        raise DataError(f"{where}: `loss_mask` holds something other than 0, 1, true, false.")
    return TokenRow(ids, [bool(m) for m in mask])
