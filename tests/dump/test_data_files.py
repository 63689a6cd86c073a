"""Files as they come: ten shapes through ``dspark-tools data`` and ``dspark-dump``, and twenty
broken ones, each with an error that says what to do.
"""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import dspark.cache
from dspark.dump.cli import main as dump
from dspark.tools.cli import main as tools

END = "<|im_end|>"
ASK, SAY = (
    {"role": "user", "content": "say hello"},
    {"role": "assistant", "content": "hello to you"},
)
CHAT = {"messages": [ASK, SAY]}
LINE = json.dumps(CHAT) + "\n"
SHAREGPT = [{"from": "human", "value": "say hello"}, {"from": "gpt", "value": "hello to you"}]
PARTS = [ASK | {"content": [{"type": "text", "text": "say hello"}]}, SAY]
CHOICES = {"choices": [{"message": SAY, "finish_reason": "stop"}]}
PADDED = [ASK | {"tool_calls": None, "name": None}, SAY | {"tool_calls": None, "name": None}]
# Ten shapes of the same conversation, each in a file of another kind.
SHAPES: dict[str, Any] = {
    "openai.jsonl": CHAT,
    "sharegpt.json": {"conversations": SHAREGPT},
    "completion.jsonl": {"prompt": "say hello", "completion": "hello to you"},
    "instruction.gz": {"instruction": "say hello", "input": "", "output": "hello to you"},
    "parts.jsonl": {"messages": PARTS},
    "text.parquet": {"messages": json.dumps([ASK, SAY])},
    "padded.parquet": {"messages": PADDED},
    "gateway.zst": {"request": {"model": "m", "messages": [ASK]}, "response": CHOICES},
    "batch.jsonl": {"custom_id": "1", "body": {"messages": [ASK]}, "response": {"body": CHOICES}},
    "system.arrow": {"conversation": [ASK, SAY], "system_prompt": None},
}


def write(path: Path, row: Any) -> None:
    line = (json.dumps(row) + "\n").encode()
    if path.suffix == ".json":
        path.write_text(json.dumps([row], indent=1))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(line))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist([row])
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as out:
            out.write_table(table)
    elif path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(line)
    else:
        path.write_bytes(line)


def test_ten_shapes_of_file_are_shown_and_dumped(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for name, row in SHAPES.items():
        write(folder / name, row)
        out = CliRunner().invoke(
            tools, ["data", str(folder / name), "--model", str(tiny), "--json"]
        )
        assert out.exit_code == 0, (name, out.output)
        found = json.loads(out.stdout)
        assert (found["rows"], found["samples"], found["dropped"]) == (1, 1, {}), name
        ((sample,),) = [row["samples"] for row in found["per_row"]]
        ((start, stop),) = sample["spans"]
        assert sample["text"][start:stop] == f"hello to you{END}", name
    store = tmp_path / "hs.zarr"
    words = ["--model", str(tiny), "--data", str(folder), "--output", str(store), "--device", "cpu"]
    out = CliRunner().invoke(dump, [*words, "--seq-length", "200"])
    assert out.exit_code == 0, out.output
    cache = dspark.cache.open(store)
    assert len(cache) == len(SHAPES) == 10
    assert (
        len({(cache[i].input_ids.tobytes(), cache[i].loss_mask.tobytes()) for i in range(10)}) == 1
    )


def broken() -> dict[str, tuple[str, bytes, str]]:
    """Name -> file, its bytes, and what the error says of it."""
    good = LINE.encode()

    def row(value: Any) -> bytes:
        return (json.dumps(value) + "\n").encode()

    return {
        "empty": ("a.jsonl", b"", r"no rows|empty"),
        "blank lines": ("a.jsonl", b"\n\n", r"no rows|empty"),
        "no json": ("a.jsonl", b"hello\n", r":1: not JSON .*one JSON object"),
        "cut line": ("a.jsonl", good[:-5], r":1: not JSON"),
        "list per line": ("a.jsonl", b"[1]\n[2]\n", r"begins like a JSON array but is not one"),
        "array cut": (
            "a.json",
            b"[" + good[:-1] + b",",
            r"begins like a JSON array but is not one",
        ),
        "pretty json": ("a.json", json.dumps(CHAT, indent=1).encode(), r":1: not JSON"),
        "utf-16": ("a.jsonl", LINE.encode("utf-16"), r":1: not JSON|not UTF-8"),
        "latin-1": (
            "a.jsonl",
            LINE.replace("hello", "hall\xf6").encode("latin-1"),
            r":1: not JSON .*convert it with iconv",
        ),
        "gzip cut": ("a.gz", gzip.compress(good * 99)[:-9], r"an incomplete gzip file"),
        "gzip of nothing known": ("a.gz", gzip.compress(b"\x00\x01"), r":1: not JSON"),
        "zstd cut": ("a.zst", b"\x28\xb5\x2f\xfd\x00", r"cannot be read|incomplete"),
        "parquet cut": ("a.parquet", b"PAR1abc", r"cannot be read: .*Is it complete\?"),
        "arrow cut": ("a.arrow", b"ARROW1\x00\x00", r"cannot be read: .*Is it complete\?"),
        "csv": (
            "a.csv",
            b"prompt,answer\na,b\n",
            r":1: not JSON .*convert CSV or plain text into rows",
        ),
        "other keys": (
            "a.jsonl",
            row({"text": "a"}),
            r"found keys \['text'\], expected `messages`",
        ),
        "no answer field": (
            "a.jsonl",
            row({"messages": 3}),
            r"`messages` is of type int, expected a list",
        ),
        "no role": (
            "a.jsonl",
            row({"messages": [{"content": "a"}]}),
            r"expected an object with `role`",
        ),
        "no mask": (
            "a.jsonl",
            row({"input_ids": [1, 2]}),
            r"give one 0 or 1 per token",
        ),
        "beyond": (
            "a.jsonl",
            row({"input_ids": [1, 9999], "loss_mask": [0, 1]}),
            r"9999.*vocabulary",
        ),
        "speaker": (
            "a.jsonl",
            row({"conversations": [{"from": "x", "value": ""}]}),
            r"unknown speaker 'x', expected one of",
        ),
    }


@pytest.mark.parametrize("kind", sorted(broken()))
def test_a_broken_file_is_a_sentence_that_names_it(kind: str, tiny: Path, tmp_path: Path) -> None:
    name, data, said = broken()[kind]
    path = tmp_path / name
    path.write_bytes(data)
    words = [
        "--model",
        str(tiny),
        "--data",
        str(path),
        "--output",
        str(tmp_path / "o"),
        "--dry-run",
    ]
    out = CliRunner().invoke(dump, words)
    assert out.exit_code in (1, 2), out.output
    assert isinstance(out.exception, SystemExit)
    (line,) = [text for text in out.stderr.splitlines() if text.startswith("error:")]
    assert name in line
    assert re.search(said, line), line
