"""The training loop: stream -> draft -> objective -> optimizer, with checkpoints, validation and numbers on the way."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from dspark.cache.disk import write_file
from dspark.cache.errors import ExistsError, MismatchError, TrainError
from dspark.train import checkpoint
from dspark.train.checkpoint import Position
from dspark.train.config import TrainConfig
from dspark.train.evaluate import evaluate
from dspark.train.export import save_draft
from dspark.train.metrics import Score, SlotMetrics
from dspark.train.objective import Denominators, SlotInputs, objective
from dspark.train.optim import learning_rate
from dspark.train.report import Report
from dspark.train.setup import Run, prepare
from dspark.train.stream import VALIDATION_EPOCH, Row

TRAINING = "training.json"  # the config of the run, beside the draft
STORE = "store.json"  # which store it was trained on; the path may change between a run and its resumption, the store may not


@dataclass(slots=True)
class Window:
    """What is summed between two logged rows."""

    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    tokens: int = 0
    steps: int = 0

    def restart(self) -> None:
        self.started, self.waited, self.tokens, self.steps = time.perf_counter(), 0.0, 0, 0


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
    progress: Callable[[int, int, str], None] = lambda step, total, text: None,
) -> dict[str, Any]:
    """Train a draft into ``config.output``; returns the last validation (or training) metrics.

    ``progress(step, total, text)`` is called once a step. KeyboardInterrupt saves a checkpoint and is raised on.
    """
    output = Path(config.output)
    claim(output, config, resume=resume, overwrite=overwrite)
    run = prepare(config)
    if resume:
        same_store(output, run)
    output.mkdir(parents=True, exist_ok=True)
    write_file(output / STORE, (json.dumps(store_identity(run), indent=1) + "\n").encode())
    write_file(output / TRAINING, (json.dumps(config.to_json(), indent=1) + "\n").encode())
    position = Position()
    whole = checkpoint.found(output / "checkpoints")
    if resume and whole:
        position = checkpoint.load(whole[-1], run.optimizer)
    report = Report(output, position.step, config.tensorboard)
    try:
        return _loop(run, position, output, report, progress)
    finally:
        report.close()


def claim(output: Path, config: TrainConfig, *, resume: bool, overwrite: bool) -> None:
    """Refuse to write into a folder that holds something else, or another run."""
    if not output.exists() or not any(output.iterdir()):
        return
    previous = output / TRAINING
    if overwrite and previous.is_file():
        shutil.rmtree(output)
        return
    if not previous.is_file():
        raise ExistsError(f"{output} exists and holds no dspark training. Choose another --output.")
    if not resume:
        raise ExistsError(
            f"{output} holds a training run. Use --resume to go on with it, --overwrite to replace it, or another --output."
        )
    config.continues(TrainConfig.from_json(json.loads(previous.read_text()), str(previous)), str(output))


def store_identity(run: Run) -> dict[str, Any]:
    """What makes a store this store, for a person and for ``--resume``."""
    m = run.cache.manifest
    return {
        "target": m.target.id,
        "revision": m.target.revision,
        "weights_sha256": m.target.weights_sha256,
        "layers": m.layers,
        "aux_bits": m.aux.bits,
        "last_bits": m.last.bits,
        "source": m.source.id,
        "source_sha256": m.source.sha256,
        "samples": m.counts.samples,
        "tokens": m.counts.tokens,
    }


def same_store(output: Path, run: Run) -> None:
    """Raise MismatchError, naming every difference, if the run in ``output`` was begun on another store."""
    path = output / STORE
    if not path.is_file():
        return  # nothing was trained there yet
    then, now = json.loads(path.read_text()), store_identity(run)
    diffs = [
        f"{k}: {then.get(k)!r} there, {now[k]!r} in {run.config.cache}" for k in now if then.get(k) != now[k]
    ]
    if diffs:
        raise MismatchError(
            f"{output} was begun on another store: "
            + "; ".join(diffs)
            + ". Use that one, or another --output."
        )


def _loop(
    run: Run, position: Position, output: Path, report: Report, progress: Callable[[int, int, str], None]
) -> dict[str, Any]:
    config, schedule = run.config, Schedule.of(run)
    report.log.info(
        "steps=%d steps_per_epoch=%d draft=%s", schedule.total, schedule.per_epoch, run.model.config
    )
    window, result = Window(), dict[str, Any]()
    clock = time.perf_counter() - position.seconds
    with Interrupt() as interrupt:
        cuda = run.compute.device.type == "cuda"
        steps = run.stream.steps_from(
            position.epoch, position.epoch_step, workers=run.workers, pin=cuda, endless=True
        )
        while position.step < schedule.total:
            if position.epoch_step == run.stream.steps(position.epoch):
                position = dataclasses.replace(position, epoch=position.epoch + 1, epoch_step=0)
            before = time.perf_counter()
            rows = next(steps)
            window.waited += time.perf_counter() - before
            metrics, sums, lr = step(run, rows, position.step, schedule.total)
            used = sum(r.tokens for r in rows)
            window.tokens += used
            window.steps += 1
            position = dataclasses.replace(
                position,
                step=position.step + 1,
                epoch_step=position.epoch_step + 1,
                tokens=position.tokens + used,
                seconds=time.perf_counter() - clock,
            )
            last = position.step == schedule.total
            milestone = position.step % schedule.every == 0 or last
            # A milestone is logged too: that is where a non-finite loss stops, before it is saved.
            if position.step % config.log_every == 0 or position.step == 1 or milestone:
                result = _train_row(run, position, metrics, sums, lr, window)
                report.row(result)
                window.restart()
            progress(position.step, schedule.total, _line(result))
            if interrupt.asked:
                saved = checkpoint.save(
                    output / "checkpoints", position, run.optimizer, config.keep_checkpoints
                )
                report.log.info("interrupted at step %d; saved %s", position.step, saved)
                raise KeyboardInterrupt
            if milestone:
                result = _milestone(run, position, output, report) or result
                window.restart()
    return result


class Interrupt:
    """Ctrl-C sets a flag that the loop reads between steps, so that no step is cut in half; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interrupt:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._old = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *unused: object) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._old)


