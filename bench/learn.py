"""What the draft should learn from: paired trainings in one process, with one compilation, as many
as fit into a time.

    python bench/learn.py --store 4-4.zarr [--budget 560] [--steps 1200] [--seeds 0,1,2]
        [--variants base,visits,tau] [--also 'NAME=lr=3e-3 block=visits']
        [--equal-time] [--keep DIR] [--train "..."]

The rows of the first epoch are read once and lie in the device's memory as codes; a variant starts
from the same weights as the others of its seed and takes the same rows with the same anchors in the
same order. Each is judged at every anchor of the held-out rows: tau, and the walk
(``train/objective/walk.py``), which is what decoding reaches. Results are written after every
variant; a later call with the same ``--name`` goes on with those that are missing. A variant that
would not end within ``--budget`` seconds is not begun.

``--equal-time`` gives each variant the steps that it can take in the time of ``base``, by 20 steps
of each measured before.

A variant is KEY=VALUE pairs:

lr, schedule     of the optimizer
ce, l1           weights of the terms
block weights of whole blocks, from the acceptance of the draft as it is now: visits (probability
that decoding begins one there),
                 failure (that the token before it was refused); from the target alone: surprise (of
                 the anchor's token), entropy (of its place)
mix              share of these weights, the rest is uniform  [1]
slot weights of slots: decay (exp(-k/decay)), product (of the acceptances before it), tau (d tau / d
alpha), inverse (decay / alpha: the
                 gradient of -log alpha)
alpha where acceptances come from: exact (the objective's values, computed once more) or confidence
(the confidence head) [exact] own share of the steps in which the Markov head sees the draft's own
argmax instead of the text

Writes bench/results/NAME.json: rows with name, seed, tau, walk (greedy, free-running),
walk_sampled, walk_forced, steps, step_ms, seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from feed import config
from torch import Tensor

from common import RESULTS, write
from dspark.train.data import anchors as rules
from dspark.train.data.batch import Batch
from dspark.train.data.row import Row
from dspark.train.data.stream import VALIDATION_EPOCH
from dspark.train.draft.folder import save_draft
from dspark.train.draft.types import drafter
from dspark.train.evaluate import _alphas, judged
from dspark.train.objective.metrics import SlotMetrics
from dspark.train.objective.objective import (
    Denominators,
    ObjectiveConfig,
    SlotInputs,
    objective,
    slot_weights,
)
from dspark.train.objective.states import SlotStates
from dspark.train.objective.walk import Walk
from dspark.train.optim.base import Snapshot, learning_rate
from dspark.train.run.folder import TRAINING
from dspark.train.run.setup import Run, prepare

FLAGS = "--recipe SmolLM2-135M --no-tensorboard --val-rows 12"
PROBE = 20  # steps that time a variant
FLOOR = 0.05  # of an acceptance that is divided by

VARIANTS = {
    "base": "",
    "visits": "block=visits",
    "visits-half": "block=visits mix=0.5",
    "visits-confidence": "block=visits alpha=confidence",
    "visits-confidence-half": "block=visits alpha=confidence mix=0.5",
    "failure": "block=failure mix=0.5",
    "surprise": "block=surprise mix=0.5",
    "entropy": "block=entropy mix=0.5",
    "product": "slot=product",
    "product-confidence": "slot=product alpha=confidence",
    "tau": "slot=tau",
    "tau-confidence": "slot=tau alpha=confidence",
    "walk": "slot=tau block=visits",
    "walk-half": "slot=tau block=visits mix=0.5",
    "inverse": "slot=inverse",
    "own": "own=0.3",
    "linear": "schedule=linear",
    "wsd": "schedule=wsd",
    "constant": "schedule=constant",
    "lr-1.5e-3": "lr=1.5e-3",
    "lr-3e-3": "lr=3e-3",
    "lr-4e-3": "lr=4e-3",
    "l1-only": "ce=0 l1=1",
    "ce-more": "ce=0.3 l1=0.7",
}


@dataclass(frozen=True)
class Variant:
    name: str
    lr: float
    schedule: str
    ce: float
    l1: float
    block: str = "none"
    mix: float = 1.0
    slot: str = "decay"
    alpha: str = "exact"
    own: float = 0.0

    @classmethod
    def parse(cls, name: str, text: str, run: Run) -> Variant:
        """From KEY=VALUE pairs; what is not said is the run's."""
        c, o = run.config, run.objective
        given: dict[str, Any] = {"lr": c.lr, "schedule": c.lr_schedule, "ce": o.ce, "l1": o.l1}
        kinds = {f.name: f.type for f in dataclasses.fields(cls)}
        for pair in text.split():
            key, _, value = pair.partition("=")
            if key not in kinds or key == "name":
                raise SystemExit(
                    f"{name}: {key} is not one of {', '.join(k for k in kinds if k != 'name')}"
                )
            given[key] = float(value) if kinds[key] == "float" else value
        return cls(name, **given)


