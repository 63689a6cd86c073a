"""The training loop: stream, draft, objective, optimizer, with checkpoints, validation and metrics.
It runs in one process, or in several that torchrun started: each runs this loop over its rows of
every step; only rank 0 writes. Values are read from the device only at logged steps, after the next
step is queued.
"""

from __future__ import annotations

import dataclasses
import math
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from dspark.cache.errors import Stopped, TrainError
from dspark.cache.files.lock import Lock
from dspark.cache.files.lock_files import owned
from dspark.cache.shared.own_process import starting
from dspark.cache.shared.stopping import Stopping
from dspark.train import distributed
from dspark.train.config import SELECT, TrainConfig
from dspark.train.data.batch import Batch
from dspark.train.data.feed import Feed
from dspark.train.data.held import HeldOut
from dspark.train.data.row import PackedRow
from dspark.train.distributed import World, lost_peers
from dspark.train.objective.metrics import SlotMetrics
from dspark.train.run import checkpoint, folder, history, memory
from dspark.train.run.checkpoint import Position
from dspark.train.run.loggers import Loggers
from dspark.train.run.report import RunLog
from dspark.train.run.saving import UNSAVED, Saving
from dspark.train.run.setup import Run, prepare, rows_of
from dspark.train.run.sound import check_numbers, check_states
from dspark.train.run.stops import interrupted, saved_in
from dspark.train.run.window import Logged, Moment, Window
from dspark.train.step import share, step
from dspark.train.validation import validate

Progress = Callable[[int, int, str], None]


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

    ``progress(step, total, text)`` is called once per step, ``say`` once with a description of the
    run. SIGINT, SIGTERM and SIGHUP save a checkpoint and raise Stopped. Under torchrun every
    process calls this; if one fails, all raise.
    """
    world = distributed.join(config.device, config.strategy)
    safe = saved_in(Path(config.output), resume=resume)
    outer = Stopping(
        lambda: "stopping before the first step", safe, speaks=world.first, alone=world.size == 1
    )
    with ExitStack() as stack, lost_peers(), interrupted(safe), outer:
        lock = world.agreed(
            lambda: stack.enter_context(locked(config, break_lock)) if world.first else None
        )
        result = _train(config, world, resume, overwrite, progress, say, lock)
    world.leave()
    return result


def locked(config: TrainConfig, break_lock: bool) -> AbstractContextManager[Lock]:
    """Lock the output folder by a file within it, since the folder may be a mount point."""
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
    # A training that is resumed reads only from where its checkpoint stands.
    with starting():
        run = world.agreed(lambda: prepare(config, world, None if resume else Position()))
    if lock:
        run = dataclasses.replace(run, guard=lock.check)
    first(lambda: folder.begin(output, run, resume=resume, overwrite=overwrite))
    position = Position()
    hosts = world.hosts()
    if resume and (newest := _newest(output, world)):
        position = world.agreed(
            lambda: checkpoint.load(newest, run.optimizer, folder.content(*run.cache.stores))
        )
    report = None
    if world.first:
        loggers = Loggers(config.loggers, output, config.to_json(), position.step, say)
        report = RunLog(output, position.step, loggers)
    text = memory.describe(run) + (f"\n{run.start.words()}" if run.start else "")
    say(text)
    try:
        if report:
            report.log.info("%s", text)
            report.log.info("%s", hosts)
        if not world.first:
            return _loop(run, position, output, report, progress)
        with history.session(output, run, position.step, resumed=resume) as session:
            return _loop(run, position, output, report, progress, session)
    finally:
        if report:
            report.close()


def _newest(output: Path, world: World) -> Path | None:
    """Return the newest complete checkpoint of rank 0, which writes them; None if there is none.
    Raises TrainError on a node that does not see it.
    """
    found = checkpoint.found(output / "checkpoints")
    name = world.gather(found[-1].name if found else None)[0]
    if name is None:
        return None
    path = output / "checkpoints" / name

    def there() -> None:
        if path.name not in [p.name for p in found]:
            raise TrainError(
                f"{path} is not on {socket.gethostname()}, but rank 0 continues from it. "
                "Checkpoints are written by rank 0: put --output on a file system that "
                "all nodes share, or copy its folder `checkpoints` to the same path on "
                "every node."
            )

    world.agreed(there)
    return path


def _stop(saving: Saving, position: Position, output: Path, report: RunLog | None) -> NoReturn:
    """Save a checkpoint at ``position`` and raise Stopped."""
    saving.save(position, export=False)
    saving.wait()
    if report:
        report.log.info("interrupted at step %d; saved", position.step)
    raise Stopped(f"stopped. {saved_in(output)()}")


def _loop(
    run: Run,
    position: Position,
    output: Path,
    report: RunLog | None,
    progress: Progress,
    session: history.Session | None = None,
) -> dict[str, Any]:
    config, schedule, world = run.config, Schedule.of(run), run.world
    if report:
        report.log.info(
            "steps=%d steps_per_epoch=%d draft=%s",
            schedule.total,
            schedule.per_epoch,
            run.model.config,
        )
    result = dict[str, Any]()
    logged: Logged | None = None  # a step whose numbers are still to be read

    def settle() -> None:
        nonlocal result, logged
        if logged is None:
            return
        # On the host by now: what is on the device lies behind the step just queued, and waiting
        # for that would leave it idle.
        row, read, logged = logged.row(), logged, None

        def look() -> None:
            check_states(run, read.window.done, read.states)
            check_numbers(run, read.position, row["loss"], row["grad_norm"])

        world.agreed(look)
        result = row
        if report:
            report.row(row)

    clock, device = time.perf_counter() - position.seconds, run.compute.device
    interrupt = Stopping(
        lambda: f"finishing the step after {position.step}, then saving a checkpoint",
        saved_in(output),
        raises=False,
        alone=world.size == 1,
        speaks=world.first,
    )
    saved = session.saved if session else lambda step: None
    # Outermost: a signal while readers end must not raise there.
    with interrupt, ExitStack() as stack, Saving(run, output, saved) as saving:
        rows = run.rows or world.agreed(lambda: rows_from(run, position))
        feed = stack.enter_context(Feed(rows, placer(run), device))
        held_out = stack.enter_context(held) if (held := world.agreed(lambda: kept(run))) else None
        window = Window(Moment(device))

        def take() -> list[PackedRow]:
            saving.check()
            return feed.take()

        while position.step < schedule.total:
            if position.epoch_step == run.stream.steps(position.epoch):
                position = dataclasses.replace(position, epoch=position.epoch + 1, epoch_step=0)
            part = share(run, take, lambda: interrupt.asked, settle)
            if part.stop:
                settle()
                # since the last logged one
                world.agreed(partial(check_states, run, window.done, window.states))
                _stop(saving, position, output, report)
            number = position.step + 1
            milestone = number % schedule.every == 0 or number == schedule.total
            # A milestone is logged too: a non-finite loss stops there. Saving checks what its own
            # update did.
            wanted = number % config.log_every == 0 or number == 1 or milestone
            metrics = SlotMetrics(run.model.config.block_size, device) if wanted else None
            values, lr = step(run, feed, part, position.step, schedule.total, metrics)
            window.tokens += part.tokens
            position = dataclasses.replace(
                position,
                step=number,
                epoch_step=position.epoch_step + 1,
                tokens=position.tokens + part.tokens,
                seconds=time.perf_counter() - clock,
            )
            window.done.append(position)
            window.states.append(values[2])
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
                row, position = _milestone(run, held_out, position, saving, report)
                result = row or result
                window = Window(Moment(device), feed.waited)
        saving.wait()
    return result


def rows_from(run: Run, position: Position) -> Iterator[list[PackedRow]]:
    """Return this rank's rows of each step from ``position`` on; starts their readers."""
    return rows_of(run.stream, position, run.compute, run.world, run.workers)


