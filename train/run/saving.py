"""Save checkpoints, and the draft beside them, while training goes on.

At a milestone the loop only copies what will be written (masters, moments) to host memory, at bus
speed from a GPU, and trains on. One thread then writes the files, always in the same order: the
draft if it is wanted, the checkpoint, ``history.json``; then old checkpoints are deleted. Each
appears by a rename, so a killed run finds the previous checkpoint or the new one.

Threads: one save at a time; the next one waits for it first, and so do the end of training, an
interrupt and an error. The thread reads the copy and the target's frozen matrices, which no step
changes, and takes part in no collective call: only rank 0 has it. Its error is raised by ``check``
before the next step, or by ``wait``.

Memory: the copy, 12 bytes per trained parameter with AdamW, in one block that is made at the first
save (page-locked for a GPU, whose copies are then several times as fast) and kept for the next
ones. A host that has too little for it keeps none: then each save is written before training goes
on, from memory that is freed afterwards.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from dspark.cache.errors import TrainError
from dspark.cache.shared.blocks import Region, SharedBlock
from dspark.cache.shared.host_memory import available
from dspark.cache.shared.process import by_number, make_current
from dspark.train.draft.saved.folder import save_draft
from dspark.train.run import checkpoint, folder
from dspark.train.run.checkpoint import Position

if TYPE_CHECKING:
    from dspark.train.optim.base import Snapshot
    from dspark.train.run.setup import Run

UNSAVED = "These weights were not saved. Lower --lr, or look at the store with dspark-tools stats."
log = logging.getLogger("dspark.train")


class Saving:
    """Saves the state of ``run`` into ``output``; a context manager, whose end waits for what is
    being written. Every rank has one and calls ``save`` and ``wait`` at the same points.

    ``saved(step)`` is called once the checkpoint of ``step`` is complete, by the thread.
    """

    def __init__(
        self, run: Run, output: Path, saved: Callable[[int], None] = lambda step: None
    ) -> None:
        self._run, self._output, self._saved = run, output, saved
        # A thread's device is the first one until it is set, wherever the target's matrices are.
        device = by_number(run.compute.device)
        self._thread = ThreadPoolExecutor(1, "dspark-saving", make_current, (device,))
        self._writing: Future[None] | None = None
        self._block: SharedBlock | None = None  # of the copies; None where there is no room
        self._used = 0  # bytes of it
        self._asked = False  # whether there is room

    def save(self, position: Position, *, export: bool) -> None:
        """Start to save a checkpoint and, with ``export``, the draft itself: gathered by all ranks,
        written by the first. Raises on all ranks if the save before it failed, or if a value is not
        finite: such values are never written.
        """
        run = self._run
        run.world.agreed(self._make_ready)
        self._refuse_non_finite(position)
        snapshot = run.optimizer.snapshot(self._empty)
        write = partial(self._write, position, snapshot, export)
        run.world.agreed(lambda: self._start(write) if run.world.first else None)

    def check(self) -> None:
        """Raise the error of a save that has failed. Waits for nothing."""
        if self._writing is not None and self._writing.done():
            self._finish()

    def wait(self) -> None:
        """Wait until what was to be saved is written. Raises, on all ranks, the error of a save
        that failed.
        """
        self._run.world.agreed(self._finish)

    def _finish(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _make_ready(self) -> None:
        self._finish()
        if self._run.world.first and not self._asked:
            self._asked, self._block = True, self._room()
        self._used = 0

    def _room(self) -> SharedBlock | None:
        """Return the memory of the copies; None where the host has too little."""
        size, there = self._run.optimizer.snapshot_bytes(), available()
        if there is not None and size > there:
            log.warning(
                "a copy of masters and moments takes %.2f GB of host memory, and %.2f GB are "
                "available: training waits for each checkpoint while it is written",
                size / 1e9,
                there / 1e9,
            )
            return None
        began = time.perf_counter()
        block = SharedBlock(shared=False)
        block.reserve(size, slack=False)
        block.populate()
        if self._run.compute.device.type == "cuda":
            block.pin()
        log.info(
            "%.2f GB of host memory for the copies that checkpoints are written from, made in "
            "%.1f s%s",
            size / 1e9,
            time.perf_counter() - began,
            ", page-locked" if block.pinned else "",
        )
        return block

    def _empty(self, shape: torch.Size) -> Tensor:
        """As ``Optimizer.snapshot`` needs it: the next part of the block, or memory of its own."""
        if self._block is None:
            return torch.empty(shape)
        region = Region(self._used, tuple(shape), "float32")
        self._used += 4 * shape.numel()
        # A storage per tensor, as safetensors wants it: not views of one.
        return torch.from_numpy(self._block.array(region))

    def _refuse_non_finite(self, position: Position) -> None:
        run = self._run
        (wrong,) = run.world.max([not run.optimizer.finite()])
        if not wrong:
            return
        snapshot = run.optimizer.snapshot()

        def name() -> None:
            if found := snapshot.non_finite():
                raise TrainError(
                    f"after step {position.step} {found} has values that are not finite. {UNSAVED}"
                )

        run.world.agreed(name)

    def _start(self, write: Callable[[], None]) -> None:
        if self._block is None:
            write()
        else:
            self._writing = self._thread.submit(write)

    def _write(self, position: Position, snapshot: Snapshot, export: bool) -> None:
        run = self._run
        run.guard()
        if export:
            save_draft(self._output, run.model, trained=snapshot.masters)
        keep, digest = run.config.keep_checkpoints, folder.content(*run.cache.stores)
        checkpoint.save(self._output / "checkpoints", position, snapshot, keep, digest)
        self._saved(position.step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish what is being written, whatever ended the training; no collective call, since
        other ranks may be gone.
        """
        try:
            self._finish()
        except Exception as failed:
            if error is None:
                raise
            log.error("the checkpoint that was being written failed too: %s", failed)
        finally:
            self._thread.shutdown()
            if self._block is not None:
                self._block.close()
