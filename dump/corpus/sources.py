"""Open what ``--data`` names as a corpus: a file of any kind, a folder or glob of files, a saved
data set, stdin, a data set of the hub.
"""

from __future__ import annotations

import codecs
import glob
import json
import re
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dspark.cache.errors import DataError, UsageError, first_line
from dspark.cache.files.checksum import file_sha256
from dspark.dump.corpus.rows import (
    Corpus,
    FirstRows,
    JoinedCorpus,
    JsonlCorpus,
    SharedCorpus,
    TableCorpus,
)

SHARE = re.compile(r"(?P<data>.+)=(?P<share>0?\.\d+|1(\.0*)?|0)")
DATASET_ID = re.compile(
    r"(?P<id>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.\[\]%:+-]+))?"
)
FILES = (".jsonl", ".json", ".gz", ".zst", ".txt", ".parquet", ".arrow", ".ndjson")
TAKEN = (
    "a file (.jsonl, .json, .parquet, .arrow, also .gz or .zst), a folder or glob of these, a "
    "saved data set, - for stdin, "
    "a data set id such as org/name, or a name"
)
# The field's public corpora.
NAMED = {
    "ultrachat": "HuggingFaceH4/ultrachat_200k:train_sft",
    "magpie": "Magpie-Align/Magpie-Pro-300K-Filtered",
    "open-perfectblend": "mlabonne/open-perfectblend",
    "sharegpt": "Aeala/ShareGPT_Vicuna_unfiltered",
    "hermes-function-calling": "NousResearch/hermes-function-calling-v1/func_calling",
    "glm-5.2-regenerated": "mgoin/GLM-5.2-FP8-magpie-ultrachat",
}


def open_corpus(data: str) -> Corpus:
    """Open the corpus that ``data`` names; ``DATA=0.3`` uses a share of its rows."""
    shared = SHARE.fullmatch(data)
    if shared and not Path(data).exists():
        share = float(shared["share"])
        if not 0 < share <= 1:
            raise UsageError(
                f"--data {data}: found the share {share:g}, expected more than 0 and at most 1."
            )
        return SharedCorpus(open_corpus(shared["data"]), share)
    if data == "-":
        return _stdin()
    data = NAMED.get(data, data)
    path = Path(data)
    if path.is_file():
        return open_file(path)
    if path.is_dir():
        return _folder(path)
    if glob.has_magic(data) and DATASET_ID.fullmatch(data) is None:
        found = sorted(Path(p) for p in glob.glob(data, recursive=True) if Path(p).is_file())
        return _joined(found, data, f"--data {data}: no such file: nothing matches.")
    match = DATASET_ID.fullmatch(data)
    if match is None or path.suffix in FILES:
        raise UsageError(f"--data {data}: no such file. Expected {TAKEN} ({', '.join(NAMED)}).")
    return hub(match["id"], match["config"], match["split"] or "train")


def joined(corpora: Sequence[Corpus], limit: int | None) -> Corpus:
    """Join several sources, the first ``limit`` rows of each, for code that reads all of them at
    once.
    """
    parts = [c if limit is None else FirstRows(c, limit) for c in corpora]
    return parts[0] if len(parts) == 1 else JoinedCorpus(parts, ", ".join(c.id for c in corpora))


def open_file(path: Path) -> Corpus:
    """Open a file by its first bytes; its name does not matter."""
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise UsageError(f"--data {path}: {error.strerror or error}.") from error
    if head.startswith(b"PAR1"):
        return _table(path, lambda d: d.Dataset.from_parquet(str(path), keep_in_memory=True))
    if head.startswith(b"ARROW1") or head[:4] == b"\xff\xff\xff\xff":
        return _table(path, lambda d: d.Dataset(_arrow(path, head)))
    lines = JsonlCorpus(path)
    if is_array(lines):
        return TableCorpus(_array(lines), path.name, lines.sha256)
    return lines


def is_array(lines: JsonlCorpus) -> bool:
    """Tell whether a file, once decompressed, begins with a JSON array."""
    try:
        with lines.open() as file:
            return file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
    except (OSError, EOFError, zlib.error):
        return False  # reported with its line when rows are read


