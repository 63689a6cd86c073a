"""The training loop: stream -> draft -> objective -> optimizer, with checkpoints, validation and numbers on the way.

One process, or several that torchrun started: each runs this loop over its rows of every step; rank 0 alone writes. The device is asked
for a value only at logged steps, and then when the next step is queued already.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from dspark.cache.errors import TrainError
from dspark.cache.files.lock import Lock
from dspark.cache.files.lock_files import owned
from dspark.train import distributed
from dspark.train.config import TrainConfig
from dspark.train.data.batch import Batch
from dspark.train.data.feed import Feed
from dspark.train.data.row import Row
from dspark.train.data.stream import VALIDATION_EPOCH
from dspark.train.distributed import World, lost_peers
from dspark.train.draft.folder import save_draft
from dspark.train.evaluate import ANCHORS_AT_ONCE, evaluate, walked
from dspark.train.objective.metrics import Score, SlotMetrics
from dspark.train.run import checkpoint, folder, history, memory
from dspark.train.run.checkpoint import Position
from dspark.train.run.loggers import Loggers
from dspark.train.run.report import Report
from dspark.train.run.setup import Run, prepare
from dspark.train.run.window import Logged, Moment, Window
from dspark.train.step import blanks, share, step

Progress = Callable[[int, int, str], None]
UNSAVED = "These weights were not saved. Lower --lr, or look at the store with dspark-tools stats."


@dataclass(frozen=True, slots=True)
class Schedule:
    """Steps of the whole run and when to stop for a checkpoint."""

    total: int
    per_epoch: int
    every: int

    @classmethod
    def of(cls, run: Run) -> Schedule:
        per_epoch = run.stream.steps(0)
        total = run.config.max_steps or max(1, math.ceil(run.config.epochs * per_epoch))
        return cls(total, per_epoch, max(1, round(run.config.checkpoint_freq * per_epoch)))


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    break_lock: bool = False,
    progress: Progress = lambda step, total, text: None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train a draft into ``config.output``; returns the last validation (or training) metrics.

    ``progress(step, total, text)`` is called once per step, ``say`` once with what the run is. KeyboardInterrupt (and SIGTERM) saves a
    checkpoint and is raised on. Under torchrun every process calls this; if one fails, all raise.
    """
    world = distributed.join(config.device, config.strategy)
    with ExitStack() as stack, lost_peers():
        lock = world.agreed(lambda: stack.enter_context(locked(config, break_lock)) if world.first else None)
        result = _train(config, world, resume, overwrite, progress, say, lock)
    world.leave()
    return result


def locked(config: TrainConfig, break_lock: bool) -> AbstractContextManager[Lock]:
    """The lock of the output folder, within it: the folder may be a mount of its own."""
    folder.refuse_file(Path(config.output))
    return owned(Path(config.output), "dspark-train", inside=True, break_lock=break_lock)


def _train(
    config: TrainConfig,
    world: World,
    resume: bool,
    overwrite: bool,
    progress: Progress,
    say: Callable[[str], None],
    lock: Lock | None,
) -> dict[str, Any]:
    output = Path(config.output)

    def first(work: Callable[[], None]) -> None:
        world.agreed(lambda: work() if world.first else None)

    first(lambda: folder.claim(output, config, resume=resume, overwrite=overwrite))
    run = world.agreed(lambda: prepare(config, world))
    if lock:
        run = dataclasses.replace(run, guard=lock.check)
    first(lambda: folder.begin(output, run, resume=resume, overwrite=overwrite))
    position = Position()
    whole = checkpoint.found(output / "checkpoints")
    if resume and whole:
        position = world.agreed(lambda: checkpoint.load(whole[-1], run.optimizer))
    report = None
    if world.first:
        loggers = Loggers(config.loggers, output, config.to_json(), position.step, say)
        report = Report(output, position.step, loggers)
    text = memory.describe(run) + (f"\n{run.start.words()}" if run.start else "")
    say(text)
    try:
        if report:
            report.log.info("%s", text)
        if not world.first:
            return _loop(run, position, output, report, progress)
        with history.session(output, run, position.step, resumed=resume) as session:
            return _loop(run, position, output, report, progress, session)
    finally:
        if report:
            report.close()


