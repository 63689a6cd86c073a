"""The processes that write parts: how they start, and what they do."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from dspark.cache.parts.part import PartJob
from dspark.cache.parts.record import PartRecord
from dspark.cache.parts.shard_writer import share_cores
from dspark.cache.shared.blocks import Handle, Region, can_share
from dspark.dump.workers import WorkerPool
from dspark.dump.writing.places import attach


def writers(processes: int) -> WorkerPool | None:
    """Start processes for a ``Pipeline``, if this system can share memory with them."""
    if not processes or not can_share():
        return None
    return WorkerPool(processes, "writes parts", _ready)


def _ready() -> None:
    """Do nothing, in a worker: finding this function has imported everything that ``write_shared``
    needs.
    """


def write_shared(
    job: PartJob,
    own: Sequence[str],
    states: tuple[Handle, dict[str, Region]],
    beside: tuple[Handle, dict[str, Region]],
    at_work: int,
) -> tuple[PartRecord, float]:
    """Write a part in a worker process, one of ``at_work`` that share the cores, from the parent's
    memory: ``states`` in its block, and ``beside`` it the ``own`` arrays of the job, which comes
    without them, and the states that are stored exactly.
    """
    share_cores(at_work)
    found = attach(*beside)
    job = dataclasses.replace(job, arrays={name: found.pop(name) for name in own})
    return write_timed(job, attach(*states) | found)


def write_timed(
    job: PartJob, states: dict[str, np.ndarray[tuple[int, ...], np.dtype[Any]]]
) -> tuple[PartRecord, float]:
    """Write a part; returns its record and the seconds it took."""
    began = time.perf_counter()
    record = job.write(states)
    return record, time.perf_counter() - began
