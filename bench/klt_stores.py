"""Bytes against tau from stores on disk: what the product dumps, reads and decodes. Several
processes share the work, and any of them may be cut short.

    python bench/klt_stores.py --dump --model DIR --data rows.jsonl.gz --stores DIR --out DIR
        --codecs klt-1-1,rotated-4-4,... [--at-once 4]
    python bench/klt_stores.py --name a --model DIR --stores DIR --out DIR
        --codecs exact,klt-1-1,... [--seeds 0,1,2,3,4] [--seconds 450] [--keep exact,klt-1-1]
    python bench/klt_stores.py --merge --out DIR [--before klt_stores.json]

1. ``--dump`` draws the rows (always the same ones) and dumps each codec with ``dspark-dump``;
   ``exact`` is the lossless store. Processes on several GPUs may dump different codecs.
2. Every process takes the next codec that nobody has taken and whose store is complete, reads it
   through ``dspark.cache``, decodes it on the device once, and trains all ``--seeds`` from memory.
   Drafts of one seed have the same initial weights, batches and anchors; tau is judged on the exact
   states of held-out prompts, paired by seed (``codec_klt.py``).
   OUT/klt_stores.NAME.json is written after every training; a training that any file in OUT has is
   not repeated.
3. ``--merge`` joins the files of all processes into OUT/klt_stores.json.

A codec is a name, and after ``@`` what is special about its store:

    klt-1-1@0.33x   calibrated on a third of the tokens
    klt-1-1@other   calibrated on rows whose line matches ``--other`` and that are not in the store
    klt-1.7-1@L3    states of 3 layers (exact@L3 judges it)

After the name, ``:3`` trains the first three seeds only. Bytes per token are all files of a store
but the target's weights; its calibration file counts.
``--keep`` saves the drafts of the first ``--keep-seeds`` seeds below OUT/drafts, for ``decoded.py
--learn OUT --data STORES/rows.jsonl``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from codec_klt import STARTED, Batches, States, Trainer, say, table
from codec_klt_states import Corpus, _drawn

import dspark.cache
from common import write
from dspark.cache.codec.base import EXACT_TOKEN, tokens_of
from dspark.cache.errors import CacheError
from dspark.cache.files.layout import EXACT_POSITION, EXACT_ROW, EXACT_START
from dspark.cache.reader import Cache
from dspark.cache.stored_manifest import read_manifest
from dspark.dump.target.config import load_target
from dspark.train.data.stream import split
from dspark.train.draft.saved.folder import save_draft

# of SmolLM2's 30 layers; without @L, the product's choice
LAYERS = {3: "1,14,27", 8: "1,4,8,11,14,20,24,27"}
DUMP = (
    "import sys; import dspark.cache.codec.klt.codec as k;"
    "k.PER_DIMENSION = round(k.PER_DIMENSION * float(sys.argv.pop(1)));"
    "from dspark.dump.cli import main; main()"
)


@dataclass(frozen=True)
class Store:
    """``codec`` with what follows ``@``; ``most`` seeds are trained, None = all."""

    name: str
    most: int | None = None

    @classmethod
    def of(cls, text: str) -> Store:
        name, _, most = text.partition(":")
        return cls(name, int(most) if most else None)

    @property
    def codec(self) -> str:
        return "lossless" if self.exact else self.name.partition("@")[0]

    @property
    def special(self) -> str:
        return self.name.partition("@")[2]

    @property
    def exact(self) -> bool:
        return self.name.partition("@")[0] == "exact"

    @property
    def layers(self) -> int | None:
        return int(self.special[1:]) if self.special.startswith("L") else None

    @property
    def times(self) -> float:
        return float(self.special[:-1]) if self.special.endswith("x") else 1.0

    @property
    def judge(self) -> Store:
        """The store with the exact states of the same layers."""
        return Store(f"exact@{self.special}" if self.layers else "exact")

    def path(self, stores: Path) -> Path:
        return stores / f"{self.name}.zarr"

    def ready(self, stores: Path) -> bool:
        try:
            return read_manifest(self.path(stores)).complete
        except CacheError:
            return False


# -- dumps -----------------------------------------------------------------------------------------


def drawn(args: argparse.Namespace) -> None:
    """Write the rows to STORES/rows.jsonl, and those to calibrate on to STORES/other.jsonl."""
    args.stores.mkdir(parents=True, exist_ok=True)
    with (gzip.open if args.data.suffix == ".gz" else open)(args.data, "rt") as file:
        lines = list(enumerate(file))
    main = _drawn([x for x in lines if args.only is None or args.only.search(x[1])], args.rows)
    seen = {number for number, _ in main}
    wanted = {"rows.jsonl": main}
    if args.other is not None:
        some = [x for x in lines if args.other.search(x[1]) and x[0] not in seen]
        wanted["other.jsonl"] = _drawn(some, args.other_rows)
    for name, chosen in wanted.items():
        path = args.stores / name
        if not path.exists():
            made = path.with_suffix(f".{os.getpid()}")
            made.write_text("".join(line for _, line in chosen))
            made.rename(path)


def dump(args: argparse.Namespace, store: Store, data: str = "rows.jsonl") -> None:
    """Dump one store, if it is not there; its log lies beside it."""
    if store.ready(args.stores):
        return
    flags = ["--model", args.model, "--data", str(args.stores / data), "--codec", store.codec]
    flags += ["--output", str(store.path(args.stores)), "--overwrite", "--engine", "transformers"]
    if store.layers:
        flags += ["--layers", LAYERS[store.layers]]
    if store.special == "other":
        learnt = Store(f"{store.codec}@others")
        dump(args, learnt, "other.jsonl")
        flags += ["--calibration", str(learnt.path(args.stores) / "calibration.safetensors")]
    if args.device == "cpu":
        flags += ["--device", "cpu"]
    began = time.monotonic()
    with open(args.stores / f"{store.name}.txt", "w") as log:
        subprocess.run(
            [sys.executable, "-c", DUMP, str(store.times), *flags],
            stdout=log,
            stderr=subprocess.STDOUT,
            check=True,
        )
    say("dumped", store.name, f"in {time.monotonic() - began:.1f} s")


def dumps(args: argparse.Namespace, stores: Iterable[Store]) -> None:
    """Dump ``stores``, some at once; one that fails leaves the others be, and fails the run at the
    end.
    """
    drawn(args)
    failed = []

    def one(store: Store) -> None:
        try:
            dump(args, store)
        except subprocess.CalledProcessError:
            failed.append(store.name)
            say("FAILED", store.name, (args.stores / f"{store.name}.txt").read_text()[-600:])

    with ThreadPoolExecutor(args.at_once) as pool:
        list(pool.map(one, stores))
    if failed:
        raise SystemExit(f"dumps failed: {', '.join(failed)}")


# -- reading ---------------------------------------------------------------------------------------


def corpus_of(cache: Cache, model: str, val: float) -> Corpus:
    samples = [cache.tokens(i) for i in range(len(cache))]
    mask = cache.manifest.target.mask_token_id
    config = load_target(model).config
    corpus = Corpus(samples, len(samples), config, tuple(cache.manifest.layers), mask)
    corpus.train, corpus.held_out = split(corpus.keys, val)
    return corpus


class Reader:
    """Stores of one corpus, decoded into one pair of buffers on the device."""

    def __init__(self, args: argparse.Namespace, corpus: Corpus) -> None:
        self.args, self.corpus, self.held = args, corpus, ""
        self.device = torch.device(args.device)
        self.aux = self.last = torch.empty(0)

    def all_of(self, store: Store) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``aux`` [T + 1, L, H], a row of padding at the end, and ``last`` [M, H]."""
        if self.held == store.name:
            return self.aux, self.last
        cache, began = dspark.cache.open(store.path(self.args.stores)), time.monotonic()
        hidden, self.held = cache.manifest.target.hidden_size, store.name
        shape = int(self.corpus.start[-1]) + 1, len(cache.manifest.layers), hidden
        if self.aux.shape != shape:
            self.aux = self.last = torch.empty(0)
            self.aux = torch.zeros(shape, dtype=torch.bfloat16, device=self.device)
            ends = int(self.corpus.last_start[-1])
            self.last = torch.zeros(ends, hidden, dtype=torch.bfloat16, device=self.device)
        for samples, aux, last in decoded(cache, self.corpus, range(cache.parts), self.device):
            a, b = samples.start, samples.stop
            self.aux[self.corpus.start[a] : self.corpus.start[b]] = aux
            self.last[self.corpus.last_start[a] : self.corpus.last_start[b]] = last
        say(store.name, f"read and decoded in {time.monotonic() - began:.1f} s")
        return self.aux, self.last

    def held_out(self, store: Store) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the states of the held-out samples alone, in order, and a row of padding."""
        cache = dspark.cache.open(store.path(self.args.stores))
        wanted = [int(i) for i in self.corpus.held_out]
        samples = [cache.read(i) for i in wanted]
        hidden = cache.manifest.target.hidden_size
        found = [
            cache.codec.decode(
                {n: torch.from_numpy(x) for n, x in s.states.items()}, hidden, None, torch.bfloat16
            )
            for s in samples
        ]
        aux = torch.cat([a for a, _ in found] + [torch.zeros_like(found[0][0][:1])])
        return aux.to(self.device), torch.cat([b for _, b in found]).to(self.device)


@torch.no_grad()
def decoded(
    cache: Cache, corpus: Corpus, parts: Iterable[int], device: torch.device
) -> Iterator[tuple[range, torch.Tensor, torch.Tensor]]:
    """Yield each part's samples and their states; chunks are read once, arrays in parallel."""
    hidden, embedding = cache.manifest.target.hidden_size, None
    if cache.codec.needs_tokens:
        embedding = cache.embedding_on(device)
    first = cache.index["part_first_sample"].tolist()
    with ThreadPoolExecutor(6) as pool:
        ahead = [pool.submit(codes_of, cache, part) for part in parts]
        for part, job in zip(parts, ahead, strict=True):
            samples = range(first[part], first[part + 1])
            codes = {n: torch.from_numpy(x).to(device) for n, x in job.result().items()}
            tokens = None
            if embedding is not None:
                tokens = tokens_of([corpus.samples[i] for i in samples], embedding)
            yield samples, *cache.codec.decode(codes, hidden, tokens, torch.bfloat16)


