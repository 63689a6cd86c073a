"""What tests/train/test_ranks.py starts under torchrun: several trainings after each other on the
same processes.

torchrun ... ranks_script.py JOBS.json: a list of {"config", "resume", "stop", "break_rank",
"break_load", "kill_reader", "break_take", "break_save", "overlap"}; what each rank's train() raised
goes to JOBS.json.RANK as a list of [type, message, exit code] or null.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import safetensors.torch
import torch.distributed as dist

from dspark.cache.errors import DamagedCacheError, StoreWriteError
from dspark.train import step
from dspark.train.config import TrainConfig
from dspark.train.data.feed import Feed
from dspark.train.data.row import PackedRow
from dspark.train.data.stream import Rows
from dspark.train.distributed import rank_here
from dspark.train.loop import train
from dspark.train.optim import flat
from dspark.train.run import checkpoint
from dspark.train.run.setup import Run


class Stop(Exception):
    """Raised by a progress callback, in place of a crash."""


@contextmanager
def overlapping() -> Iterator[None]:
    """Check that sums begin within a step's last backward pass and that new values arrive within
    the next forward pass. Buckets are small: the draft has several.
    """
    learn, bucket, late = step.learn, flat.BUCKET, 0

    def watched(run: Run, *rest: Any) -> Any:
        nonlocal late
        optimizer = run.optimizer
        assert isinstance(optimizer, flat.FlatOptimizer)
        assert len(optimizer._buckets) > 3
        late += any(b.gathering is not None for b in optimizer._buckets)
        loss = learn(run, *rest)
        assert all(b.gathering is None for b in optimizer._buckets)
        assert not optimizer._summing or optimizer._sent == len(optimizer._buckets)
        return loss

    step.learn, flat.BUCKET = watched, 1 << 9
    try:
        yield
    finally:
        step.learn, flat.BUCKET = learn, bucket
    assert late


def run(job: dict[str, Any]) -> list[Any] | None:
    def progress(done: int, total: int, text: str) -> None:
        if done == job.get("stop"):
            raise Stop
        if job.get("kill_reader") == rank_here() and done == 2:
            for reader in multiprocessing.active_children():
                os.kill(reader.pid or 0, signal.SIGKILL)

    read = Rows.read

    def broken(self: Rows, at: tuple[int, int], room: Any) -> Any:
        raise DamagedCacheError(f"part 3 of row {at[1]} is damaged")

    def unreadable(path: Path) -> Any:
        raise OSError(f"{path.name} cannot be read")

    def unwritable(folder: Path, *rest: Any) -> Path:
        raise StoreWriteError(f"{folder} could not be written")

    save = checkpoint.save
    taken, take = 0, Feed.take

    def no_sixth(self: Feed) -> list[PackedRow]:
        nonlocal taken
        taken += 1
        if taken == 6:
            raise OSError("too many open files")
        return take(self)

    if job.get("break_take") == rank_here():
        Feed.take = no_sixth  # type: ignore[method-assign]
    load = safetensors.torch.load_file
    if job.get("break_rank") == rank_here():
        Rows.read = broken  # type: ignore[method-assign]
    if job.get("break_load") == rank_here():
        safetensors.torch.load_file = unreadable  # type: ignore[assignment]
    if job.get("break_save"):
        checkpoint.save = unwritable
    try:
        with overlapping() if job.get("overlap") else nullcontext():
            train(
                TrainConfig.from_json(job["config"], "job"),
                resume=job.get("resume", False),
                progress=progress,
            )
    except Exception as error:
        return [type(error).__name__, str(error), getattr(error, "exit_code", None)]
    finally:
        Rows.read = read  # type: ignore[method-assign]
        Feed.take = take  # type: ignore[method-assign]
        safetensors.torch.load_file = load
        checkpoint.save = save
    return None


if __name__ == "__main__":
    dist.init_process_group("gloo")
    jobs = Path(sys.argv[1])
    found = [run(job) for job in json.loads(jobs.read_text())]
    Path(f"{jobs}.{rank_here()}").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    # Not through the interpreter's own end: with the groups of five trainings in one process,
    # gloo's threads now and then abort there ("terminate called without an active exception"), long
    # after everything asked for was done and written.
    os._exit(0)