def step(run: Run, rows: list[Row], number: int, total: int) -> tuple[SlotMetrics, Tensor, float]:
    """One optimizer step over ``rows``: forward and backward a row at a time, denominators shared by all of them."""
    config, model, compute = run.config, run.model, run.compute
    head = model.frozen_head
    to_draft = None if head.to_draft is None else head.to_draft.cpu()
    shared = Denominators(0.0, 0.0, 0.0)
    for row in rows:
        shared = shared + Denominators.of(row.batch, config.decay, to_draft)
    metrics = SlotMetrics(config.block_size, compute.device)
    loss = torch.zeros((), device=compute.device)
    for row in rows:
        if row.batch.slots.numel() == 0:  # no anchor in it: nothing to learn from
            continue
        batch = row.place(run.cache, compute.device, compute.dtype)
        states = model(batch, model.plan(batch, compute.backend))
        slots = SlotInputs.gather(batch, states, config.decay)
        out = objective(slots, head, run.objective, shared)
        out.loss.backward()  # type: ignore[no-untyped-call]
        loss += out.loss.detach()
        with torch.no_grad():
            metrics.add(batch, slots, out)
    lr = learning_rate(number, total, config.lr, config.warmup_ratio, config.min_lr_ratio)
    return metrics, torch.stack([run.optimizer.step(lr), loss]), lr


def _train_row(
    run: Run, position: Position, metrics: SlotMetrics, norm_and_loss: Tensor, lr: float, window: Window
) -> dict[str, Any]:
    """The numbers of the step just done (losses) and of the window (speed)."""
    grad_norm, loss = norm_and_loss.tolist()
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise TrainError(
            f"step {position.step} (epoch {position.epoch}): loss {loss}, gradient norm {grad_norm}; expected finite numbers. "
            "Lower --lr, or look at the store with dspark-tools stats."
        )
    seconds = time.perf_counter() - window.started
    values = metrics.result()
    return {
        "step": position.step,
        "epoch": round(position.epoch + position.epoch_step / max(1, run.stream.steps(position.epoch)), 4),
        "loss": loss,
        **{
            k: values[k]
            for k in ("ce_loss", "l1_loss", "confidence_loss", "accept_rate", "mean_accepted_length")
        },
        "lr": lr,
        "grad_norm": grad_norm,
        "tokens": position.tokens,
        "tokens_per_second": window.tokens / seconds,
        "step_ms": 1000.0 * seconds / max(1, window.steps),
        "data_wait_fraction": window.waited / seconds,
    }


def _milestone(run: Run, position: Position, output: Path, report: Report) -> dict[str, Any] | None:
    """Validate, export, checkpoint."""
    row = None
    if run.validation is not None:
        row = {"step": position.step, "epoch": position.epoch, "validation": True, **validate(run)}
        report.row(row)
    save_draft(output, run.model)
    # Last: a run killed before this resumes from the checkpoint before and makes the rows above again.
    checkpoint.save(output / "checkpoints", position, run.optimizer, run.config.keep_checkpoints)
    return row


def validate(run: Run) -> Score:
    """Metrics on the held-out prompts; the same anchors every time."""
    assert run.validation is not None
    rows = (row for rows in run.validation.steps_from(VALIDATION_EPOCH) for row in rows)
    return evaluate(
        run.model,
        run.cache,
        rows,
        device=run.compute.device,
        dtype=run.compute.dtype,
        decay=run.config.decay,
        backend=run.compute.backend,
    )


def _line(row: dict[str, Any]) -> str:
    if not row:
        return ""
    tau = row.get("mean_accepted_length")
    parts = [f"loss {row['loss']:.3f}" if "loss" in row else "held out", f"tau {tau:.2f}" if tau else ""]
    if "tokens_per_second" in row:
        parts += [f"{row['tokens_per_second']:.0f} tok/s", f"wait {100 * row['data_wait_fraction']:.0f} %"]
    return "  ".join(p for p in parts if p)