@dataclass(frozen=True)
class Held:
    """A row whose codes lie on the device; what the host must know of it."""

    row: Row
    host: Batch
    denominators: Denominators

    @classmethod
    def of(cls, row: Row, run: Run) -> Held:
        batch = row.batch
        # Copies: a view would hold on to the whole row.
        copies = {f.name: getattr(batch, f.name).clone() for f in dataclasses.fields(Batch)}
        host = dataclasses.replace(batch, **copies)
        moved = dataclasses.replace(row, data=row.data.to(run.compute.device))
        return cls(moved, host, Denominators.of(host, run.config.decay, run.to_draft))

    def place(self, run: Run) -> Batch:
        batch = self.row.place(
            run.cache, run.compute.device, run.compute.dtype, run.model.config.target_layer_ids
        )
        return dataclasses.replace(batch, target_at_host=self.host.target_at_host)


# Weights


def visits_on(alpha: Tensor, batch: Batch) -> Tensor:
    """s [A] of the anchors, from ``alpha`` [A, B], on the device. Eligible positions that are no
    anchors stop as the mean block does.

    ``walk.visits`` is the reference. As a triangular system over the M eligible positions: s =
    first + (transitions)^T s.
    """
    size, length, count = alpha.shape[1], batch.input_ids.shape[0], batch.last.shape[0]
    valid = batch.anchor_valid.to(alpha.dtype)[:, None]
    one = alpha.new_ones(alpha.shape[0], 1)
    stops = torch.cat([one, alpha.cumprod(1)], 1) * torch.cat([1 - alpha, one], 1)
    mean = (stops * valid).sum(0) / valid.sum().clamp(min=1)
    row = batch.last_index  # of the eligible positions 0..M-1, else -1
    at = torch.where(batch.anchor_valid, row[batch.anchors], count)
    table = mean.expand(count + 1, -1).index_copy(0, at, stops)[:count]
    can = row >= 0
    before = torch.cat([can.new_zeros(1), can[:-1]]) & (batch.doc == batch.doc.roll(1))
    first = can & ~before
    run = torch.cat([first.cumsum(0), first.new_full((size + 1,), -1, dtype=torch.int64)])
    place = alpha.new_zeros(count + 1, dtype=torch.int64).index_copy(
        0, torch.where(can, row, count), torch.arange(length, device=row.device)
    )[:count]
    to = place[:, None] + torch.arange(size + 1, device=row.device) + 1
    # The end of a run may be the beginning of another document's; and beyond the row there is
    # nothing.
    to_row = torch.cat([row, row.new_full((size + 1,), -1)])[to]
    to_row = torch.where((to_row >= 0) & (run[to] == run[place][:, None]), to_row, count)
    system = torch.zeros(count + 1, count + 1, dtype=alpha.dtype, device=alpha.device)
    system[to_row, torch.arange(count, device=row.device)[:, None]] = -table
    begins = first[place].to(alpha.dtype)[:, None]
    s = torch.linalg.solve_triangular(
        system[:count, :count], begins, upper=False, unitriangular=True
    )
    return torch.cat([s[:, 0], s.new_zeros(1)])[at]


def after_failure(alpha: Tensor, batch: Batch) -> Tensor:
    """[A]: mean of 1 - alpha over the slots that predict the anchor's own token; the mean of all
    where none does.
    """
    length = batch.input_ids.shape[0]
    counted = batch.counted.to(alpha.dtype).flatten()
    label = batch.label_index.flatten()
    count = alpha.new_zeros(length).index_add(0, label, counted)
    wrong = alpha.new_zeros(length).index_add(0, label, counted * (1 - alpha.flatten()))
    mean = wrong.sum() / count.sum().clamp(min=1)
    return torch.where(count > 0, wrong / count.clamp(min=1), mean)[batch.anchors]