def kept(run: Run) -> HeldOut | None:
    """Return this rank's held-out rows, None if there are none; starts their readers."""
    if run.validation is None:
        return None
    world = run.world
    return HeldOut(
        run.validation,
        rank=world.rank,
        world=world.size,
        local=world.local_size,
        workers=run.workers,
    )


def placer(run: Run) -> Callable[[PackedRow], Batch]:
    """Return a function that brings a row to the run's device, decoded."""
    layers = run.model.config.target_layer_ids
    return lambda row: row.place(run.cache, run.compute.device, run.compute.dtype, layers)


def _milestone(
    run: Run,
    held_out: HeldOut | None,
    position: Position,
    saving: Saving,
    report: RunLog | None,
) -> tuple[dict[str, Any] | None, Position]:
    """Validate, and start to save draft and checkpoint; returns the validation's row, and the
    position with the best of all of them.
    """
    row = None
    run.optimizer.ready()
    if held_out is not None:
        # One rank's reader may have died; the others would wait for it in a collective call.
        run.world.agreed(held_out.fetch)
        scores = validate(run, held_out)
        row = {"step": position.step, "epoch": position.epoch, "validation": True, **scores}
        run.world.agreed(lambda: _finite_scores(row))
        if report:
            report.row(row)
    # Last: a run killed before this resumes from the previous checkpoint and writes the rows above
    # again.
    best = _best_so_far(run.config.select, position.best, row)
    position = dataclasses.replace(position, best=_best(position.best, row))
    saving.save(position, export=best)
    return row, position


def _best_so_far(select: str, best: Mapping[str, float], row: dict[str, Any] | None) -> bool:
    """Tell whether no validation before this ``row`` was better; ``best`` is the highest of each
    metric before it.
    """
    if select == "last" or row is None:
        return True
    return row[select] is not None and row[select] > best.get(select, -math.inf)


def _best(best: Mapping[str, float], row: dict[str, Any] | None) -> dict[str, float]:
    """Return the highest of each metric that may select the draft, including ``row``."""
    here = {n: row[n] for n in SELECT if row and row.get(n) is not None}
    return {n: max(best.get(n, -math.inf), here.get(n, -math.inf)) for n in {*best, *here}}


def _finite_scores(row: dict[str, Any]) -> None:
    """Check that the scores are finite. The losses of the logged step belong to the weights before
    its update; these belong to the weights that would be saved.
    """
    wrong = {k: v for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    if wrong:
        raise TrainError(
            f"validation after step {row['step']}: "
            f"{', '.join(f'{k} {v}' for k, v in wrong.items())}; expected finite numbers. "
            f"{UNSAVED}"
        )


def _line(row: dict[str, Any]) -> str:
    if not row:
        return ""
    tau = row.get("mean_accepted_length")
    parts = [
        f"loss {row['loss']:.3f}" if "loss" in row else "held out",
        f"tau {tau:.2f}" if tau else "",
    ]
    if "tokens_per_second" in row:
        parts += [
            f"{row['tokens_per_second']:.0f} tok/s",
            f"wait {100 * row['data_wait_fraction']:.0f} %",
        ]
    return "  ".join(p for p in parts if p)