def codes_of(cache: Cache, part: int) -> dict[str, Any]:
    """Return the coded states of a part, as ``join_states`` would join them."""
    own, whole = Cache(cache.path, cache.manifest), slice(0, None)
    names = [n for n, s in own.layout.specs.items() if s.axis != "exact"]
    out = {n: own._read(part, n, whole) for n in names}
    if own.layout.exact:
        starts = own.index["sample_start"]
        first = own.index["part_first_sample"][part : part + 2]
        begin = starts[first[0] : first[1]] - starts[first[0]]
        counts = np.diff(own._read(part, EXACT_START, whole))
        position = own._read(part, EXACT_POSITION, whole).astype(np.int64)
        out[EXACT_TOKEN] = position + np.repeat(begin, counts)
        rows = own._read(part, EXACT_ROW, whole)
        out |= {n: own._read(part, n, whole)[rows] for n in own.layout.exact}
    return out


def judged_apart(trainer: Trainer, corpus: Corpus) -> None:
    """Make the held-out batches index the held-out samples' states alone."""
    token = torch.full((int(corpus.start[-1]) + 1,), -1, dtype=torch.int64)
    last = torch.full((int(corpus.last_start[-1]),), -1, dtype=torch.int64)
    for of, at in ((token, corpus.start), (last, corpus.last_start)):
        rows = np.concatenate([np.arange(at[i], at[i + 1]) for i in corpus.held_out])
        of[torch.from_numpy(rows)] = torch.arange(len(rows))
    token[-1] = int(token.max()) + 1
    token, last = token.to(trainer.device), last.to(trainer.device)
    trainer.val = [(batch, token[t], last[m]) for batch, t, m in trainer.val]


