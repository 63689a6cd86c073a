"""``dspark-train --dry-run``: measure what a training would need, from a few real steps. Nothing is
written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from dspark.cache.shared.command import duration
from dspark.cache.shared.own_process import starting
from dspark.train import distributed
from dspark.train.config import TrainConfig
from dspark.train.data.feed import Feed
from dspark.train.distributed import lost_peers
from dspark.train.loop import Schedule, placer
from dspark.train.run import memory
from dspark.train.run.checkpoint import Position
from dspark.train.run.setup import prepare
from dspark.train.step import share, step

WARM, TIMED = 3, 5  # steps: compilation and the allocator's growth, then those that count


def dry_run(config: TrainConfig, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Take ``WARM + TIMED`` steps (or all, if there are fewer) and report steps, hours and memory
    of the whole run.

    Keys: steps, steps_per_epoch, tokens_per_step, first_step_seconds (from the call, compilation
    included), start_seconds (the same by part: ``prepare`` opens the store and builds the draft,
    ``row`` waits for the first row, ``step`` compiles and computes), step_ms, hours (of the steps;
    validations and checkpoints come on top), memory_gb (estimated, by part and in all), peak_gb
    (measured on a GPU, else None).
    """
    started = time.perf_counter()
    world = distributed.join(config.device, config.strategy)
    with ExitStack() as stack, lost_peers():
        with starting():
            run = world.agreed(lambda: prepare(config, world, Position()))
        prepared = time.perf_counter() - started
        say(memory.describe(run))
        schedule, device = Schedule.of(run), run.compute.device
        cuda = device.type == "cuda"

        def now() -> float:
            if cuda:
                torch.cuda.synchronize(device)
            return time.perf_counter()

        count = min(schedule.total, WARM + TIMED)
        assert run.rows is not None
        feed = stack.enter_context(Feed(run.rows, placer(run), device))
        tokens, first, since, taken = 0, 0.0, started, 0.0
        for i in range(count):
            part = share(run, feed.take, lambda: False)
            if i == 0:
                taken = time.perf_counter() - started
            step(run, feed, part, i, schedule.total, None)
            tokens += part.tokens
            if i + 1 < count:
                feed.fetch()
            if i == 0:
                first = now() - started
            if i + 1 == min(WARM, count - 1):
                since = now()
        timed = count - min(WARM, count - 1)
        ms = 1e3 * (now() - since) / timed
    estimate = memory.estimate_memory(run)
    world.leave()
    return {
        "steps": schedule.total,
        "steps_per_epoch": schedule.per_epoch,
        "tokens_per_step": tokens / count,
        "first_step_seconds": first,
        "start_seconds": {"prepare": prepared, "row": taken - prepared, "step": first - taken},
        "step_ms": ms,
        "hours": schedule.total * ms / 3.6e6,
        "memory_gb": {
            "trained": estimate.trained / 1e9,
            "frozen": estimate.frozen / 1e9,
            "row": estimate.row / 1e9,
            "total": estimate.total / 1e9,
        },
        "peak_gb": torch.cuda.max_memory_allocated(device) / 1e9 if cuda else None,
    }


def words(found: dict[str, Any]) -> str:
    """Format the result."""
    peak = f", {found['peak_gb']:.2f} GB measured" if found["peak_gb"] else ""
    return (
        f"{found['steps']} steps ({found['steps_per_epoch']} per epoch) of "
        f"{found['step_ms']:.1f} ms: {duration(3600 * found['hours'])} without validation and "
        f"checkpoints; first step after {found['first_step_seconds']:.1f} s; memory per "
        f"device about {found['memory_gb']['total']:.2f} GB{peak}"
    )