def hub(name: str, config: str | None, split: str) -> Corpus:
    """Open a data set from the Hugging Face hub, or from its local cache when offline."""
    full = f"{name}{'/' + config if config else ''}"
    datasets = _datasets(f"--data {full} is a data set id")
    try:
        more = {"name": config} if config else {}
        table = datasets.load_dataset(name, split=split, **more)
    except (
        Exception
    ) as error:  # datasets raises a dozen unrelated kinds: offline, not found, gated, no such split
        raise DataError(
            f"--data {full}: not a file here, and the data set (split {split!r}) could not be "
            "loaded: "
            f"{type(error).__name__}: {first_line(error)}. Check the name, the split "
            "(org/name:split) and the network, or give a JSONL file."
        ) from error
    return TableCorpus(table, f"{full}:{split}", None)


def _datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"{what}, and the package `datasets` is not installed: pip install datasets, or give "
            "a JSONL file."
        ) from error
    return datasets


def _table(path: Path, read: Callable[[Any], Any]) -> Corpus:
    datasets = _datasets(f"--data {path} is a table")
    try:
        table = read(datasets)
    except Exception as error:  # arrow's errors have no common base
        raise DataError(
            f"--data {path}: cannot be read: {type(error).__name__}: {first_line(error)}. "
            "Is it complete?"
        ) from error
    return TableCorpus(table, path.name, file_sha256(path) if path.is_file() else _folder_sha(path))


def _arrow(path: Path, head: bytes) -> Any:
    import pyarrow as pa
    from datasets.table import InMemoryTable

    with pa.OSFile(str(path)) as file:
        reader = pa.ipc.open_file(file) if head.startswith(b"ARROW1") else pa.ipc.open_stream(file)
        return InMemoryTable(reader.read_all())


def _array(lines: JsonlCorpus) -> list[Any]:
    try:
        with lines.open() as file:
            rows: list[Any] = json.loads(file.read().decode("utf-8-sig"))
    except (ValueError, RecursionError, EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{lines.path}: begins like a JSON array but is not one ({error}). Every line "
            "must be one JSON object, or the whole file one array."
        ) from error
    return rows


def _folder(path: Path) -> Corpus:
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text()).get("splits") or []
        if "train" not in splits and len(splits) != 1:
            raise UsageError(
                f"--data {path}: a saved data set with the splits {splits}; give the folder of "
                f"one: {path}/{(splits or ['SPLIT'])[0]}."
            )
        return _folder(path / ("train" if "train" in splits else splits[0]))
    if (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
        return _table(path, lambda d: d.load_from_disk(str(path)))
    found = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in FILES)
    return _joined(
        found, str(path), f"--data {path}: a folder without a file of rows. Expected {TAKEN}."
    )


def _joined(files: list[Path], name: str, nothing: str) -> Corpus:
    if not files:
        raise UsageError(nothing)
    if len(files) == 1:
        return open_file(files[0])
    return JoinedCorpus([open_file(f) for f in files], name)


def _folder_sha(path: Path) -> str:
    import hashlib

    out = hashlib.sha256()
    for file in sorted(p for p in path.iterdir() if p.suffix == ".arrow"):
        out.update(f"{file.name} {file_sha256(file)}\n".encode())
    return out.hexdigest()


_spooled: list[Any] = []  # what stdin gave, read once per process


def _stdin() -> Corpus:
    if not _spooled:
        if sys.stdin.isatty():
            raise UsageError("--data -: stdin is a terminal; pipe JSONL into it.")
        file = tempfile.NamedTemporaryFile(suffix=".jsonl")  # noqa: SIM115  # lives as long as the process
        while chunk := sys.stdin.buffer.read(1 << 20):
            file.write(chunk)
        file.flush()
        _spooled.append(file)
    lines = JsonlCorpus(Path(_spooled[0].name), "stdin")
    return TableCorpus(_array(lines), "stdin", lines.sha256) if is_array(lines) else lines