def _loop(
    run: Run,
    position: Position,
    output: Path,
    report: Report | None,
    progress: Progress,
    session: history.Session | None = None,
) -> dict[str, Any]:
    config, schedule, world = run.config, Schedule.of(run), run.world
    if report:
        report.log.info(
            "steps=%d steps_per_epoch=%d draft=%s", schedule.total, schedule.per_epoch, run.model.config
        )
    result = dict[str, Any]()
    logged: Logged | None = None  # a step whose numbers are still to be read

    def settle() -> None:
        nonlocal result, logged
        if logged is None:
            return
        row, at, logged = logged.row(), logged.position, None
        world.agreed(lambda: _finite(at, row["loss"], row["grad_norm"]))
        result = row
        if report:
            report.row(row)

    clock, device = time.perf_counter() - position.seconds, run.compute.device
    with Interrupt(alone=world.size == 1) as interrupt:
        feed = Feed(rows_from(run, position), placer(run), device)
        window = Window(Moment(device))
        while position.step < schedule.total:
            if position.epoch_step == run.stream.steps(position.epoch):
                position = dataclasses.replace(position, epoch=position.epoch + 1, epoch_step=0)
            part = share(run, feed.take, lambda: interrupt.asked, settle)
            if part.stop:
                settle()
                _save(run, position, output, export=False)
                if session:
                    session.reached = position.step
                if report:
                    report.log.info("interrupted at step %d; saved", position.step)
                raise KeyboardInterrupt
            number = position.step + 1
            milestone = number % schedule.every == 0 or number == schedule.total
            # A milestone is logged too: a non-finite loss stops there. What its own update did, _save looks at.
            wanted = number % config.log_every == 0 or number == 1 or milestone
            metrics = SlotMetrics(run.model.config.block_size, device) if wanted else None
            values, lr = step(run, feed, part, position.step, schedule.total, metrics)
            window.tokens += part.tokens
            window.steps += 1
            position = dataclasses.replace(
                position,
                step=number,
                epoch_step=position.epoch_step + 1,
                tokens=position.tokens + part.tokens,
                seconds=time.perf_counter() - clock,
            )
            if number < schedule.total:
                feed.fetch()  # before anything below waits for the device
            settle()  # of the step before
            if metrics is not None:
                logged = Logged.begin(run, position, metrics, values, lr, window, feed.waited)
                window = Window(logged.ended, feed.waited)
            if milestone:
                settle()
            progress(position.step, schedule.total, _line(result))
            if milestone:
                result = _milestone(run, position, output, report) or result
                if session:
                    session.reached = position.step
                    session.write(history.RUNNING)
                window = Window(Moment(device), feed.waited)
    return result


def rows_from(run: Run, position: Position) -> Iterator[list[Row]]:
    """This rank's rows of each step from ``position`` on, without end."""
    return run.stream.steps_from(
        position.epoch,
        position.epoch_step,
        workers=run.workers,
        pin=run.compute.device.type == "cuda",
        rank=run.world.rank,
        world=run.world.size,
        endless=True,
    )


def placer(run: Run) -> Callable[[Row], Batch]:
    """Brings a row to the run's device, decoded."""
    layers = run.model.config.target_layer_ids
    return lambda row: row.place(run.cache, run.compute.device, run.compute.dtype, layers)


