"""One process of a training, whose steps FIRST + 2 to LAST are profiled: how much of a step its
GPU spends in communication, and where in the step it does nothing.

    torchrun --nproc-per-node 4 bench/scaling_profile.py OUT FIRST LAST [whole] FLAG...

The flags are those of ``dspark-train``. ``whole``: the draft is compiled as one, as a single
process compiles it, so that nothing is sent while it computes. Writes OUT/profile-RANK.json,
milliseconds per step: ``wall``, ``compute`` and ``communication`` (time in which at least one such
kernel runs), ``exposed`` (communication with no compute at the same time), and the longest
``kernels`` of each kind. A collective's time holds the wait for the slowest rank; the rank that
came last waits least, so the least of the ranks' figures is nearest to the transfer alone.

``idle`` is the rest. ``by_range``: what the host was doing (``RANGES``) when it launched the kernel
that ends a gap, with ``late``, the part of it in gaps that had begun before that launch, so that
the GPU waited for the host; in the others it waited for an event or for the kernel to start.
``short`` are gaps under 50 us, together; ``longest`` names the others' kernels. ``launches``: the
share of the kernels of which the launch is known (0: a kernel's begin stands for it). ``each``:
wall, exposed and idle of every step, that of FIRST + 1 too, which the start of the profiler delays
and which counts nowhere else.

On a CPU operations take the place of kernels. ``bench/scaling.py`` starts it.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dspark.train import loop, step
from dspark.train.data.feed import Feed
from dspark.train.distributed import World
from dspark.train.optim import flat, fsdp2
from dspark.train.run import setup
from dspark.train.run.window import Logged

COMMUNICATION = ("nccl", "gloo", "c10d")
CUDA = torch.cuda.is_available()
ACTIVITY = ProfilerActivity.CUDA if CUDA else ProfilerActivity.CPU
LONGEST = 6  # kernels listed of each kind
SHORT = 50_000  # ns
# Names of what the host does, and the functions that do it; the innermost counts, "loop" is the
# rest.
RANGES: list[tuple[str, Any, str]] = [
    ("exchange", loop, "share"),
    ("data", Feed, "fetch"),
    ("data", Feed, "_ahead"),
    ("pace", Feed, "queued"),
    ("forward", step, "learn"),
    ("objective", step, "objective"),
    ("backward", torch.Tensor, "backward"),
    ("reduce", World, "start_sum"),
    ("reduce", World, "start_sum_of_part"),
    ("update", flat.FlatOptimizer, "step"),
    ("update", fsdp2.ShardedOptimizer, "step"),
    ("norm", flat, "squares"),
    ("norm", fsdp2, "squares"),
    ("gather", flat.FlatOptimizer, "_refresh"),
    ("gather", flat, "_arrive"),
    ("log", Logged, "row"),
]
Spans = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Kernel:
    """``begin`` and ``end`` on the device, ``launched`` on the host (-1: not known), ns."""

    name: str
    begin: int
    end: int
    launched: int

    @property
    def sent(self) -> bool:
        return any(word in self.name.lower() for word in COMMUNICATION)


class Ranges:
    """When the host did what, ns."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int, str]] = []

    def around(self, name: str, owner: Any, attribute: str) -> None:
        """Note every call of a function, whichever thread makes it."""
        own = getattr(owner, attribute)

        @functools.wraps(own)
        def called(*args: Any, **kwargs: Any) -> Any:
            begin = time.time_ns()
            try:
                return own(*args, **kwargs)
            finally:
                self.found.append((begin, time.time_ns(), name))

        setattr(owner, attribute, called)

    def names(self) -> Callable[[int], str]:
        """Return a function from a time to the innermost range around it."""
        ends, innermost = [0], ["loop"]
        inside: list[tuple[int, str]] = []
        in_order = sorted(self.found, key=lambda r: (r[0], -r[1]))
        for begin, end, name in [*in_order, (1 << 62, 1 << 62, "loop")]:
            while inside and inside[-1][0] <= begin:
                ends.append(inside.pop()[0])
                innermost.append(inside[-1][1] if inside else "loop")
            ends.append(begin)
            innermost.append(name)
            inside.append((end, name))
        return lambda at: innermost[bisect_right(ends, at) - 1]