def of_target(kind: str, batch: Batch, head: Any) -> Tensor:
    """[A]: surprise of the anchor's token, or entropy of the target's distribution there; the mean
    where it is not stored.
    """
    at = batch.last_index[(batch.anchors - 1).clamp(min=0)]
    known = (at >= 0) & (batch.anchors > 0) & batch.anchor_valid
    logs = (
        head.target_logits(batch.last[at.clamp(min=0)].to(head.lm_head.dtype))
        .float()
        .log_softmax(-1)
    )
    if kind == "surprise":
        value = -logs.gather(1, batch.input_ids[batch.anchors][:, None])[:, 0]
    else:
        value = -(logs.exp() * logs).sum(-1)
    mean = (value * known).sum() / known.sum().clamp(min=1)
    return torch.where(known, value, mean)


def slot_factors(kind: str, alpha: Tensor, decay: Tensor) -> Tensor:
    """[A, B] from ``alpha`` [A, B] and ``decay`` [B]."""
    if kind == "decay":
        return decay.expand_as(alpha)
    if kind == "inverse":
        return decay / alpha.clamp(min=FLOOR)
    before = torch.cat([alpha.new_ones(alpha.shape[0], 1), alpha[:, :-1].cumprod(1)], 1)
    if kind == "product":
        return before
    assert kind == "tau", f"slot={kind}"
    # d tau / d alpha_k = prod_{j<k} alpha_j (1 + alpha_{k+1} (1 + alpha_{k+2} (...)))
    beyond, parts = alpha.new_ones(alpha.shape[0]), []
    for k in reversed(range(alpha.shape[1])):
        parts.append(beyond)
        beyond = 1 + alpha[:, k] * beyond
    return before * torch.stack(parts[::-1], 1)


@torch.no_grad()
def weights_of(
    v: Variant, run: Run, batch: Batch, states: SlotStates, slots: SlotInputs, unit: Denominators
) -> Tensor | None:
    """Weights [N] of the token losses, with the sum of the usual ones; None for the usual ones."""
    if v.block == "none" and v.slot == "decay":
        return None
    head = run.model.frozen_head
    alpha = batch.counted.float()
    if v.alpha == "confidence" and states.confidence is not None:
        alpha = states.confidence.sigmoid().float() * batch.counted
    elif v.slot != "decay" or v.block in ("visits", "failure"):
        values = objective(slots, head, run.objective, unit)
        alpha = batch.in_blocks(values.accept.float())
    factors = slot_factors(
        v.slot, alpha, slot_weights(batch.block_size, run.config.decay, alpha.device)
    )
    if v.block != "none":
        blocks = (
            visits_on(alpha, batch)
            if v.block == "visits"
            else after_failure(alpha, batch)
            if v.block == "failure"
            else of_target(v.block, batch, head)
        )
        valid = batch.anchor_valid.float()
        mean = (blocks * valid).sum() / valid.sum().clamp(min=1)
        factors = factors * (1 - v.mix + v.mix * blocks / mean.clamp(min=1e-9))[:, None]
    weights = factors.flatten()[batch.slots]
    return weights * (slots.weight.sum() / weights.sum().clamp(min=1e-9))


def on_own_tokens(run: Run, batch: Batch, states: SlotStates) -> SlotStates:
    """The heads once more, on the draft's own argmax at the slot before instead of the text's
    token.
    """
    model, h, z = run.model, states.h, states.z
    with torch.no_grad():
        picks = []
        for at in range(0, h.shape[0], 256):
            logits = model.slot_logits(h[at : at + 256])
            if z is not None:
                logits += model.markov_logits(z[at : at + 256])
            picks.append(model.target_ids(logits.argmax(-1)))
        prev = torch.cat([batch.prev_ids[:, :1], torch.cat(picks)[:, :-1]], 1)
    return model.heads(h, prev)


# Runs