class Interrupt:
    """Ctrl-C and SIGTERM set a flag that the loop reads between steps, so that no step is cut in half.

    A second Ctrl-C stops a process that is ``alone`` at once. Under torchrun each process gets the signal twice, from the terminal and
    from the launcher, which itself kills what does not end in 30 s; there the flag is all.
    """

    def __init__(self, *, alone: bool) -> None:
        self.asked, self.alone = False, alone

    def __enter__(self) -> Interrupt:
        self._old: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._old = {n: signal.signal(n, self._ask) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and self.alone:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def _finite(position: Position, loss: float, grad_norm: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise TrainError(
            f"step {position.step} (epoch {position.epoch}): loss {loss}, gradient norm {grad_norm}; expected finite numbers. "
            "Lower --lr, or look at the store with dspark-tools stats."
        )


def _milestone(run: Run, position: Position, output: Path, report: Report | None) -> dict[str, Any] | None:
    """Validate, export, checkpoint."""
    row = None
    if run.validation is not None:
        row = {"step": position.step, "epoch": position.epoch, "validation": True, **validate(run)}
        run.world.agreed(lambda: _finite_scores(row))
        if report:
            report.row(row)
    # Last: a run killed before this resumes from the checkpoint before and makes the rows above again.
    best = run.world.first and _best_so_far(run.config.select, output, row)
    _save(run, position, output, export=best)
    return row


def _best_so_far(select: str, output: Path, row: dict[str, Any] | None) -> bool:
    """Whether no validation before this ``row`` gave more; metrics.jsonl holds them, of the steps before a resumption too."""
    if select == "last" or row is None:
        return True
    rows = [json.loads(line) for line in (output / folder.METRICS).read_text().splitlines()]
    earlier = [
        r[select]
        for r in rows
        if r.get("validation") and r["step"] < row["step"] and r.get(select) is not None
    ]
    return row[select] is not None and row[select] > max(earlier, default=-math.inf)


def _finite_scores(row: dict[str, Any]) -> None:
    """The losses of the logged step were of the weights before its update; these are of those that would be saved."""
    wrong = {k: v for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    if wrong:
        raise TrainError(
            f"validation after step {row['step']}: {', '.join(f'{k} {v}' for k, v in wrong.items())}; expected finite numbers. {UNSAVED}"
        )


def _save(run: Run, position: Position, output: Path, *, export: bool) -> None:
    """A checkpoint and, if asked, the draft itself: gathered by all ranks, written by the first. Nothing is written that is not finite."""
    snapshot = run.optimizer.snapshot()

    def write() -> None:
        if not run.world.first:
            return
        if wrong := snapshot.non_finite():
            raise TrainError(f"after step {position.step} {wrong} has values that are not finite. {UNSAVED}")
        run.guard()
        if export:
            save_draft(output, run.model, trained=snapshot.masters)
        checkpoint.save(output / "checkpoints", position, snapshot, run.config.keep_checkpoints)

    run.world.agreed(write)


def validate(run: Run) -> Score:
    """Metrics on the held-out prompts; the same anchors every time. Each rank scores its rows."""
    compute, config = run.compute, run.config
    score = evaluate(
        run.model, run.cache, _held_out(run), device=compute.device, dtype=compute.dtype, decay=config.decay, backend=compute.backend,
        reduce=run.world.sum_,
    )  # fmt: skip
    if not config.val_walk_rows:
        return score
    # Of a sharded model the weights are gathered by now, so ranks may differ in the number of passes.
    walk = walked(
        run.model, run.cache, itertools.islice(_rows_of_this_rank(run), -(-config.val_walk_rows // run.world.size)), device=compute.device,
        dtype=compute.dtype, backend=compute.backend, anchors_at_once=config.max_anchors or ANCHORS_AT_ONCE,
        pad=run.stream.pad,
    )  # fmt: skip
    run.world.sum_(walk.sums)
    return {**score, **walk.result()}


def _rows_of_this_rank(run: Run) -> Iterator[Row]:
    assert run.validation is not None
    for rows in run.validation.steps_from(VALIDATION_EPOCH, rank=run.world.rank, world=run.world.size):
        yield from rows


def _held_out(run: Run) -> Iterator[Row | Batch]:
    stream = run.validation
    assert stream is not None
    for rows in stream.steps_from(VALIDATION_EPOCH, rank=run.world.rank, world=run.world.size):
        yield from rows
        yield from blanks(run, sum(row.slots > 0 for row in rows))


def _line(row: dict[str, Any]) -> str:
    if not row:
        return ""
    tau = row.get("mean_accepted_length")
    parts = [f"loss {row['loss']:.3f}" if "loss" in row else "held out", f"tau {tau:.2f}" if tau else ""]
    if "tokens_per_second" in row:
        parts += [f"{row['tokens_per_second']:.0f} tok/s", f"wait {100 * row['data_wait_fraction']:.0f} %"]
    return "  ".join(p for p in parts if p)
