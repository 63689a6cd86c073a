"""One process of a training, whose steps FIRST + 1 to LAST are profiled: how much of a step its
GPU spends in communication.

    torchrun --nproc-per-node 4 bench/scaling_profile.py OUT FIRST LAST FLAG...

The flags are those of ``dspark-train``. Writes OUT/profile-RANK.json, milliseconds per step:
``wall``, ``compute`` and ``communication`` (time in which at least one such kernel runs),
``exposed`` (communication with no compute at the same time), and the longest ``kernels`` of each
kind. A collective's time holds the wait for the slowest rank; the rank that came last waits least,
so the least of the ranks' figures is nearest to the transfer alone. ``bench/scaling.py`` starts it.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dspark.train.optim.flat import FlatOptimizer
from dspark.train.optim.fsdp2 import ShardedOptimizer

COMMUNICATION = ("nccl", "gloo")
ACTIVITY = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
LONGEST = 6  # kernels listed of each kind
Spans = list[tuple[float, float]]


def union(spans: Iterable[tuple[float, float]]) -> Spans:
    """The same time without overlaps, in order."""
    out: Spans = []
    for begin, end in sorted(spans):
        if out and begin <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((begin, end))
    return out


def length(spans: Iterable[tuple[float, float]]) -> float:
    return sum(end - begin for begin, end in union(spans))


def figures(events: Iterable[Any], wall_us: float, steps: int) -> dict[str, Any]:
    """Of a profile's events on the device, ms per step."""
    spans: dict[str, Spans] = {"compute": [], "communication": []}
    totals: dict[str, Counter[str]] = {kind: Counter() for kind in spans}
    for e in events:
        if e.device_type != torch.autograd.DeviceType.CUDA or e.is_user_annotation:
            continue
        sent = any(word in e.name.lower() for word in COMMUNICATION)
        kind = "communication" if sent else "compute"
        spans[kind].append((e.time_range.start, e.time_range.end))
        totals[kind][e.name] += e.time_range.elapsed_us()
    compute, sent = length(spans["compute"]), length(spans["communication"])
    both = length([*spans["compute"], *spans["communication"]])
    each = 1000 * steps
    return {
        "steps": steps,
        "wall": wall_us / each,
        "compute": compute / each,
        "communication": sent / each,
        "exposed": (both - compute) / each,
        "kernels": {
            kind: {name[:80]: round(us / each, 3) for name, us in total.most_common(LONGEST)}
            for kind, total in totals.items()
        },
    }


class Watch:
    """Counts the steps of an optimizer and profiles some of them."""

    def __init__(self, out: Path, first: int, last: int) -> None:
        self.out, self.first, self.last = out, first, last
        self.done, self.began = 0, 0.0
        self.profile: profile | None = None

    def stepped(self) -> None:
        self.done += 1
        if self.done == self.first:
            self._settle()
            self.profile = profile(activities=[ACTIVITY])
            self.profile.__enter__()
            self.began = time.perf_counter()
        elif self.done == self.last and self.profile is not None:
            self._settle()
            wall = (time.perf_counter() - self.began) * 1e6
            self.profile.__exit__(None, None, None)
            found = figures(self.profile.events() or [], wall, self.last - self.first)
            rank = os.environ.get("RANK", "0")
            (self.out / f"profile-{rank}.json").write_text(json.dumps(found))

    @staticmethod
    def _settle() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def over(self, cls: Any) -> None:
        """Count every ``step`` of ``cls``."""
        own = cls.step

        @functools.wraps(own)
        def step(optimizer: Any, lr: float) -> Any:
            norm = own(optimizer, lr)
            self.stepped()
            return norm

        cls.step = step


def main() -> None:
    out, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    out.mkdir(parents=True, exist_ok=True)
    watch = Watch(out, first, last)
    for cls in (FlatOptimizer, ShardedOptimizer):
        watch.over(cls)
    sys.argv = ["dspark-train", *sys.argv[4:]]
    from dspark.train.cli import main as train

    train()


if __name__ == "__main__":
    main()
