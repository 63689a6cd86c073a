"""Bytes against tau for codecs of a whole store, many paired trainings in one process and one compiled draft.

    python bench/codec_klt.py --model DIR --data train.jsonl.gz --out DIR [--rows 9000] [--steps 1200] [--seeds 0,1,2,3,4]
        [--codecs exact,rotated-4-4,rotated-2-4,klt-1.0-1.0,klt-0.7-1.0,klt-0.5-1.0] [--seconds 560] [--only REGEX] [--fit-on REGEX] [--tiny]

The target's states are made once and kept in the GPU's memory. Every codec codes them as a dump would, what it stores is packed into
chunks as a part would hold it (a run of ``--part-tokens`` tokens), and drafts train on what it decodes, in the product's order, with
its objective and its Muon. Drafts of one seed have the same initial weights, batches and anchors. Tau is judged on the exact states of
held-out prompts, at every anchor, and the change against ``exact`` is paired by seed.

``klt-A-B``: A bits for a value of the aux layers, B for one of the last state. ``--only``: rows of the corpus whose line matches;
``--fit-on``: calibrate on rows whose line matches, though all are coded. Results are written to OUT/codec_klt.json after every
training; trainings that are there already are not repeated, so a run that ``--seconds`` cut short goes on where it stopped.
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

from common import write
from dspark.cache.codec.klt import Context, Klt
from dspark.cache.codec.klt_fit import Piece, fit
from dspark.cache.codec.rotated import Rotated, codec_for
from dspark.cache.target.frozen import FrozenTarget
from dspark.cache.target.logits import PLAIN
from dspark.train.data import anchors as rules
from dspark.train.data.batch import Batch
from dspark.train.data.stream import pack, rng, split
from dspark.train.draft.config import DraftConfig
from dspark.train.draft.model import DraftModel
from dspark.train.objective.metrics import SlotMetrics
from dspark.train.objective.objective import Denominators, ObjectiveConfig, SlotInputs, objective
from dspark.train.optim.base import AdamSettings, Snapshot, learning_rate
from dspark.train.optim.muon import MasterMuon

STARTED = time.monotonic()
CHUNK = 1024  # rows of a chunk of cells
ROTATED_CHUNK = 128
META = 1.5  # bytes per token of ids, mask and a part's records (layout.token_bytes)
DECAY = 4.0


def say(*words: object) -> None:
    print(f"[{time.monotonic() - STARTED:6.1f} s]", *words, flush=True)


class States(NamedTuple):
    """All of the corpus on the device: ``aux`` [T + 1, L, H] (the last row is padding), ``last`` [M, H], ``context``."""

    aux: Tensor
    last: Tensor
    context: Context

    @property
    def tokens(self) -> int:
        return self.aux.shape[0] - 1


def packed_bytes(arrays: list[tuple[np.ndarray[Any, Any], int, bool]]) -> int:
    """Bytes of ``(codes [n, W], rows of a chunk, column-major)`` after zstd, chunk by chunk, with checksum and index entry."""
    from numcodecs import Zstd

    total = 0
    for codes, rows, columns in arrays:
        for at in range(0, codes.shape[0], rows):
            piece = codes[at : at + rows]
            raw = np.ascontiguousarray(piece.T if columns else piece)
            total += len(Zstd(level=1).encode(raw)) + 20
    return total


class Sizes:
    """Counts bytes of parts in threads, beside what follows."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(12)
        self.jobs: list[Any] = []

    def add(self, arrays: list[tuple[np.ndarray[Any, Any], int, bool]]) -> None:
        self.jobs.append(self.pool.submit(packed_bytes, arrays))

    def total(self) -> int:
        return sum(job.result() for job in self.jobs)