def union(spans: Iterable[tuple[int, int]]) -> Spans:
    """The same time without overlaps, in order."""
    out: Spans = []
    for begin, end in sorted(spans):
        if out and begin <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((begin, end))
    return out


def length(spans: Iterable[tuple[int, int]]) -> int:
    return sum(end - begin for begin, end in union(spans))


def kernels(events: Iterable[Any]) -> list[Kernel]:
    """Of a profile's raw events, with the launch of each, in order of their begin."""
    device, launches = [], dict[int, int]()
    for e in events:
        if e.is_user_annotation():
            continue
        on_gpu = e.device_type() == torch.autograd.DeviceType.CUDA
        if on_gpu or not CUDA:
            device.append(e)
        elif e.name().startswith("cu"):  # cudaLaunchKernel, cuLaunchKernelEx, cudaMemcpyAsync
            launches.setdefault(e.correlation_id(), e.start_ns())
    found = []
    for e in device:
        begin = e.start_ns()
        launched = launches.get(e.correlation_id(), -1) if launches else begin
        found.append(Kernel(e.name(), begin, begin + e.duration_ns(), launched))
    return sorted(found, key=lambda k: k.begin)


def cut(found: list[Kernel], begin: int, end: int) -> list[Kernel]:
    """The kernels, or their parts, between two times."""
    return [
        Kernel(k.name, max(k.begin, begin), min(k.end, end), k.launched)
        for k in found
        if k.end > begin and k.begin < end
    ]


def boundaries(found: list[Kernel], marks: list[int]) -> list[int]:
    """When the device came to each of ``marks``, which the host had reached when it had queued a
    step's update: the end of the last kernel launched before; a transfer may go on beside the next
    step.
    """
    own = sorted((k for k in found if k.launched >= 0 and not k.sent), key=lambda k: k.launched)
    at = [k.launched for k in own]
    return [own[max(0, bisect_right(at, mark) - 1)].end for mark in marks]


def gaps(found: list[Kernel], begin: int, end: int) -> list[tuple[int, str, Kernel | None]]:
    """Time without a kernel between two times: begin, the kernel before, the kernel after."""
    out, reached, last = list[tuple[int, str, Kernel | None]](), begin, "(begin)"
    for k in found:
        if k.begin > reached:
            out.append((reached, last, k))
        if k.end > reached:
            reached, last = k.end, k.name
    if reached < end:
        out.append((reached, last, None))
    return out


def idle(found: list[Kernel], begin: int, end: int, name_at: Any, steps: int) -> dict[str, Any]:
    """``figures``' ``idle``."""
    each = 1e6 * steps
    total: Counter[str] = Counter()
    late: Counter[str] = Counter()
    long, short, everything = [], 0, 0
    for start, before, after in gaps(found, begin, end):
        ns = (end if after is None else after.begin) - start
        known = after is not None and after.launched >= 0
        name = name_at(after.launched) if after and known else "unknown"
        waited = bool(after and known and after.launched >= start)
        everything += ns
        total[name] += ns
        late[name] += ns * waited
        if ns < SHORT:
            short += ns
        else:
            then = after.name[:60] if after else "(end)"
            long.append({"ms": ns / 1e6, "range": name, "late": waited})
            long[-1] |= {"after": before[:60], "before": then}
    long.sort(key=lambda gap: -gap["ms"])
    return {
        "ms": everything / each,
        "late": sum(late.values()) / each,
        "short": short / each,
        "by_range": {
            name: {"ms": round(ns / each, 3), "late": round(late[name] / each, 3)}
            for name, ns in total.most_common()
        },
        "longest": long[: 2 * LONGEST],
    }


def shares(found: list[Kernel]) -> tuple[int, int, int]:
    """Compute, communication, and time with either, ns."""
    kinds = [[(k.begin, k.end) for k in found if k.sent is sent] for sent in (False, True)]
    return length(kinds[0]), length(kinds[1]), length([*kinds[0], *kinds[1]])


