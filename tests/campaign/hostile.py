"""Stores, drafts, checkpoints, targets and corpora that somebody made to do harm, their checksums
right where they have any: each ends in a typed error, or is read as what it says, within 10 s and 1
GB, and no file outside is touched.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faults

SECONDS, GIGABYTES = 10, 1.0
RAN = Path(tempfile.gettempdir(), "dspark-hostile-ran")
DEEP = "[" * 3000 + "]" * 3000
VALUES: list[Any] = [
    -1,
    0,
    1,
    2**31,
    2**40,
    2**63,
    10**30,
    -(2**63),
    1e308,
    -1e308,
    1e-320,
    float("nan"),
    float("inf"),
    True,
    False,
    None,
    "",
    "x" * 5000,
    "\x1b]52;c;YQ==\x07",
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    ".",
    "\x00",
    "\ud800",
    [],
    {},
    [[]],
    [None],
    [2**40] * 3,
    {"a": {}},
    ["x"] * 100,
    "1e9",
    0.5,
    "NaN",
    [-1],
    {"../x": [1, 2, 3]},
]


HERE = Path(__file__).resolve().parents[2]
READABLE = ("/proc/", "/sys/", "/usr/", "/lib", "/dev/null", "/dev/urandom")


class TooLong(BaseException):
    """A try that did not end."""


class Watch:
    """Notes what a try does that it must not: executes, connects, changes a file that is not its
    own, or reads one that nobody named. One per process; ``own`` is None between tries.
    """

    CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink")
    CHANGES += ("os.chmod", "os.chown", "os.truncate", "os.utime", "shutil.rmtree")
    RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen")
    RUNS += ("socket.connect", "pickle.find_class")

    def __init__(self, readable: list[str]) -> None:
        self.readable = tuple(readable)
        self.own: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, given: tuple[Any, ...]) -> None:
        if self.own is None or not given:
            return
        if event in self.RUNS:
            self.seen.append(f"{event} {given!r:.200}")
        elif event in self.CHANGES or event == "open":
            if not isinstance(given[0], str | bytes | os.PathLike):
                return
            path = os.path.abspath(os.fsdecode(given[0]))
            changes = event != "open" or given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            beside = os.path.basename(self.own)
            mine = path.startswith(self.own) or beside in os.path.relpath(path, self.own + "/..")
            if not mine and (changes or not path.startswith(self.readable)):
                self.seen.append(f"{event} {path} {given[1:]!r:.100}")


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with faults.bounded(GIGABYTES):
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything within a JSON value."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return ([at] if at else []) + [p for key, v in inner for p in places(v, (*at, key))]


def value_of(rng: random.Random) -> Any:
    """A copy: what is changed next must not be ``VALUES``."""
    return copy.deepcopy(rng.choice(VALUES))


def mutated(value: Any, rng: random.Random) -> Any:
    """A copy with one to three places changed, gone, or new."""
    out = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        found = places(out)
        if not found:
            return value_of(rng)
        *path, key = rng.choice(found)
        parent = out
        for step in path:
            parent = parent[step]
        how = rng.random()
        if how < 0.15 and isinstance(parent, dict):
            del parent[key]
        elif how < 0.25 and isinstance(parent, dict):
            parent[rng.choice(["x", "../x", "codec", "plan", ""])] = value_of(rng)
        elif how < 0.35 and type(parent[key]) is int:
            parent[key] = parent[key] * rng.choice([-1, 2, 1000, 10**6, 10**9]) + rng.choice(
                [0, 1, -1]
            )
        else:
            parent[key] = value_of(rng)
    return out


def written(path: Path, value: Any, rng: random.Random) -> None:
    """As JSON; now and then nested too deep, cut, or with bytes that are no text."""
    text = json.dumps(value)
    how = rng.random()
    if how < 0.03:
        text = text.replace(rng.choice([":", ","]), ":" + DEEP + ",", 1)
    elif how < 0.06:
        text = text[: rng.randrange(max(len(text), 1))]
    data = text.encode("utf-8", "surrogatepass")
    path.write_bytes(data + (b"\xff\xfe" if how > 0.98 else b""))


def store_case(work: Path, rng: random.Random) -> str:
    """A changed JSON of a store, sealed anew, or a file of bytes that claim to be more than they
    are.
    """
    from dspark.cache.canonical import sealed
    from dspark.cache.manifest import plan_digest

    files = [*sorted(work.rglob("zarr.json")), work / "target" / "config.json"]
    path = rng.choice([*files, work / "zarr.json", *(work / "parts").glob("0*/zarr.json")])
    value = json.loads(path.read_bytes())
    keys = [k for k in (value.get("attributes") or {}) if k.startswith("dspark")]
    if keys and rng.random() < 0.85:
        key = keys[0]
        body = mutated({k: v for k, v in value["attributes"][key].items() if k != "crc32c"}, rng)
        if isinstance(body, dict) and "plan_sha256" in body and rng.random() < 0.8:
            with contextlib.suppress(TypeError, ValueError, AttributeError):
                body["plan_sha256"] = plan_digest(body["plan"])
        with contextlib.suppress(TypeError, ValueError):
            body = sealed(body) if isinstance(body, dict) else body
        value["attributes"][key] = body
    elif rng.random() < 0.8:
        value = mutated(value, rng)
    else:
        shard = rng.choice([p for p in work.rglob("*") if p.is_file() and "/c/" in p.as_posix()])
        bomb(shard, rng)
        return f"bomb in {shard.relative_to(work)}"
    written(path, value, rng)
    return str(path.relative_to(work))


def bomb(shard: Path, rng: random.Random) -> None:
    """A shard of one chunk that claims, or is, far more than it may be; checksums right, the tag
    kept.
    """
    from numcodecs import Zstd

    from dspark.cache.files.checksum import crc32c

    tag = shard.read_bytes()[:16]
    if rng.random() < 0.5:
        packed = bytes(Zstd(level=1).encode(bytes(rng.choice([1 << 20, 1 << 28]))))
    else:
        packed = struct.pack(
            "<BBBBIII", 2, 1, 0x81, 4, rng.choice([2**31 - 1, 2**32 - 1]), 2**17, 64
        ) + bytes(48)
    packed += crc32c(packed).to_bytes(4, "little")
    index = struct.pack(
        "<QQ", rng.choice([16, 0, 2**40]), rng.choice([len(packed), 20 * 10**9, 2**63])
    )
    shard.write_bytes(tag + packed + index + crc32c(index).to_bytes(4, "little"))


def use_store(work: Path) -> None:
    from dspark.cache import open as open_store
    from dspark.cache.errors import DsparkError
    from dspark.cache.stores.verify import verify
    from dspark.tools.stores.info import info

    failed: DsparkError | None = None
    for look in (lambda: info(str(work)), lambda: verify(work)):
        try:
            look()  # type: ignore[no-untyped-call]
        except DsparkError as error:
            failed = error
    cache = open_store(work)
    for i in range(min(len(cache), 6)):
        _ = cache[i]
    _ = cache.target
    if failed:
        raise failed


def draft_case(work: Path, rng: random.Random) -> str:
    path = work / "config.json"
    if rng.random() < 0.75:
        written(path, mutated(json.loads(path.read_bytes()), rng), rng)
        return "config.json"
    weights = work / "model.safetensors"
    data = weights.read_bytes()
    size = int.from_bytes(data[:8], "little")
    how = rng.random()
    if how < 0.4:
        header = json.dumps(mutated(json.loads(data[8 : 8 + size]), rng)).encode(
            "utf-8", "surrogatepass"
        )
        weights.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    elif how < 0.6:
        weights.write_bytes(rng.choice([2**63, 2**40, size + 1]).to_bytes(8, "little") + data[8:])
    elif how < 0.8:
        weights.write_bytes(b"cos\nsystem\n(S'touch " + os.fsencode(RAN) + b"'\ntR.")
    else:
        weights.write_bytes(rng.randbytes(rng.randrange(200)))
    return "model.safetensors"


def use_draft(work: Path) -> None:
    from core_cases import small_target
    from dspark.train.draft.saved.folder import load_draft

    load_draft(work, small_target())


def training_case(work: Path, rng: random.Random) -> str:
    """The files of a run, and the state of its checkpoint, sealed anew."""
    from dspark.cache.canonical import sealed

    names = [
        "training.json",
        "store.json",
        "history.json",
        "metrics.jsonl",
        "checkpoints/step_00000002/state.json",
    ]
    name = rng.choice(names)
    path = work / name
    if name.endswith("jsonl"):
        lines = path.read_text().splitlines()
        lines[rng.randrange(len(lines))] = rng.choice(
            [
                "3",
                "[]",
                "null",
                '"x"',
                DEEP,
                '{"step": "x"}',
                '{"step": null}',
                "{",
                '{"step": 1e400}',
                "\x00",
            ]
        )
        path.write_text("\n".join(lines) + "\n")
        return name
    value = json.loads(path.read_bytes())
    if name.endswith("state.json"):
        body = mutated({k: v for k, v in value.items() if k != "crc32c"}, rng)
        with contextlib.suppress(TypeError, ValueError):
            body = sealed(body) if isinstance(body, dict) else body
        written(path, body, rng)
    else:
        written(path, mutated(value, rng), rng)
    return name


def target_case(work: Path, rng: random.Random) -> str:
    path = work / rng.choice(
        ["config.json", "config.json", "generation_config.json", "tokenizer_config.json"]
    )
    if not path.exists():
        path = work / "config.json"
    value = json.loads(path.read_bytes())
    if path.name == "config.json" and rng.random() < 0.4:
        value[
            rng.choice(
                [
                    "hidden_size",
                    "num_hidden_layers",
                    "vocab_size",
                    "intermediate_size",
                    "num_attention_heads",
                    "head_dim",
                ]
            )
        ] = rng.choice([2**40, 10**9, 10**18, -5, 0, "many"])
    else:
        value = mutated(value, rng)
    written(path, value, rng)
    return path.name


def use_target(work: Path) -> None:
    from dspark.dump.target.config import load_config, shapes_of

    shapes_of(load_config(str(work))[1], str(work))


def corpus_case(work: Path, rng: random.Random) -> str:
    """Lines of a corpus, some of them none; at times packed to expand a thousand times."""
    import gzip

    lines = []
    for _ in range(rng.randint(1, 6)):
        row: Any = {
            "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
        }
        how = rng.random()
        if how < 0.6:
            lines.append(json.dumps(mutated(row, rng)).encode("utf-8", "surrogatepass"))
        elif how < 0.7:
            lines.append(DEEP.encode())
        elif how < 0.8:
            lines.append(
                b'{"messages": [{"role": "user", "content": "'
                + b"a" * rng.choice([10, 1 << 20, 30 << 20])
                + b'"}]}'
            )
        elif how < 0.9:
            row["messages"] = row["messages"] * rng.choice([1, 50, 400])
            lines.append(json.dumps(row).encode())
        else:
            lines.append(rng.randbytes(40))
    data = b"\n".join(lines) + b"\n"
    if rng.random() < 0.1:
        data = bytes(200 << 20)  # one line of zeros
    path = work / "rows.jsonl"
    if rng.random() < 0.3:
        path = work / "rows.jsonl.gz"
        data = gzip.compress(data, 1)
        if rng.random() < 0.3:
            data = data[: len(data) // 2]
    path.write_bytes(data)
    return path.name


def use_corpus(work: Path) -> None:
    from dspark.dump.corpus.sources import open_corpus

    path = next(work.glob("rows.jsonl*"))
    corpus = open_corpus(str(path))
    for _ in corpus.rows():
        pass


def campaign(folder: Path, tries: int, seed: int) -> dict[str, Any]:
    """``tries`` cases, shared among stores (half of them), drafts, trainings, targets and
    corpora.
    """
    from small_trainings import small_training

    import stores
    from core_cases import small_draft
    from dspark.cache.codec import registry
    from dspark.cache.errors import DsparkError
    from dspark.cache.files.calibration import codec_info
    from dspark.train.draft.saved.folder import save_draft
    from dspark.train.loop import train
    from dump_targets import save_target

    rng = random.Random(seed)
    m = dataclasses.replace(stores.manifest(), codec=codec_info(registry.make("rotated-4-4")))
    stores.write_store(folder / "store", [40, 52, 61, 44], m=m)
    save_draft(folder / "draft", small_draft())
    settings = small_training(folder, [40, 52, 61, 44], max_steps=2, device="cpu")
    train(dataclasses.replace(settings, output=str(folder / "training")))
    save_target(folder / "target")
    (folder / "corpus").mkdir()

    def resume(work: Path) -> None:
        train(dataclasses.replace(settings, output=str(work)), resume=True)

    table: dict[str, tuple[Callable[[Path, random.Random], str], Callable[[Path], None]]] = {
        "store": (store_case, use_store),
        "draft": (draft_case, use_draft),
        "training": (training_case, resume),
        "target": (target_case, use_target),
        "corpus": (corpus_case, use_corpus),
    }
    watch = Watch([sys.prefix, sys.base_prefix, *READABLE, str(HERE), str(folder)])
    canary = folder / "outside"
    canary.mkdir()
    (canary / "file").write_text("untouched")
    fixed = {n: faults.tree(folder / n) for n in table} | {"outside": faults.tree(canary)}
    counts: collections.Counter[str] = collections.Counter()
    findings: list[str] = []
    slowest, began, work = 0.0, time.monotonic(), folder / "work"
    for number in range(tries):
        kind = rng.choice(["store"] * 4 + ["draft", "training", "target", "corpus"])
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder / kind, work)
        case, use = table[kind]
        what = case(work, rng)
        start, watch.own, watch.seen = time.monotonic(), str(work), []
        try:
            with limited():
                use(work)
            counts["read as it says"] += 1
        except DsparkError:
            counts["typed error"] += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            watch.own = None
            counts["raw"] += 1
            faults.note(f"try {number}, {kind}, {what}: {error!r:.300}")
            findings.append(
                f"try {number}, {kind}, {what} (kept: {faults.kept(work, work.name)}): "
                f"{type(error).__name__}: {str(error)[:300]}"
            )
        watch.own = None
        for did in watch.seen:
            findings.append(f"try {number}, {kind}, {what}: {did}")
        slowest = max(slowest, time.monotonic() - start)
        counts[kind] += 1
    if {n: faults.tree(folder / n) for n in fixed} != fixed:
        findings.append("a file outside was changed")
    if RAN.exists():
        findings.append(f"{RAN} is there: something was executed")
    return {
        "tries": tries,
        **counts,
        "findings": findings,
        "slowest": round(slowest, 1),
        "seconds": round(time.monotonic() - began),
    }