class Coder:
    """Codes all states with one codec after the other into one pair of buffers."""

    def __init__(
        self, args: argparse.Namespace, corpus: Corpus, states: States, frozen: FrozenTarget
    ) -> None:
        self.args, self.corpus, self.states, self.frozen = args, corpus, states, frozen
        self.aux, self.last = torch.zeros_like(states.aux), torch.zeros_like(states.last)
        self.held = ""
        self.known: dict[str, dict[str, Any]] = {}
        self.fits: dict[str, Any] = {}

    def parts(self) -> Iterator[tuple[slice, slice, int, int]]:
        """Runs of whole samples of about ``--part-tokens``: their tokens, their last states, and first and past-last sample."""
        first = 0
        start, last = self.corpus.start, self.corpus.last_start
        n = len(self.corpus.lengths)
        while first < n:
            end = first + 1
            while end < n and start[end + 1] - start[first] <= self.args.part_tokens:
                end += 1
            yield slice(start[first], start[end]), slice(last[first], last[end]), first, end
            first = end

    def use(self, name: str) -> dict[str, Any]:
        """Fill the buffers with what ``name`` decodes to; its bytes and errors."""
        if self.held != name:
            if name == "exact":
                self.aux.copy_(self.states.aux)
                self.last.copy_(self.states.last)
                found = {"bytes_per_token": 0.0, "calibration_bytes": 0}
            elif name.startswith("rotated"):
                found = self.rotated(*map(int, name.split("-")[1:]))
            else:
                found = self.klt(*map(float, name.split("-")[1:]))
            self.held = name
            if name not in self.known:
                self.known[name] = found | (self.errors() if name != "exact" else {})
                say(name, json.dumps(self.known[name]))
        return self.known[name]

    def sample_rows(self) -> list[int]:
        """Samples to calibrate on: spread over the training rows that ``--fit-on`` lets in, about ``--calibrate`` tokens."""
        allowed = [i for i in self.corpus.train if self.corpus.fit_on[i]]
        mean = float(np.mean(self.corpus.lengths[allowed]))
        count = min(len(allowed), math.ceil(self.args.calibrate / mean))
        return [int(allowed[(2 * i + 1) * len(allowed) // (2 * count)]) for i in range(count)]

    def pieces(self) -> list[Piece]:
        """Calibration states in runs of samples, for few and large products."""
        out = []
        chosen = self.sample_rows()
        start, last = self.corpus.start, self.corpus.last_start
        run = max(1, min(16, len(chosen) // 8))
        for at in range(0, len(chosen), run):
            some = chosen[at : at + run]
            tokens = torch.from_numpy(np.concatenate([np.arange(start[i], start[i + 1]) for i in some]))
            lasts = torch.from_numpy(np.concatenate([np.arange(last[i], last[i + 1]) for i in some]))
            firsts = np.cumsum([0, *(self.corpus.lengths[i] for i in some)])[:-1]
            device = self.states.aux.device
            ids = self.states.context.ids[tokens.to(device)]
            moved = np.concatenate([self.corpus.last_at[i] + f for i, f in zip(some, firsts, strict=True)])
            context = Context.of(ids, torch.from_numpy(firsts).to(device), torch.from_numpy(moved).to(device))
            out.append(Piece(self.states.aux[tokens.to(device)], self.states.last[lasts.to(device)], context))
        return out

    def rotated(self, aux_bits: int, last_bits: int) -> dict[str, Any]:
        pieces = self.pieces()
        a = codec_for(aux_bits).calibrated(torch.cat([p.aux for p in pieces])[:16384])  # type: ignore[attr-defined]
        b = codec_for(last_bits).calibrated(torch.cat([p.last for p in pieces])[:8192])  # type: ignore[attr-defined]
        assert isinstance(a, Rotated)
        sizes, hidden = Sizes(), self.states.last.shape[1]
        for tokens, lasts, _, _ in self.parts():
            coded, behind = a.encode(self.states.aux[tokens]), b.encode(self.states.last[lasts])
            self.aux[tokens] = a.decode(coded, hidden).to(self.aux.dtype)
            self.last[lasts] = b.decode(behind, hidden).to(self.last.dtype)
            sizes.add(
                [
                    (t.flatten(1).cpu().numpy(), ROTATED_CHUNK, False)
                    for t in (*coded.values(), *behind.values())
                ]
            )
        return {"bytes_per_token": sizes.total() / self.states.tokens + META, "calibration_bytes": 0}

    def klt(self, aux_bits: float, last_bits: float) -> dict[str, Any]:
        began = time.monotonic()
        key = f"{aux_bits}/{last_bits}"
        if key not in self.fits:
            embed, head = self.frozen.embed_tokens, self.frozen.lm_head
            self.fits[key] = fit(self.pieces(), embed, head, aux_bits=aux_bits, last_bits=last_bits, say=say)
        tables = self.fits[key]
        found: dict[str, Any] = {"fit_seconds": time.monotonic() - began}
        klt = Klt(tables, self.frozen.embed_tokens)
        sizes, exact_aux, exact_last = Sizes(), 0, 0
        began = time.monotonic()
        ids = self.states.context.ids
        for tokens, lasts, first, end in self.parts():
            start = torch.from_numpy(self.corpus.start[first:end] - self.corpus.start[first]).to(ids.device)
            at = self.states.context.last_at[lasts] - tokens.start
            context = Context.of(ids[tokens], start, at)
            x, y = self.states.aux[tokens], self.states.last[lasts]
            code = klt.encode_aux(x, context)
            behind = klt.encode_last(y, code.code, context)
            back = klt.decode_aux(code.code, context, self.aux.dtype)
            back[code.exact] = x[code.exact]
            self.aux[tokens] = back
            after = klt.decode_last(behind.code, code.code, context, self.last.dtype)
            after[behind.exact] = y[behind.exact]
            self.last[lasts] = after
            arrays = [(c.cpu().numpy(), CHUNK, True) for c in (code.code, behind.code)]
            # A sample's first token has the same state wherever its id is the same: once in a part.
            mine = code.exact.cpu()
            firsts = torch.isin(mine, start.cpu())
            once = torch.unique(ids[tokens].cpu()[mine[firsts]], return_inverse=False).numel()
            kept = torch.cat([mine[~firsts], mine[firsts][:once]])
            arrays.append((x[kept.to(x.device)].flatten(1).view(torch.int16).cpu().numpy(), CHUNK, False))
            arrays.append((y[behind.exact].view(torch.int16).cpu().numpy(), CHUNK, False))
            exact_aux += len(mine)
            exact_last += len(behind.exact)
            sizes.add(arrays)
        found["code_seconds"] = time.monotonic() - began
        found["bytes_per_token"] = sizes.total() / self.states.tokens + META
        found["calibration_bytes"] = len(tables.to_bytes())
        found |= {
            "exact_aux": exact_aux,
            "exact_last": exact_last,
            "kept": tables.aux.kept,
            "columns": tables.aux.packing.columns,
        }
        return found

    @torch.no_grad()
    def errors(self) -> dict[str, Any]:
        """SNR of each layer against its own variance, in dB, and total variation of the target's distribution."""
        some = torch.arange(
            0, self.states.tokens, max(1, self.states.tokens // 65536), device=self.aux.device
        )
        x, y = self.states.aux[some].float(), self.aux[some].float()
        norms = x.norm(dim=2)
        ordinary = (norms < 10 * norms.median(0).values).all(1)
        x, y = x[ordinary], y[ordinary]
        variance = (x - x.mean(0)).square().mean(0).clamp(min=1e-12)
        ratio = ((x - y).square().mean(0) / variance).mean(1)
        rows = torch.arange(0, self.last.shape[0], max(1, self.last.shape[0] // 2048), device=self.aux.device)
        head = self.frozen.lm_head.float()
        p, q = (s[rows].float() @ head.T for s in (self.states.last, self.last))
        return {
            "aux_db": [round(-10 * math.log10(max(float(r), 1e-12)), 2) for r in ratio],
            "tv": float((p.softmax(1) - q.softmax(1)).abs().sum(1).mean() / 2),
        }  # fmt: skip


class Batches:
    """The rows of one seed in the product's order, made by a thread and kept on the device for the next codec."""

    def __init__(self, args: argparse.Namespace, corpus: Corpus, device: torch.device, seed: int) -> None:
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
                moved = (batch.to(self.device), tokens.to(self.device), lasts.to(self.device), weights)
            if stream is not None:
                stream.synchronize()
            self.coming.put(moved)

    def _rows(self) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        epoch = 0
        while True:
            order = rng(self.seed, 1, epoch).permutation(self.corpus.train)
            for members in pack(order, self.corpus.lengths, self.args.seq):
                draws = [rng(self.seed, 2, epoch, s).random(self.corpus.lengths[s]) for s in members]
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
    """A batch without states, the token of each position (the padding row at the end) and the last states of all documents."""
    size, used = args.seq, int(corpus.lengths[members].sum())
    ids, mask, doc = np.zeros(size, np.int64), np.zeros(size, np.bool_), np.full(size, -1, np.int32)
    ids[:used] = np.concatenate([corpus.samples[i].input_ids for i in members])
    mask[:used] = np.concatenate([corpus.samples[i].loss_mask for i in members])
    doc[:used] = np.repeat(np.arange(len(members), dtype=np.int32), corpus.lengths[members])
    tokens = np.full(size, corpus.start[-1], np.int64)
    tokens[:used] = np.concatenate([np.arange(corpus.start[i], corpus.start[i + 1]) for i in members])
    lasts = np.concatenate([np.arange(corpus.last_start[i], corpus.last_start[i + 1]) for i in members])
    if chosen is None:
        whole = np.zeros(size)
        whole[:used] = priority
        chosen = rules.choose(rules.eligible(mask, doc), whole, args.anchors)
    batch = Batch.build(
        input_ids=ids, loss_mask=mask, doc=doc, aux=torch.empty(size, 0), last=torch.empty(len(lasts), 0),
        anchors=chosen, block_size=args.block, pad_anchors_to=args.anchors,
    )  # fmt: skip
    return batch, torch.from_numpy(tokens), torch.from_numpy(lasts)


def held_out(
    args: argparse.Namespace, corpus: Corpus, device: torch.device
) -> list[tuple[Batch, Tensor, Tensor]]:
    """Batches that between them have every anchor of the held-out samples once."""
    out = []
    for members in pack(corpus.held_out, corpus.lengths, args.seq):
        probe = built(args, corpus, members, np.zeros(0), np.zeros(0, np.int64))[0]
        where = np.flatnonzero(rules.eligible(probe.loss_mask.numpy(), probe.doc.numpy())).astype(np.int64)
        parts = -(-len(where) // args.anchors)
        for k in range(parts):
            found = built(args, corpus, members, np.zeros(0), where[k::parts])
            out.append(tuple(x.to(device) for x in found))
    return out  # type: ignore[return-value]


class Trainer:
    """One compiled draft, begun again for every run."""

    def __init__(self, args: argparse.Namespace, corpus: Corpus, exact: States, frozen: FrozenTarget) -> None:
        self.args, self.corpus, self.exact, self.frozen = args, corpus, exact, frozen
        self.device = exact.aux.device
        self.cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.config = DraftConfig.sized_for(
            corpus.config, target_layer_ids=corpus.layers, mask_token_id=corpus.mask_token_id,
            num_layers=args.draft_layers, block_size=args.block, markov_rank=args.rank,
        )  # fmt: skip
        self.host = dataclasses.replace(
            frozen, embed_tokens=frozen.embed_tokens.cpu(), lm_head=frozen.lm_head.cpu(), logits=PLAIN
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
        return dataclasses.replace(batch, aux=aux[tokens].to(self.dtype), last=last[lasts].to(self.dtype))

    def run(self, seed: int, aux: Tensor, last: Tensor) -> dict[str, Any]:
        """Train from seed ``seed`` on ``aux`` [T + 1, L, H] and ``last`` [M, H], score on the exact states."""
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
            slots = SlotInputs.gather(batch, self.model(batch, self.model.plan(batch, backend)), DECAY)
            out = objective(slots, self.model.frozen_head, ObjectiveConfig(), weights)
            out.loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step(learning_rate(step, args.steps, args.lr, 0.04, 0.0))
            loss = out.loss.detach()
        final, train_seconds = float(loss), time.monotonic() - began
        score = self._score(backend)
        return {
            "tau": score["mean_accepted_length"], "accept_rate": score["accept_rate"], "l1": score["l1_loss"],
            "loss": final, "train_seconds": train_seconds, "seconds": time.monotonic() - began,
        }  # fmt: skip

    @torch.no_grad()
    def _score(self, backend: Any) -> Any:
        metrics = SlotMetrics(self.args.block, self.device)
        one = Denominators(1.0, 1.0, 1.0)
        for row in self.val:
            batch = self._placed(row, self.exact.aux, self.exact.last)
            slots = SlotInputs.gather(batch, self.model(batch, self.model.plan(batch, backend)), DECAY)
            metrics.add(batch, slots, objective(slots, self.model.frozen_head, ObjectiveConfig(), one))
        return metrics.result()


def table(runs: list[dict[str, Any]], raw: int) -> list[dict[str, Any]]:
    """Of each codec: bytes, ratio to ``raw`` bytes per token, tau and its change against ``exact``, paired by seed."""
    exact = {r["seed"]: r["tau"] for r in runs if r["codec"] == "exact"}
    out = []
    for name in dict.fromkeys(r["codec"] for r in runs):
        mine = [r for r in runs if r["codec"] == name]
        pairs = [r["tau"] / exact[r["seed"]] - 1 for r in mine if r["seed"] in exact]
        size = mine[-1]["bytes_per_token"] + mine[-1]["calibration_bytes"] / mine[-1]["tokens"]
        out.append({
            "codec": name, "tau": [round(r["tau"], 4) for r in mine], "seeds": [r["seed"] for r in mine],
            "change": statistics.mean(pairs) if pairs else None,
            "standard_error": statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else None,
            "bytes_per_token_all": size, "ratio": raw / size if size > META else 1.0,
        })  # fmt: skip
    return out


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument(
        "--before", type=Path, help="a codec_klt.json whose trainings are not repeated (default: OUT's)"
    )
    parser.add_argument("--rows", type=int, default=9000)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument(
        "--codecs", default="exact,klt-1.0-1.0,klt-0.7-1.0,rotated-4-4,klt-0.5-1.0,rotated-2-4"
    )
    parser.add_argument("--seconds", type=float, default=560.0)
    parser.add_argument("--only", type=re.compile, default=None)
    parser.add_argument("--fit-on", type=re.compile, default=None)
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
        args.rows, args.steps, args.seq, args.anchors, args.block, args.draft_layers, args.rank = (
            40,
            3,
            1024,
            48,
            4,
            1,
            16,
        )
        args.max_len, args.val, args.calibrate, args.seeds, args.part_tokens = 256, 0.2, 3000, "0,1", 4096
    return args


def main() -> None:
    args = arguments()
    import numcodecs  # noqa: F401  # needed at the end of a long run: missing, it is missed now

    args.out.mkdir(parents=True, exist_ok=True)
    before = args.before or args.out / "codec_klt.json"
    runs: list[dict[str, Any]] = json.loads(before.read_text())["results"]["runs"] if before.exists() else []
    corpus = read_corpus(args)
    train, val = split(corpus.keys, args.val)
    corpus.train, corpus.held_out = train, val
    say(
        f"{len(corpus.samples)} samples, {corpus.start[-1]} tokens, {corpus.last_start[-1]} last states, {len(val)} samples held out"
    )
    aux, last, frozen = capture(args, corpus)
    device = aux.device
    ids = np.concatenate([s.input_ids for s in corpus.samples])
    at = np.concatenate([a + s for a, s in zip(corpus.last_at, corpus.start, strict=False)])
    context = Context.of(
        torch.from_numpy(ids).to(device),
        torch.from_numpy(corpus.start[:-1]).to(device),
        torch.from_numpy(at).to(device),
    )
    states = States(aux, last, context)
    say(f"states: {aux.nbytes / 1e9:.1f} GB of aux layers, {last.nbytes / 1e9:.1f} GB of last states")
    coder, trainer = Coder(args, corpus, states, frozen), Trainer(args, corpus, states, frozen)
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
                "tokens": states.tokens,
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
