"""Bytes against tau for codecs of a whole store, many paired trainings in one process and one
compiled draft.

    python bench/codec_klt.py --model DIR --data train.jsonl.gz --out DIR [--rows 9000]
        [--steps 1200] [--seeds 0,1,2,3,4]
        [--codecs exact,rotated-4-4,rotated-2-4,klt-1-1,klt-0.7-1,klt-0.5-1] [--seconds 560] [--only
        REGEX] [--other REGEX] [--tiny]

The target's states are made once and kept in the GPU's memory. Every codec codes them as a dump
would, what it stores is packed into chunks as a part would hold it (a run of ``--part-tokens``
tokens), and drafts train on what it decodes, in the product's order, with its objective and its
Muon. Drafts of one seed have the same initial weights, batches and anchors. Tau is judged on the
exact states of held-out prompts, at every anchor, and the change against ``exact`` is paired by
seed.

``klt-A-B``: A bits for a value of the aux layers, B for one of the last state. ``--only``: rows of
the corpus whose line matches.
A codec's name with ``@other`` behind it is calibrated on ``--other-rows`` rows whose line matches
``--other`` and that are not coded. Results are written to OUT/codec_klt.json after every training;
trainings that are there already are not repeated, so a run that ``--seconds`` cut short goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import queue
import re
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from codec_klt_states import Corpus, capture, read_corpus
from torch import Tensor

from common import PUBLISHED_LOSS, write
from dspark.cache.codec.base import EXACT_TOKEN, ArraySpec, tokens_of
from dspark.cache.codec.klt.codec import FAMILY as KLT
from dspark.cache.codec.klt.fit import fit
from dspark.cache.codec.registry import make
from dspark.cache.files.layout import state_array
from dspark.cache.parts.chunks import chunk_rows, compressor
from dspark.cache.target.frozen import FrozenTarget
from dspark.cache.target.logits import PLAIN
from dspark.train.data import anchors as rules
from dspark.train.data.batch import Batch
from dspark.train.data.stream import pack, rng, split
from dspark.train.draft.config import DraftConfig
from dspark.train.draft.model import DraftModel
from dspark.train.objective.config import ObjectiveConfig
from dspark.train.objective.metrics import SlotMetrics
from dspark.train.objective.objective import objective
from dspark.train.objective.slots import Denominators, SlotInputs
from dspark.train.optim.base import AdamSettings, Snapshot, learning_rate
from dspark.train.optim.muon import MasterMuon

STARTED = time.monotonic()
META = 1.5  # bytes per token of ids, mask and a part's records (layout.token_bytes)
DECAY = 4.0
LOSS = ObjectiveConfig.from_json(PUBLISHED_LOSS)  # as every table of it so far


def say(*words: object) -> None:
    print(f"[{time.monotonic() - STARTED:6.1f} s]", *words, flush=True)


class States(NamedTuple):
    """All of the corpus on the device: ``aux`` [T + 1, L, H] (the last row is padding), ``last``
    [M, H], ``frozen`` weights.
    """

    aux: Tensor
    last: Tensor
    frozen: FrozenTarget


def chunk_bytes(name: str, codes: np.ndarray[Any, Any], spec: ArraySpec) -> int:
    """Bytes of an array of a part: its chunks as the store compresses them, each with its checksum
    and index entry.

    Rows that are stored exactly count once where they are equal.
    """
    if spec.axis == "exact":
        codes = np.unique(codes.reshape(len(codes), -1), axis=0).reshape(-1, *codes.shape[1:])
    if not codes.shape[0]:
        return 0
    stored = state_array(name, codes.shape, spec)
    packer, rows = compressor(stored), chunk_rows(stored)
    total = 0
    for at in range(0, codes.shape[0], rows):
        piece = codes[at : at + rows]
        if spec.order == "columns":
            piece = piece.reshape(len(piece), -1).T
        piece = np.ascontiguousarray(piece)
        packed = (
            packer.encode(piece if stored.shuffle else piece.view(np.uint8))
            if packer
            else piece.data
        )
        total += memoryview(packed).nbytes + 20
    return total


class Coder:
    """Codes all states with one codec after the other into one pair of buffers."""

    def __init__(self, args: argparse.Namespace, corpus: Corpus, states: States) -> None:
        self.args, self.corpus, self.states = args, corpus, states
        self.aux, self.last = torch.zeros_like(states.aux), torch.zeros_like(states.last)
        self.held = ""
        self.codecs: dict[str, Any] = {}
        self.known: dict[str, dict[str, Any]] = {}

    def use(self, name: str) -> dict[str, Any]:
        """Fill the buffers with what codec ``name`` decodes to; its bytes and errors."""
        if self.held != name:
            if name == "exact":
                self.aux.copy_(self.states.aux)
                self.last.copy_(self.states.last)
                found: dict[str, Any] = {"bytes_per_token": 0.0, "calibration_bytes": 0}
            else:
                found = self.code(name)
            self.held = name
            if name not in self.known:
                self.known[name] = found | (self.errors() if name != "exact" else {})
                say(name, json.dumps(self.known[name]))
        return self.known[name]

    def calibrated(self, name: str) -> Any:
        """Codec ``name``, after it has seen samples spread over the training rows (or the other
        rows).
        """
        name, _, other = name.partition("@")
        allowed = (
            np.arange(self.corpus.main, len(self.corpus.samples)) if other else self.corpus.train
        )
        mean = float(np.mean(self.corpus.lengths[allowed]))
        budget = self.args.calibrate if name.startswith("klt") else 16384
        count = min(len(allowed), math.ceil(budget / mean))
        some = [int(allowed[(2 * i + 1) * len(allowed) // (2 * count)]) for i in range(count)]
        start, last, device = self.corpus.start, self.corpus.last_start, self.aux.device
        rows, lasts = (
            torch.from_numpy(np.concatenate([np.arange(at[i], at[i + 1]) for i in some])).to(device)
            for at in (start, last)
        )
        frozen = self.states.frozen
        tokens = tokens_of([self.corpus.samples[i] for i in some], frozen.embed_tokens)
        tokens = dataclasses.replace(tokens, head=frozen.lm_head)
        aux, last_states = self.states.aux[rows], self.states.last[lasts]
        if name.startswith("klt"):
            codec = KLT.make(name, "zstd")
            tables = fit(
                aux,
                last_states,
                tokens,
                aux_bits=codec.aux_bits,
                last_bits=codec.last_bits,
                say=say,
            )
            return codec.with_tables(tables)
        return make(name).calibrated(aux, last_states, tokens)

    def parts(self) -> Iterator[tuple[int, int]]:
        """Runs of whole samples of about ``--part-tokens``: first and past-last sample."""
        first, start, n = 0, self.corpus.start, self.corpus.main
        while first < n:
            end = first + 1
            while end < n and start[end + 1] - start[first] <= self.args.part_tokens:
                end += 1
            yield first, end
            first = end

    @torch.no_grad()
    def code(self, name: str) -> dict[str, Any]:
        """Code and decode every part; bytes are counted in threads beside it."""
        began = time.monotonic()
        if name not in self.codecs:
            self.codecs[name] = self.calibrated(name)
        codec, found = self.codecs[name], {"fit_seconds": time.monotonic() - began}
        layers, hidden = self.states.aux.shape[1:]
        specs, start, last = codec.arrays(layers, hidden), self.corpus.start, self.corpus.last_start
        began, jobs, exact = time.monotonic(), [], 0
        counting = name not in self.known
        with ThreadPoolExecutor(12) as pool:
            for first, end in self.parts():
                rows, lasts = slice(start[first], start[end]), slice(last[first], last[end])
                tokens = tokens_of(self.corpus.samples[first:end], self.states.frozen.embed_tokens)
                coded = codec.encode(self.states.aux[rows], self.states.last[lasts], tokens)
                self.aux[rows], self.last[lasts] = codec.decode(
                    coded, hidden, tokens, self.aux.dtype
                )
                if counting:
                    exact += coded[EXACT_TOKEN].shape[0] if EXACT_TOKEN in coded else 0
                    jobs += [
                        pool.submit(chunk_bytes, n, coded[n].cpu().numpy(), s)
                        for n, s in specs.items()
                    ]
        found["code_seconds"] = time.monotonic() - began
        sizes = dict.fromkeys(specs, 0)
        for i, job in enumerate(jobs):
            sizes[list(specs)[i % len(specs)]] += job.result()
        found["arrays"] = {n: round(size / self.corpus.tokens, 2) for n, size in sizes.items()}
        found["bytes_per_token"] = sum(sizes.values()) / self.corpus.tokens + META
        found["calibration_bytes"] = sum(t.nbytes for t in codec.calibration().values())
        if exact:
            found |= {
                "exact": exact,
                "kept": codec.tables.aux.kept,
                "columns": codec.tables.aux.packing.columns,
            }
        return found

    @torch.no_grad()
    def errors(self) -> dict[str, Any]:
        """SNR of each layer against its own variance, in dB, and total variation of the target's
        distribution.
        """
        some = torch.arange(
            0, self.corpus.tokens, max(1, self.corpus.tokens // 65536), device=self.aux.device
        )
        x, y = self.states.aux[some].float(), self.aux[some].float()
        norms = x.norm(dim=2)
        ordinary = (norms < 10 * norms.median(0).values).all(1)
        x, y = x[ordinary], y[ordinary]
        variance = (x - x.mean(0)).square().mean(0).clamp(min=1e-12)
        ratio = ((x - y).square().mean(0) / variance).mean(1)
        ends = int(self.corpus.last_start[self.corpus.main])
        rows = torch.arange(0, ends, max(1, ends // 2048), device=self.aux.device)
        head = self.states.frozen.lm_head.float()
        p, q = (s[rows].float() @ head.T for s in (self.states.last, self.last))
        return {
            "aux_db": [round(-10 * math.log10(max(float(r), 1e-12)), 2) for r in ratio],
            "tv": float((p.softmax(1) - q.softmax(1)).abs().sum(1).mean() / 2),
        }  # fmt: skip


class Batches:
    """The rows of one seed in the product's order, made by a thread and kept on the device for the
    next codec.
    """

    def __init__(
        self, args: argparse.Namespace, corpus: Corpus, device: torch.device, seed: int
    ) -> None:
        self.args, self.corpus, self.device, self.seed = args, corpus, device, seed
        self.made: list[tuple[Batch, Tensor, Tensor, Denominators]] = []
        self.coming: queue.Queue[tuple[Batch, Tensor, Tensor, Denominators]] = queue.Queue(24)
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        stream = torch.cuda.Stream() if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        for row, _ in zip(self._rows(), range(self.args.steps), strict=False):
            batch, tokens, lasts = row
            weights = Denominators.of(batch, DECAY)
            with torch.cuda.stream(stream):
                moved = (
                    batch.to(self.device),
                    tokens.to(self.device),
                    lasts.to(self.device),
                    weights,
                )
            if stream is not None:
                stream.synchronize()
            self.coming.put(moved)

    def _rows(self) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        epoch = 0
        while True:
            order = rng(self.seed, 1, epoch).permutation(self.corpus.train)
            for members in pack(order, self.corpus.lengths, self.args.seq):
                draws = [
                    rng(self.seed, 2, epoch, s).random(self.corpus.lengths[s]) for s in members
                ]
                yield built(self.args, self.corpus, members, np.concatenate(draws))
            epoch += 1

    def __getitem__(self, step: int) -> tuple[Batch, Tensor, Tensor, Denominators]:
        while len(self.made) <= step:
            self.made.append(self.coming.get())
        return self.made[step]


def built(
    args: argparse.Namespace,
    corpus: Corpus,
    members: list[int],
    priority: np.ndarray[Any, Any],
    chosen: rules.Int64 | None = None,
) -> tuple[Batch, Tensor, Tensor]:
    """A batch without states, the token of each position (the padding row at the end) and the last
    states of all documents.
    """
    size, used = args.seq, int(corpus.lengths[members].sum())
    ids, mask, doc = np.zeros(size, np.int64), np.zeros(size, np.bool_), np.full(size, -1, np.int32)
    ids[:used] = np.concatenate([corpus.samples[i].input_ids for i in members])
    mask[:used] = np.concatenate([corpus.samples[i].loss_mask for i in members])
    doc[:used] = np.repeat(np.arange(len(members), dtype=np.int32), corpus.lengths[members])
    tokens = np.full(size, corpus.start[-1], np.int64)
    tokens[:used] = np.concatenate(
        [np.arange(corpus.start[i], corpus.start[i + 1]) for i in members]
    )
    lasts = np.concatenate(
        [np.arange(corpus.last_start[i], corpus.last_start[i + 1]) for i in members]
    )
    if chosen is None:
        whole = np.zeros(size)
        whole[:used] = priority
        chosen = rules.choose(rules.eligible(mask, doc), whole, args.anchors)
    batch = Batch.build(
        input_ids=ids,
        loss_mask=mask,
        doc=doc,
        aux=torch.empty(size, 0),
        last=torch.empty(len(lasts), 0),
        anchors=chosen,
        block_size=args.block,
        pad_anchors_to=args.anchors,
    )
    return batch, torch.from_numpy(tokens), torch.from_numpy(lasts)


def held_out(
    args: argparse.Namespace, corpus: Corpus, device: torch.device
) -> list[tuple[Batch, Tensor, Tensor]]:
    """Batches that between them have every anchor of the held-out samples once."""
    out = []
    for members in pack(corpus.held_out, corpus.lengths, args.seq):
        probe = built(args, corpus, members, np.zeros(0), np.zeros(0, np.int64))[0]
        where = np.flatnonzero(rules.eligible(probe.loss_mask.numpy(), probe.doc.numpy())).astype(
            np.int64
        )
        parts = -(-len(where) // args.anchors)
        for k in range(parts):
            found = built(args, corpus, members, np.zeros(0), where[k::parts])
            out.append(tuple(x.to(device) for x in found))
    return out  # type: ignore[return-value]


class Trainer:
    """One compiled draft, begun again for every run."""

    def __init__(
        self, args: argparse.Namespace, corpus: Corpus, exact: States, frozen: FrozenTarget
    ) -> None:
        self.args, self.corpus, self.exact, self.frozen = args, corpus, exact, frozen
        self.device = exact.aux.device
        self.cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.config = DraftConfig.sized_for(
            corpus.config, target_layer_ids=corpus.layers, mask_token_id=corpus.mask_token_id,
            num_layers=args.draft_layers, block_size=args.block, markov_rank=args.rank,
        )  # fmt: skip
        self.host = dataclasses.replace(
            frozen,
            embed_tokens=frozen.embed_tokens.cpu(),
            lm_head=frozen.lm_head.cpu(),
            logits=PLAIN,
        )
        if frozen.tied:
            self.host = dataclasses.replace(self.host, lm_head=self.host.embed_tokens)
        self.model = self._fresh(0).to(device=self.device, dtype=self.dtype)
        if self.cuda:
            self.model.compile(dynamic=False)
        settings = AdamSettings(betas=(0.9, 0.95), weight_decay=0.0, clip=1.0)
        self.optimizer = MasterMuon(self.model.trained(), settings)
        self.empty = self.optimizer.snapshot().moments
        self.batches: Batches | None = None
        self.val = held_out(args, corpus, self.device)

    def _fresh(self, seed: int) -> DraftModel:
        torch.manual_seed(seed)
        return DraftModel(self.config, self.host, frozen_dtype=self.dtype)

    def _placed(self, row: tuple[Batch, Tensor, Tensor], aux: Tensor, last: Tensor) -> Batch:
        batch, tokens, lasts = row
        return dataclasses.replace(
            batch, aux=aux[tokens].to(self.dtype), last=last[lasts].to(self.dtype)
        )

    def run(self, seed: int, aux: Tensor, last: Tensor) -> dict[str, Any]:
        """Train from seed ``seed`` on ``aux`` [T + 1, L, H] and ``last`` [M, H], score on the exact
        states.
        """
        began = time.monotonic()
        if self.batches is None or self.batches.seed != seed:
            self.batches = None
            self.batches = Batches(self.args, self.corpus, self.device, seed)
        first = {name: p.detach().float().clone() for name, p in self._fresh(seed).trained()}
        self.optimizer.load(Snapshot(first, self.empty, 0))
        backend, args, loss = "flex" if self.cuda else "sdpa", self.args, torch.zeros(())
        for step in range(args.steps):
            batch, tokens, lasts, weights = self.batches[step]
            batch = self._placed((batch, tokens, lasts), aux, last)
            self.optimizer.last_row()
            slots = SlotInputs.gather(
                batch, self.model(batch, self.model.plan(batch, backend)), DECAY
            )
            out = objective(slots, self.model.frozen_head, LOSS, weights)
            out.loss.backward()  # type: ignore[no-untyped-call]
            rate = learning_rate(step, args.steps, args.lr, 0.04, 0.0, args.schedule)
            self.optimizer.step(rate)
            loss = out.loss.detach()
        final, train_seconds = float(loss), time.monotonic() - began
        score = self._score(backend)
        return {
            "tau": score["mean_accepted_length"],
            "accept_rate": score["accept_rate"],
            "l1": score["l1_loss"],
            "loss": final,
            "train_seconds": train_seconds,
            "seconds": time.monotonic() - began,
        }

    @torch.no_grad()
    def _score(self, backend: Any) -> Any:
        metrics = SlotMetrics(self.args.block, self.device)
        one = Denominators(1.0, 1.0, 1.0)
        for row in self.val:
            batch = self._placed(row, self.exact.aux, self.exact.last)
            slots = SlotInputs.gather(
                batch, self.model(batch, self.model.plan(batch, backend)), DECAY
            )
            metrics.add(
                batch, slots, objective(slots, self.model.frozen_head, ObjectiveConfig(), one)
            )
        return metrics.result()


def table(runs: list[dict[str, Any]], raw: int) -> list[dict[str, Any]]:
    """Of each codec: bytes, ratio to ``raw`` bytes per token, tau and its change against ``exact``,
    paired by seed.
    """
    exact = {r["seed"]: r["tau"] for r in runs if r["codec"] == "exact"}
    out = []
    for name in dict.fromkeys(r["codec"] for r in runs):
        mine = [r for r in runs if r["codec"] == name]
        pairs = [r["tau"] / exact[r["seed"]] - 1 for r in mine if r["seed"] in exact]
        size = mine[-1]["bytes_per_token"] + mine[-1]["calibration_bytes"] / mine[-1]["tokens"]
        out.append(
            {
                "codec": name,
                "tau": [round(r["tau"], 4) for r in mine],
                "seeds": [r["seed"] for r in mine],
                "change": statistics.mean(pairs) if pairs else None,
                "standard_error": statistics.stdev(pairs) / math.sqrt(len(pairs))
                if len(pairs) > 1
                else None,
                "bytes_per_token_all": size,
                "ratio": raw / size if size > META else 1.0,
            }
        )
    return out


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument(
        "--before",
        type=Path,
        help="a codec_klt.json whose trainings are not repeated (default: OUT's)",
    )
    parser.add_argument("--rows", type=int, default=9000)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--schedule", default="wsd", help="of the learning rate")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument(
        "--codecs", default="exact,klt-1-1,klt-0.7-1,rotated-4-4,klt-0.5-1,rotated-2-4"
    )
    parser.add_argument("--seconds", type=float, default=560.0)
    parser.add_argument("--only", type=re.compile, default=None)
    parser.add_argument("--other", type=re.compile, default=None)
    parser.add_argument("--other-rows", type=int, default=2500)
    parser.add_argument("--calibrate", type=int, default=65536, help="tokens")
    parser.add_argument("--part-tokens", type=int, default=1 << 16)
    parser.add_argument("--max-len", type=int, default=1024)
    parser.add_argument(
        "--layers", default="", help="output layers, comma separated; empty: the product's choice"
    )
    parser.add_argument("--tiny", action="store_true", help="a dry run on a CPU")
    args = parser.parse_args()
    args.seq, args.anchors, args.block, args.draft_layers, args.rank, args.lr, args.val = (
        16384,
        2048,
        7,
        3,
        256,
        2e-3,
        0.08,
    )
    args.device = "cuda" if torch.cuda.is_available() and not args.tiny else "cpu"
    if args.tiny:
        args.other_rows = 12
        args.rows, args.steps, args.seq, args.anchors, args.block, args.draft_layers, args.rank = (
            40,
            3,
            1024,
            48,
            4,
            1,
            16,
        )
        args.max_len, args.val, args.calibrate, args.seeds, args.part_tokens = (
            256,
            0.2,
            3000,
            "0,1",
            4096,
        )
    return args


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    before = args.before or args.out / "codec_klt.json"
    runs: list[dict[str, Any]] = (
        json.loads(before.read_text())["results"]["runs"] if before.exists() else []
    )
    corpus = read_corpus(args)
    train, val = split(corpus.keys[: corpus.main], args.val)
    corpus.train, corpus.held_out = train, val
    say(
        f"{corpus.main} samples, {corpus.tokens} tokens, {len(val)} samples held out; "
        f"{len(corpus.samples) - corpus.main} other samples"
    )
    aux, last, frozen = capture(args, corpus)
    states = States(aux, last, frozen)
    say(
        f"states: {aux.nbytes / 1e9:.1f} GB of aux layers, {last.nbytes / 1e9:.1f} GB of last "
        "states"
    )
    coder, trainer = Coder(args, corpus, states), Trainer(args, corpus, states, frozen)
    raw = 6 + 2 * last.shape[1] * (len(corpus.layers) + 1)
    config = {
        k: getattr(v, "pattern", v if isinstance(v, int | float | str) else str(v))
        for k, v in vars(args).items()
        if k not in ("model", "data", "out", "before")
    }
    longest, compiled = 0.0, False
    for seed in map(int, args.seeds.split(",")):
        for name in args.codecs.split(","):
            if any((r["codec"], r["seed"]) == (name, seed) for r in runs):
                continue
            if time.monotonic() - STARTED + longest > args.seconds:
                say("no time for", name, seed)
                continue
            began = time.monotonic()
            found = coder.use(name)
            run = {
                "codec": name,
                "seed": seed,
                "tokens": corpus.tokens,
                **found,
                **trainer.run(seed, coder.aux, coder.last),
            }
            runs.append(run)
            say(
                name,
                "seed",
                seed,
                "tau",
                round(run["tau"], 4),
                f"loss {run['loss']:.4f}, {run['train_seconds']:.1f} s",
            )
            if compiled:
                longest = max(longest, time.monotonic() - began)
            compiled = True
            write(
                "codec_klt",
                config,
                {"raw_bytes_per_token": raw, "table": table(runs, raw), "runs": runs},
                args.out,
                show=False,
            )
    for row in table(runs, raw):
        print("TABLE", json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