def figures(found: list[Kernel], ends: list[int], name_at: Callable[[int], str]) -> dict[str, Any]:
    """What the module's docstring says, of steps that ended at ``ends`` on the device, the first of
    them the one that the profiler delays.
    """
    begin, end, steps = ends[0], ends[-1], len(ends) - 1
    within = cut(found, begin, end)
    compute, sent, both = shares(within)
    each = 1e6 * steps
    totals: dict[str, Counter[str]] = {"compute": Counter(), "communication": Counter()}
    for k in within:
        totals["communication" if k.sent else "compute"][k.name] += k.end - k.begin
    single = []
    for a, b in zip([found[0].begin, *ends[:-1]], ends, strict=True):
        of_step = shares(cut(found, a, b))
        parts = {"wall": b - a, "exposed": of_step[2] - of_step[0], "idle": b - a - of_step[2]}
        single.append({name: round(ns / 1e6, 2) for name, ns in parts.items()})
    return {
        "steps": steps,
        "launches": sum(0 <= k.launched < k.begin for k in found) / len(found),
        "wall": (end - begin) / each,
        "compute": compute / each,
        "communication": sent / each,
        "exposed": (both - compute) / each,
        "idle": idle(within, begin, end, name_at, steps),
        "each": single,
        "kernels": {
            kind: {name[:80]: round(ns / each, 3) for name, ns in total.most_common(LONGEST)}
            for kind, total in totals.items()
        },
    }


class Watch:
    """Counts the steps of an optimizer and profiles some of them."""

    def __init__(self, out: Path, first: int, last: int) -> None:
        self.out, self.first, self.last = out, first, last
        self.done, self.marks = 0, list[int]()
        self.ranges = Ranges()
        self.profile: profile | None = None

    def begins(self) -> None:
        """Start the profiler when step FIRST has been logged; the first one of a process takes long
        to start, so there is one after the first step.
        """
        if self.done == 1:
            with profile(activities=[ACTIVITY]):
                torch.zeros(1, device="cuda" if CUDA else "cpu").add_(1)
        if self.done == self.first and self.profile is None:
            self.ranges.found.clear()
            self.profile = profile(activities=[ACTIVITY])
            self.profile.__enter__()

    def stepped(self) -> None:
        self.done += 1
        if self.profile is not None:
            self.marks.append(time.time_ns())
        if self.done != self.last or self.profile is None:
            return
        if CUDA:
            torch.cuda.synchronize()
        self.profile.__exit__(None, None, None)
        found = kernels(self.profile.profiler.kineto_results.events())  # type: ignore[union-attr]
        ends = boundaries(found, self.marks)
        written = figures(found, ends, self.ranges.names())
        rank = os.environ.get("RANK", "0")
        (self.out / f"profile-{rank}.json").write_text(json.dumps(written))

    def over(self) -> None:
        """Follow every function of ``RANGES``, the beginning of a step and its end."""
        for name, owner, attribute in RANGES:
            self.ranges.around(name, owner, attribute)
        self._beside(loop, "share", before=self.begins)
        for cls in (flat.FlatOptimizer, fsdp2.ShardedOptimizer):
            self._beside(cls, "step", after=self.stepped)

    @staticmethod
    def _beside(
        owner: Any,
        attribute: str,
        before: Callable[[], None] = lambda: None,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        own = getattr(owner, attribute)

        @functools.wraps(own)
        def called(*args: Any, **kwargs: Any) -> Any:
            before()
            result = own(*args, **kwargs)
            after()
            return result

        setattr(owner, attribute, called)


def compile_whole() -> None:
    """Compile the draft as one process does, whatever the number of processes."""
    compiled = setup.compile_draft
    setup.compile_draft = lambda model, *, in_parts: compiled(model, in_parts=False)
    flat.FlatOptimizer.follow = lambda self, parts: None  # type: ignore[method-assign]


def main() -> None:
    out, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    out.mkdir(parents=True, exist_ok=True)
    flags = sys.argv[4:]
    if flags[:1] == ["whole"]:
        flags.pop(0)
        compile_whole()
    Watch(out, first, last).over()
    sys.argv = ["dspark-train", *flags]
    from dspark.train.cli import main as train

    train()


if __name__ == "__main__":
    main()