def size_of(path: Path, tokens: int) -> dict[str, Any]:
    """Bytes per token of all files but the target's, the calibration file apart."""
    files = [p for p in path.rglob("*") if p.is_file()]
    kept = sum(p.stat().st_size for p in files if "target" not in p.relative_to(path).parts)
    learnt = path / "calibration.safetensors"
    calibration = learnt.stat().st_size if learnt.exists() else 0
    return {"bytes_per_token": (kept - calibration) / tokens, "calibration_bytes": calibration}


# -- training --------------------------------------------------------------------------------------


class Work:
    """What this process trains: one draft per number of layers, compiled once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.runs: list[dict[str, Any]] = []
        self.trainers: dict[int | None, tuple[Trainer, Corpus]] = {}
        self.batches: dict[int, Batches] = {}
        self.readers: dict[int | None, Reader] = {}
        self.longest = 0.0

    def trainer(self, store: Store) -> tuple[Trainer, Corpus, Reader]:
        """Return the draft, corpus and reader for a store's layers."""
        at = store.layers
        if at not in self.trainers:
            cache = dspark.cache.open(store.judge.path(self.args.stores))
            corpus = corpus_of(cache, self.args.model, self.args.val)
            self.readers.clear()  # one pair of buffers
            reader = Reader(self.args, corpus)
            frozen = cache.target
            trainer = Trainer(
                self.args, corpus, States(*reader.held_out(store.judge), frozen), frozen
            )
            judged_apart(trainer, corpus)
            self.trainers = {at: (trainer, corpus)}
            self.readers[at] = reader
        return *self.trainers[at], self.readers[at]

    def of(self, store: Store, seeds: list[int]) -> None:
        """Train ``seeds`` on a store that is complete."""
        trainer, corpus, reader = self.trainer(store)
        for i in range(0, len(corpus.samples), max(1, len(corpus.samples) // 16)):
            own = dspark.cache.open(store.path(self.args.stores)).tokens(i)
            assert np.array_equal(own.input_ids, corpus.samples[i].input_ids)
        size = size_of(store.path(self.args.stores), corpus.tokens)
        for seed in seeds:
            if time.monotonic() - STARTED + self.longest > self.args.seconds:
                say("no time for", store.name, seed)
                continue
            began = time.monotonic()
            aux, last = reader.all_of(store)
            trainer.batches = self.batches.get(seed)
            run = {"codec": store.name, "seed": seed, "tokens": corpus.tokens, **size}
            run |= trainer.run(seed, aux, last)
            assert trainer.batches is not None
            self.batches[seed] = trainer.batches
            self.runs.append(run)
            self.longest = time.monotonic() - began if len(self.runs) > 1 else 0.0
            say(store.name, "seed", seed, "tau", f"{run['tau']:.4f}", f"{run['seconds']:.1f} s")
            keep(self.args, corpus, self.runs, f"klt_stores.{self.args.name}")
            if store.name in self.args.keep and seed in seeds[: self.args.keep_seeds]:
                save_draft(self.args.out / "drafts" / f"{store.name}-{seed}", trainer.model)


def keep(
    args: argparse.Namespace, corpus: Corpus | None, runs: list[dict[str, Any]], name: str
) -> None:
    config = {
        k: getattr(v, "pattern", v if isinstance(v, int | float) else str(v))
        for k, v in vars(args).items()
        if k not in ("model", "data", "out", "stores", "before")
    }
    raw = 0
    if corpus is not None:
        raw = 6 + 2 * corpus.config["hidden_size"] * (len(corpus.layers) + 1)
    for run in runs:
        run.setdefault("raw", raw)
    write(name, config, {"table": tables(runs), "runs": runs}, args.out, show=False)


def tables(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``codec_klt.table`` of each number of layers, whose raw bytes differ."""
    by_raw = defaultdict(list)
    for run in sorted(runs, key=lambda r: (r["codec"], r["seed"])):
        by_raw[run["raw"]].append(run | {"codec": run["codec"].replace("exact@", "exact ")})
    return [
        row | {"raw": raw}
        for raw, some in by_raw.items()
        for row in table(
            [r | {"codec": "exact"} if r["codec"].startswith("exact ") else r for r in some], raw
        )
    ]


def done_runs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the trainings of all processes, and those of ``--before``."""
    files = [*([args.before] if args.before else []), *sorted(args.out.glob("klt_stores.*.json"))]
    return [r for f in files for r in json.loads(f.read_text())["results"]["runs"]]


def train(args: argparse.Namespace, stores: list[Store]) -> None:
    """Take codecs that nobody has taken, as their stores become complete."""
    claims = args.out / "claims"
    claims.mkdir(parents=True, exist_ok=True)
    work, left = Work(args), list(stores)
    path = args.out / f"klt_stores.{args.name}.json"
    if path.exists():
        work.runs = json.loads(path.read_text())["results"]["runs"]
    while left and time.monotonic() - STARTED < args.seconds:
        for store in left:
            if store.ready(args.stores) and store.judge.ready(args.stores):
                break
        else:
            time.sleep(0.5)
            continue
        left.remove(store)
        have = {(r["codec"], r["seed"]) for r in done_runs(args)}
        asked = list(map(int, args.seeds.split(",")))[: store.most]
        seeds = [s for s in asked if (store.name, s) not in have]
        try:
            os.close(os.open(claims / f"{store.name}.{args.claim}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        work.of(store, seeds)
    if left:
        say("not taken:", *(s.name for s in left))


def merge(args: argparse.Namespace) -> None:
    runs = done_runs(args)
    keep(args, None, runs, "klt_stores")
    for row in tables(runs):
        print("TABLE", json.dumps(row), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--stores", type=Path)
    parser.add_argument("--codecs", default="exact,klt-1-1,klt-0.8-1,klt-0.7-1,rotated-4-4")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dump", action="store_true")
    what.add_argument("--merge", action="store_true")
    parser.add_argument("--before", type=Path, help="results whose trainings are not repeated")
    parser.add_argument("--at-once", type=int, default=4, help="dumps at a time")
    parser.add_argument("--name", default="a", help="of this process; its results bear it")
    parser.add_argument("--claim", default="0", help="a new one takes codecs again that were taken")
    parser.add_argument("--rows", type=int, default=9000)
    parser.add_argument("--only", type=re.compile, default=None, help="rows whose line matches")
    parser.add_argument("--other", type=re.compile, default=None)
    parser.add_argument("--other-rows", type=int, default=2500)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--schedule", default="wsd")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--keep", default="", type=lambda s: s.split(","))
    parser.add_argument("--keep-seeds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=450.0)
    parser.add_argument("--tiny", action="store_true", help="a dry run on a CPU")
    args = parser.parse_args()
    wide = {
        "seq": 16384,
        "anchors": 2048,
        "block": 7,
        "draft_layers": 3,
        "rank": 256,
        "lr": 2e-3,
        "val": 0.08,
    }
    small = {
        "seq": 1024,
        "anchors": 48,
        "block": 4,
        "draft_layers": 1,
        "rank": 16,
        "steps": 3,
        "val": 0.03,
    }
    vars(args).update(wide | (small if args.tiny else {}))
    args.device = "cuda" if torch.cuda.is_available() and not args.tiny else "cpu"
    return args


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    stores = [Store.of(text) for text in args.codecs.split(",")]
    if args.merge:
        merge(args)
    elif args.dump:
        dumps(args, stores)
    else:
        train(args, stores)


if __name__ == "__main__":
    main()