class Lab:
    """One compiled model, its rows and its optimizer, used again by every variant."""

    def __init__(self, run: Run, rows: int) -> None:
        self.run = run
        self.cuda = run.compute.device.type == "cuda"
        self.rows = [Held.of(row, run) for row in self._read(0, rows)]
        limit = run.config.val_rows
        self.held_out = [Held.of(row, run) for row in self._read(VALIDATION_EPOCH, limit)]
        blank = run.optimizer.snapshot()
        self.moments = {
            k: {n: torch.zeros_like(t) for n, t in m.items()} for k, m in blank.moments.items()
        }

    def _read(self, epoch: int, count: int) -> Iterator[Row]:
        stream = self.run.stream if epoch >= 0 else self.run.validation
        assert stream is not None, "no held-out samples: raise --val-fraction"
        have = len(stream.plan(epoch))
        taken = 0
        for step in stream.steps_from(epoch, workers=self.run.workers):
            for row in step:
                if row.slots:
                    yield row
                taken += 1
                if taken >= min(count, have):
                    return

    def reset(self, seed: int) -> None:
        """The weights that a training with this seed begins with, and no moments."""
        model = self.run.model
        torch.manual_seed(seed)
        fresh = drafter(model.config.speculator_type).network(
            model.config, self.run.cache.target, self._ids()
        )
        masters = {n: p.detach().float().clone() for n, p in fresh.trained()}
        self.run.optimizer.load(Snapshot(masters, self.moments, 0))

    def _ids(self) -> Tensor | None:
        ids = self.run.model.frozen_head.draft_ids
        return None if ids is None else ids.cpu()

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def train(self, v: Variant, seed: int, steps: int, total: int) -> float:
        """``steps`` of a schedule of ``total``; seconds."""
        run = self.run
        order = np.random.default_rng(seed).permutation(len(self.rows))
        chance = np.random.default_rng([seed, 1]).random(max(steps, total))
        objective_config = dataclasses.replace(run.objective, ce=v.ce, l1=v.l1)
        self.sync()
        started = time.perf_counter()
        for i in range(steps):
            held = self.rows[order[i % len(order)]]
            self.learn(v, held, objective_config, own=chance[i] < v.own)
            run.optimizer.step(
                learning_rate(
                    i, total, v.lr, run.config.warmup_ratio, run.config.min_lr_ratio, v.schedule
                )
            )
        self.sync()
        return time.perf_counter() - started

    def learn(self, v: Variant, held: Held, config: ObjectiveConfig, *, own: bool) -> None:
        run = self.run
        batch = held.place(run)
        states: SlotStates = run.model(batch, run.model.plan(batch, run.compute.backend))
        if own:
            states = on_own_tokens(run, batch, states)
        slots = SlotInputs.gather(batch, states, run.config.decay)
        weights = weights_of(v, run, batch, states, slots, held.denominators)
        out = objective(slots, run.model.frozen_head, config, held.denominators, weights=weights)
        out.loss.backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def judge(self) -> dict[str, Any]:
        """tau and the walks, at every anchor of the held-out rows."""
        run, walk = self.run, Walk()
        metrics = SlotMetrics(run.config.block_size, run.compute.device)
        for held in self.held_out:
            batch = held.place(run)
            mask, doc = held.host.loss_mask.numpy(), held.host.doc.numpy()
            every, some = np.flatnonzero(rules.eligible(mask, doc)), run.config.max_anchors or 512
            found = []
            for at in range(0, every.size, some):
                part = batch.with_anchors(
                    held.host, every[at : at + some], some if run.stream.pad else 0
                )
                told = judged(run.model, part, run.config.decay, run.compute.backend)
                metrics.add(part, *told[1:])
                found.append(_alphas(run.model, part, *told))
            walk.add(torch.cat(found, 1), torch.from_numpy(every))
        score, walks = metrics.result(), walk.result()
        return {
            "tau": score["mean_accepted_length"],
            "walk": walks["walk_greedy"],
            "walk_sampled": walks["walk"],
            "walk_forced": walks["walk_greedy_forced"],
            "accept_rate": score["accept_rate"],
            "confidence_ece": score["confidence_ece"],
        }


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, and the change of each against ``base`` of the same seeds."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    base = {row["seed"]: row for row in rows if row["name"] == "base"}
    lines = [
        f"{'variant':24} {'seeds':>5} {'tau':>6} {'walk':>6} {'T=1':>6} {'step ms':>8} "
        f"{'steps':>6}  walk against base, by seed"
    ]
    for name in sorted(names, key=lambda n: -np.mean([r["walk"] for r in rows if r["name"] == n])):
        own = [row for row in rows if row["name"] == name]
        mean = {
            k: float(np.mean([r[k] for r in own]))
            for k in ("tau", "walk", "walk_sampled", "step_ms", "steps")
        }
        paired = [
            f"{100 * (r['walk'] / base[r['seed']]['walk'] - 1):+.1f}"
            for r in own
            if r["seed"] in base
        ]
        lines.append(
            f"{name:24} {len(own):5} {mean['tau']:6.3f} {mean['walk']:6.3f} "
            f"{mean['walk_sampled']:6.3f} {mean['step_ms']:8.1f} "
            f"{mean['steps']:6.0f}  {' '.join(paired)} %"
        )
    return "\n".join(lines)


