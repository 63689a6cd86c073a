"""One compiled draft whose training bench/learn.py repeats, on rows that lie in the device's memory
as codes: order, anchors and initial weights of a seed are the same for every variant.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from learn_variants import Variant, chances, of_layers, principal, weights_of
from torch import Tensor

from dspark.train.data import anchors as rules
from dspark.train.data.batch import ARRAYS, ON_HOST, Batch, MakeTables
from dspark.train.data.row import PackedRow
from dspark.train.data.stream import VALIDATION_EPOCH
from dspark.train.draft.types import drafter
from dspark.train.evaluate import batch_alphas, judged
from dspark.train.objective.metrics import SlotMetrics
from dspark.train.objective.objective import objective
from dspark.train.objective.slots import Denominators, SlotInputs, slot_weights
from dspark.train.objective.states import SlotStates
from dspark.train.objective.walk import KINDS, Walk, visits
from dspark.train.optim import base
from dspark.train.optim.adamw import Adam
from dspark.train.optim.base import Snapshot, learning_rate
from dspark.train.run.setup import Run

ROUNDS = 5  # of short probes that time a variant


@dataclass(frozen=True)
class Held:
    """A row whose codes lie on the device; what the host must know of it. ``blocks``: fields of the
    batch that replace the row's own.
    """

    row: PackedRow
    host: Batch
    per_slot: Tensor
    blocks: dict[str, Any] | None = None

    @classmethod
    def of(cls, row: PackedRow, run: Run) -> Held:
        batch = row.batch
        # Copies: a view would hold on to the whole row.
        copies = {n: getattr(batch, n).clone() for n in (*ARRAYS, *ON_HOST)}
        host = dataclasses.replace(batch, **copies)
        moved = dataclasses.replace(row, data=row.data.to(run.compute.device), lent=None)
        return cls(moved, host, host.counted.sum(0))

    def with_blocks(
        self,
        anchors: rules.Int64,
        pad: int,
        chance: Tensor,
        seed: int,
        tables: MakeTables | None = None,
    ) -> Held:
        """The same row with ``anchors``, and slot k of a block with probability ``chance[k]``."""
        host = self.host.with_anchors(self.host, anchors, pad)
        drawn = torch.rand(host.counted.shape, generator=torch.Generator().manual_seed(seed))
        counted = host.counted & (drawn < chance)
        arrays = (host.label_index.numpy(), counted.numpy(), host.last_index.numpy())
        slots, rows, at = (torch.from_numpy(x) for x in rules.by_target(*arrays))
        blocks = {"anchors": host.anchors, "anchor_valid": host.anchor_valid, "counted": counted}
        blocks |= {"label_index": host.label_index, "slots": slots, "target_rows": rows}
        blocks |= {"target_at": at, "target_at_host": at}
        device = self.row.data.device
        placed: dict[str, Any] = {n: t if n in ON_HOST else t.to(device) for n, t in blocks.items()}
        made = tables(host.doc, host.anchors, host.anchor_valid) if tables else ()
        placed["tables"] = tuple({n: t.to(device) for n, t in of.items()} for of in made)
        return dataclasses.replace(self, per_slot=counted.sum(0), blocks=placed)

    def denominators(self, decay: float) -> Denominators:
        total = float((slot_weights(self.per_slot.numel(), decay) * self.per_slot).sum())
        return Denominators(total, total, total)

    def place(self, run: Run) -> Batch:
        batch = self.row.place(
            run.cache, run.compute.device, run.compute.dtype, run.model.config.target_layer_ids
        )
        own = self.blocks or {"target_at_host": self.host.target_at_host}
        return dataclasses.replace(batch, **own)


class Lab:
    """One compiled model, its rows and its optimizer, used again by every variant."""

    tables = True  # whether readers' tables of the mask are used where there are any

    def __init__(self, run: Run, rows: int, target: Path | None = None) -> None:
        assert run.to_draft is None, "the lab trains drafts of the whole vocabulary"
        self.run, self.target = run, target
        self.cuda = run.compute.device.type == "cuda"
        self._sets: dict[tuple[Any, ...], list[list[Held]]] = {}
        self.rows: list[Held] = []
        self._failed: Exception | None = None
        self._reader = threading.Thread(target=self._read_all, args=(rows,), daemon=True)
        self._reader.start()
        # Only then may other processes start: the reader would take them for its own.
        while not self.rows and self._reader.is_alive():
            time.sleep(0.05)
        if not self.rows:
            self.wait()
        assert run.validation is not None, "no held-out samples: raise --val-fraction"
        held_out = run.validation.steps_from(VALIDATION_EPOCH, workers=0)
        self.held_out = [Held.of(row, run) for step in held_out for row in step if row.slots]
        blank = run.optimizer.snapshot()
        self.moments = {
            k: {n: torch.zeros_like(t) for n, t in m.items()} for k, m in blank.moments.items()
        }
        self._heads = 1.0
        for rule in run.optimizer._rules:  # type: ignore[attr-defined]
            if isinstance(rule, Adam) and len(run.optimizer._rules) > 1:  # type: ignore[attr-defined]
                inner = rule.update
                rule.update = lambda lr, norm, inner=inner: inner(lr * self._heads, norm)  # type: ignore[method-assign]

    def _read_all(self, count: int) -> None:
        """As a training reads: every epoch packs the samples anew and draws other anchors. In a
        thread, so that the draft is compiled meanwhile.
        """
        stream = self.run.stream
        try:
            for step in stream.steps_from(0, workers=self.run.workers, endless=True):
                self.rows += [Held.of(row, self.run) for row in step if row.slots]
                if len(self.rows) >= count:
                    del self.rows[count:]
                    return
        except Exception as error:
            self._failed = error

    def wait(self) -> None:
        """Wait for the last row. Raises what reading raised."""
        self._reader.join()
        if self._failed is not None:
            raise self._failed
        assert self.rows, "no row of the store has a slot to learn from"
        self._sets.clear()  # of the rows that were there before

    def rows_of(self, v: Variant) -> list[list[Held]]:
        """The rows in sets, which are trained on in turn: a row with fewer anchors is in several,
        each time with others of those that were drawn.
        """
        key = (v.anchors, v.thin and v.decay)
        if key == (0, 0):
            return [self.rows]
        if key not in self._sets:
            self._sets[key] = self._split(v)
        return self._sets[key]

    def _split(self, v: Variant) -> list[list[Held]]:
        size = self.rows[0].host.block_size
        drawn = max(held.host.anchors.shape[0] for held in self.rows)
        most = v.anchors or drawn
        sets: list[list[Held]] = [[] for _ in range(max(1, drawn // most))]
        for number, held in enumerate(self.rows):
            real = held.host.anchors[held.host.anchor_valid].numpy()
            order = np.random.default_rng(number).permutation(real)
            for i, group in enumerate(sets):
                # A row of few anchors has what is left of them; none at all would teach nothing.
                some = np.sort(order[i * most : (i + 1) * most])
                some = some if some.size else np.sort(order[:most])
                pad = most if self.run.stream.pad else 0
                tables = self.run.stream.tables
                group.append(held.with_blocks(some, pad, chances(v, size), number, tables))
        return sets

    def reset(self, seed: int, v: Variant | None = None) -> None:
        """The weights that a training with this seed begins with, and no moments; ``v`` may give
        some.
        """
        model = self.run.model
        torch.manual_seed(seed)
        fresh = drafter(model.config.speculator_type).network(
            model.config, self.run.cache.target, None
        )
        masters = {n: p.detach().float().clone() for n, p in fresh.trained()}
        masters |= self._begins(v, masters) if v else {}
        self.run.optimizer.load(Snapshot(masters, self.moments, 0))

    def _begins(self, v: Variant, masters: dict[str, Tensor]) -> dict[str, Tensor]:
        if v.init == "none":
            return {}
        config = self.run.model.config
        if v.init == "markov":
            embed = self.run.cache.target.embed_tokens
            std = config.initializer_range
            return {"markov_head.markov_w1.weight": principal(embed, config.markov_rank, std)}
        assert v.init == "layers", f"init={v.init}"
        from safetensors.torch import load_file

        if self.target is None:
            raise SystemExit("init=layers needs --model")
        theirs = {
            n: t for p in sorted(self.target.glob("*.safetensors")) for n, t in load_file(p).items()
        }
        return of_layers(config, theirs, config.num_target_layers, masters)

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def train(self, v: Variant, seed: int, steps: int, total: int) -> float:
        """``steps`` of a schedule of ``total``; seconds."""
        run, sets = self.run, self.rows_of(v)
        order = np.random.default_rng(seed).permutation(len(self.rows))
        warm, least = run.config.warmup_ratio, run.config.min_lr_ratio
        self._heads = v.heads
        self.sync()
        started = time.perf_counter()
        with patch.object(base, "WSD_DECAY", v.fall):
            for i in range(steps):
                turn, at = divmod(i, len(order))
                self.learn(v, sets[turn % len(sets)][order[at]])
                run.optimizer.step(learning_rate(i, total, v.lr, warm, least, v.schedule))
        self.sync()
        return time.perf_counter() - started

    def learn(self, v: Variant, held: Held) -> None:
        """Forward and backward of one row."""
        run = self.run
        head, config = run.model.frozen_head, v.objective(run)
        batch, unit = held.place(run), held.denominators(v.slot_decay)
        batch = batch if self.tables else dataclasses.replace(batch, tables=())
        states: SlotStates = run.model(batch, run.model.plan(batch, run.compute.backend))
        slots = SlotInputs.gather(batch, states, v.slot_decay)
        weights = weights_of(v, head, batch, states, slots)
        if weights is not None:  # of the confidence's term too
            slots = dataclasses.replace(slots, weight=weights)
        out = objective(slots, head, config, unit)
        out.loss.backward()  # type: ignore[no-untyped-call]

    def step_times(self, variants: list[Variant], probe: int) -> list[float]:
        """Least seconds of a step of each, in turns of ``probe`` steps; all compiled before."""
        for variant in variants:
            self.reset(0, variant)
            self.train(variant, 0, 3, 100)
        least = [float("inf")] * len(variants)
        for _ in range(ROUNDS):
            for i, variant in enumerate(variants):
                least[i] = min(least[i], self.train(variant, 0, probe, 100) / probe)
        return least

    @torch.no_grad()
    def judge(self) -> dict[str, Any]:
        """tau and the walks, at every anchor of the held-out rows; and per slot how often the walk
        gets beyond it, where it gets to it.
        """
        run, walk = self.run, Walk()
        size = run.config.block_size
        metrics = SlotMetrics(size, run.compute.device)
        reached, passed = np.zeros(size), np.zeros(size)
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
                found.append(batch_alphas(run.model, part, *told))
            alpha = torch.cat(found, 1)
            walk.add(alpha, torch.from_numpy(every))
            greedy = alpha[KINDS.index("greedy")].double().numpy()
            far = np.cumprod(greedy, 1) * visits(greedy, every)[:, None]
            passed += far.sum(0)
            reached += np.concatenate([[visits(greedy, every).sum()], far.sum(0)[:-1]])
        score, walks = metrics.result(), walk.result()
        return {
            "tau": score["mean_accepted_length"],
            "walk": walks["walk_greedy"],
            "walk_sampled": walks["walk"],
            "walk_forced": walks["walk_greedy_forced"],
            "walk_accept": (passed / np.maximum(reached, 1e-9)).tolist(),
            "accept_rate": score["accept_rate"],
            "confidence_ece": score["confidence_ece"],
        }
