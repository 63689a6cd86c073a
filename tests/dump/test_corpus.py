"""Rows: forms, numbering, restarts, and every malformed row with its message."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dspark.cache.canonical import canonical
from dspark.cache.errors import DataError, UsageError
from dspark.dump.corpus import rows
from dspark.dump.corpus.parts import rows_sha256
from dspark.dump.corpus.rows import BadRow, Row
from dspark.dump.corpus.shapes import ChatRow, TokenRow, parse_row
from dspark.dump.corpus.sources import open_corpus

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}


def test_rows_are_numbered_over_non_blank_lines_and_restart_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join(
            [json.dumps(CHAT), "", json.dumps(CHAT | {"finished": False}), json.dumps(CHAT), ""]
        )
    )
    corpus = open_corpus(str(path))
    found = list(corpus.rows())
    assert [(r.number, r.where.rsplit(":", 1)[1]) for r in found] == [(0, "1"), (1, "3"), (2, "4")]
    assert [r.value.finished for r in found if isinstance(r.value, ChatRow)] == [True, False, True]
    assert list(corpus.rows(1)) == found[1:]
    assert corpus.count() == 3
    assert (corpus.id, corpus.sha256) == (
        "rows.jsonl",
        hashlib.sha256(path.read_bytes()).hexdigest(),
    )


def test_gzip_reads_the_same(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    plain.write_text(json.dumps(CHAT) + "\n")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert [r.value for r in open_corpus(str(plain)).rows()] == [
        r.value for r in open_corpus(str(packed)).rows()
    ]


def test_forms() -> None:
    sharegpt = {
        "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    }
    assert (
        parse_row(sharegpt, "f:1")
        == parse_row(CHAT, "f:1")
        == parse_row({"conversations": CHAT["messages"]}, "f:1")
    )
    cut = parse_row(CHAT | {"finish_reason": "length"}, "f:1")
    assert isinstance(cut, ChatRow)
    assert not cut.finished
    assert parse_row({"input_ids": [1, 2], "loss_mask": [0, 1]}, "f:1") == TokenRow(
        [1, 2], [False, True]
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], r"f:7: found a JSON list, expected an object"),
        ({"text": "a"}, r"f:7: found keys \['text'\], expected `messages`"),
        ({"messages": "a"}, r"f:7: `messages` is text that is not JSON"),
        ({"messages": {}}, r"f:7: `messages` is of type dict, expected a list"),
        ({"messages": []}, r"f:7: `messages` is empty"),
        (
            {"messages": [{"content": "a"}]},
            r"f:7: messages\[0\] is .*expected an object with `role`",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, r"f:7: messages\[0\].content is a int"),
        (
            {"conversations": [{"from": "narrator", "value": ""}]},
            r"f:7: unknown speaker 'narrator'",
        ),
        ({"input_ids": [1]}, r"f:7: `input_ids` without `loss_mask`"),
        ({"input_ids": [1, 2], "loss_mask": [1]}, r"f:7: 2 input_ids but 1 values of loss_mask"),
        ({"input_ids": [], "loss_mask": []}, r"f:7: `input_ids` is empty"),
        (
            {"input_ids": ["a"], "loss_mask": [1]},
            r"f:7: `input_ids` holds something that is not an integer",
        ),
        ({"input_ids": [1], "loss_mask": [2]}, r"f:7: `loss_mask` holds something other than"),
    ],
)
def test_malformed_rows(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_row(row, "f:7")


# Lines that are no row, and what is said of them.
BAD_LINES = {
    "invalid UTF-8": (b'{"messages": "\xff"}', "not JSON"),
    "cut": (b'{"messages": [{"role": "us', "not JSON"),
    "no JSON": (b"hello", "not JSON"),
    "binary": (b"\x00\x01\x02{", "not JSON"),
    "list": (b"[1]", "found a JSON list, expected an object"),
    "number": (b"3", "found a JSON int, expected an object"),
    "text": (b'"a"', "found a JSON str, expected an object"),
    "null": (b"null", "expected an object"),
    "endless number": (b'{"messages": ' + b"9" * 5000 + b"}", "not JSON"),
    "very deep": (b'{"messages": ' + b"[" * 100_000, "not JSON"),
    "deep": (
        json.dumps(CHAT).encode()[:-1]
        + b', "tools": ['
        + b'{"a": ' * 99
        + b"1"
        + b"}" * 99
        + b"]}",
        "nested more than 64 deep",
    ),
    "deep in text": (json.dumps({"messages": "[" * 100_000}).encode(), "text that is not JSON"),
    "long": (json.dumps({"messages": "a" * 300_000}).encode(), "a line of more than"),
    "long blank": (b" " * 300_000, "a line of more than"),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_lines_that_are_no_row_are_bad_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    """Each with its number, file, line and reason; those around them are read."""
    monkeypatch.setattr(rows, "LINE_BYTES", 250_000)
    lines = [json.dumps(CHAT).encode()]
    for bad, _ in BAD_LINES.values():
        lines += [bad, b"", json.dumps(CHAT).encode()]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(gzip.compress(b"\n".join(lines)) if packed else b"\n".join(lines))
    corpus = open_corpus(str(path))
    found = list(corpus.rows())
    assert [r.number for r in found] == list(range(corpus.count()))
    assert len(found) == len(corpus.weights()) == 1 + 2 * len(BAD_LINES)
    for row in found[::2]:
        assert isinstance(row.value, ChatRow)
    for number, (row, (name, (_, said))) in enumerate(
        zip(found[1::2], BAD_LINES.items(), strict=True)
    ):
        assert isinstance(row.value, BadRow), name
        assert f"rows.jsonl:{3 * number + 2}: " in row.value.detail, name
        assert said in row.value.detail, (name, row.value.detail)
    assert [corpus.weights()[1 + 2 * n] for n, name in enumerate(BAD_LINES) if "long" in name] == [
        0,
        0,
    ]


def test_lines_at_the_limit_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps(CHAT).encode()
    path = tmp_path / "rows.jsonl"
    for ending, limit, taken in (
        (b"", len(line), True),
        (b"\n", len(line) + 1, True),
        (b"", len(line) - 1, False),
    ):
        monkeypatch.setattr(rows, "LINE_BYTES", limit)
        path.write_bytes(line + ending)
        (row,) = open_corpus(str(path)).rows()
        assert isinstance(row.value, ChatRow) is taken


def test_too_deeply_nested_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("[" * 100_000 + "]" * 100_000 + "\n")
    with pytest.raises(DataError, match=r"rows.jsonl: begins like a JSON array but is not one"):
        list(open_corpus(str(path)).rows())


def test_broken_gzip(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(CHAT) + "\n").encode() * 1000)[:-20])
    with pytest.raises(DataError, match="an incomplete gzip file, broken after line"):
        list(open_corpus(str(path)).rows())


@pytest.mark.parametrize("name", ["none.jsonl", "a/none.jsonl", "none", "a/b/c/d"])
def test_no_such_file(name: str) -> None:
    with pytest.raises(UsageError, match="no such file"):
        open_corpus(name)


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a folder without a file of rows"):
        open_corpus(str(tmp_path))


class FakeDatasets:
    """Stands for the package `datasets`, which needs a network."""

    def __init__(self, rows: list[Any] | Exception) -> None:
        self.rows = rows
        self.asked: tuple[str, str] | None = None

    def load_dataset(self, name: str, split: str) -> list[Any]:
        self.asked = (name, split)
        if isinstance(self.rows, Exception):
            raise self.rows
        return self.rows


def test_a_data_set_id(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDatasets([CHAT, {"text": 1}])
    monkeypatch.setitem(sys.modules, "datasets", fake)  # type: ignore[arg-type]
    corpus = open_corpus("org/name:train_sft")
    assert fake.asked == ("org/name", "train_sft")
    assert (corpus.id, corpus.sha256, corpus.count()) == ("org/name:train_sft", None, 2)
    (bad,) = corpus.rows(1)
    assert isinstance(bad.value, BadRow)
    assert bad.value.detail.startswith("org/name:train_sft row 1: found keys ['text']")


def test_a_data_set_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets(ConnectionError("offline\nmore")))  # type: ignore[arg-type]
    with pytest.raises(
        DataError,
        match=r"org/name: not a file here, and the data set \(split 'train'\) could not be loaded: "
        r"ConnectionError: offline",
    ):
        open_corpus("org/name")


def test_weights_are_the_bytes_of_the_rows(tmp_path: Path) -> None:
    """Of the non-blank lines, as rows are counted."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 22}\n')
    corpus = open_corpus(str(path))
    assert corpus.weights() == [9, 10]
    assert corpus.count() == 2


def test_rows_have_the_hash_of_a_copy_of_all_their_fields() -> None:
    """``rows_sha256`` copies nothing; resumed stores hold what asdict's copies gave."""
    messages = [
        {"role": "user", "content": "é\ud800"},
        {"role": "assistant", "content": [{"a": 1}]},
    ]
    given = [
        Row(3, "a:1", ChatRow(messages, [{"b": None}], False, frozenset({2, 1}), {"c": 1.5})),
        Row(4, "a:2", TokenRow([1, 2], [True, False], "x")),
        Row(5, "a:3", BadRow("not JSON")),
    ]
    want = hashlib.sha256()
    for row in given:
        value: dict[str, Any] = {"malformed": True}
        if not isinstance(row.value, BadRow):
            copied = dataclasses.asdict(row.value).items()
            value = {k: sorted(v) if isinstance(v, frozenset) else v for k, v in copied}
        want.update(canonical({**value, "number": row.number}) + b"\n")
    assert rows_sha256(given) == want.hexdigest()