def experiment(args: argparse.Namespace, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Run what is missing and fits; every row that there is then."""
    started = time.perf_counter()
    run = prepare(config(args.store, args.train))
    variants = {**VARIANTS, **dict(given.split("=", 1) for given in args.also)}
    names = args.variants.split(",") if args.variants else list(variants)
    if unknown := [name for name in names if name not in variants]:
        raise SystemExit(f"no such variants: {', '.join(unknown)}; there are {', '.join(variants)}")
    chosen = [Variant.parse(name, variants[name], run) for name in names]
    path = args.results / f"{args.name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["results"] if path.exists() else []
    done = {(row["name"], row["seed"]) for row in rows}
    jobs = [
        (v, int(seed))
        for seed in args.seeds.split(",")
        for v in chosen
        if (v.name, int(seed)) not in done
    ]
    if not jobs:
        return rows
    lab = Lab(run, args.rows or args.steps)
    base = Variant.parse("base", VARIANTS["base"], run)
    say(f"{len(lab.rows)} rows read after {time.perf_counter() - started:.0f} s")
    lab.reset(0)
    lab.train(base, 0, 3, args.steps)  # compiles
    lab.judge()
    usual = lab.train(base, 0, PROBE, args.steps) / PROBE
    say(f"compiled after {time.perf_counter() - started:.0f} s; a step takes {1e3 * usual:.1f} ms")
    longest = 0.0
    for v, seed in jobs:
        begun = time.perf_counter()
        if begun - started + longest > args.budget:
            say(f"{args.budget} s are used up; the same command goes on with {v.name}, seed {seed}")
            break
        steps = args.steps
        if args.equal_time:
            lab.reset(seed)
            lab.train(v, seed, 3, args.steps)
            steps = max(
                1, round(args.steps * usual / (lab.train(v, seed, PROBE, args.steps) / PROBE))
            )
        lab.reset(seed)
        seconds = lab.train(v, seed, steps, steps)
        row = {
            "name": v.name,
            "seed": seed,
            "steps": steps,
            "step_ms": 1e3 * seconds / steps,
            "seconds": seconds,
            **lab.judge(),
        }
        rows.append(row | {"settings": dataclasses.asdict(v)})
        if args.keep:
            folder = args.keep / f"{v.name}-{seed}"
            save_draft(folder, run.model, trained=run.optimizer.snapshot().masters)
            (folder / TRAINING).write_text(json.dumps(run.config.to_json(), indent=1) + "\n")
        longest = max(longest, time.perf_counter() - begun)
        say(
            f"{v.name} seed {seed}: tau {row['tau']:.3f} walk {row['walk']:.3f} T=1 "
            f"{row['walk_sampled']:.3f} {seconds:.0f} s"
        )
        write(
            args.name,
            {k: str(x) for k, x in vars(args).items() if k not in ("store", "results", "keep")},
            rows,
            args.results,
            show=False,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path)
    parser.add_argument("--budget", type=float, default=560, help="seconds in all")
    parser.add_argument(
        "--steps", type=int, default=1200, help="of base; of every variant without --equal-time"
    )
    parser.add_argument("--rows", type=int, help="rows held on the device  [as many as steps]")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--variants", help="comma separated  [all]")
    parser.add_argument("--also", action="append", default=[], metavar="NAME=SETTINGS")
    parser.add_argument("--list", action="store_true", help="print the variants and stop")
    parser.add_argument("--equal-time", action="store_true")
    parser.add_argument(
        "--keep", type=Path, help="folder for the drafts, which score and eval read"
    )
    parser.add_argument("--train", default=FLAGS, help=f"flags of dspark-train [{FLAGS}]")
    parser.add_argument("--name", default="learn")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.list:
        print("\n".join(f"{name:24} {text}" for name, text in VARIANTS.items()))
        return
    if args.store is None:
        parser.error("--store is needed")
    print(table(experiment(args, lambda text: print(text, file=sys.stderr, flush=True))))


if __name__ == "__main__":
    main()
