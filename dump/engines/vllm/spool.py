"""The spool between a vLLM worker and us: one file for the requests that finished in one step of
the engine, read once and deleted, and the instructions for the worker. A file per request cost 4.4
ms per sample of 300 tokens on an H100, five times the target's own time; so all that finish
together are gathered, coded, copied and written together. Codes lie in memory that both processes
map (``slots.py``), as far as that reaches, and the file only says where; others, and raw states,
lie in the file. ``<file>`` appears complete (written beside, then renamed), or ``<file>.error``
says why not; ``<file>.rank1`` ... hold the states of the other tensor-parallel ranks if requested.
The worker holds ``worker.lock`` as long as it lives, so a waiting reader can tell that nothing will
come. ``coding.json`` and the tensors beside it tell the worker how to code states.

Legend: k requests of a batch, T tokens of all of them, M stored rows of the last state, n extracted
layers, H hidden size.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import mmap
import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dspark.cache.codec import registry
from dspark.cache.codec.base import EXACT_TOKEN, Codec, Tokens, axis_of
from dspark.cache.shared.blocks import Handle
from dspark.cache.shared.process import send
from dspark.dump.engines.vllm.slots import Slot, SlotReader, Slots

if TYPE_CHECKING:
    import torch

Ids = np.ndarray[tuple[int, ...], np.dtype[np.int32]]
ERROR, PART, WORKER = ".error", ".part", "worker.lock"
STORED, COMPARE, SKIP = (
    "dspark_stored",
    "dspark_compare",
    "dspark_skip",
)  # keys of a request's kv_transfer_params
PATH, INDEX = "dspark_batch", "dspark_index"  # and of a finished one's: where its states will be
TOKENS, LASTS, IDS, RAW = "tokens", "lasts", "token_ids", "hidden_states"  # arrays of a batch
EXACTS = "exacts"  # where each request's exact rows end; found, not written
# float64[4]: seconds of the clock when the batch came, was begun, was gathered and was coded and on
# the host; the file's own time is the fifth.
TIMES = "times"
STAGES = "worker: wait for a writer", "worker: gather", "worker: code and copy", "worker: write"
CODING, NORM = "coding.json", "norm.pt"
LEARNT, EMBEDDING = "calibration.pt", "embedding.pt"  # of the codec, and what it predicts from
WAIT_SECONDS = (
    # how long a live worker may take for a batch of at most 256 MB; if longer, it hangs
    600.0
)
RANK_SECONDS = 60.0  # how much longer another rank may take than the first
LOOK_SECONDS = 0.002  # between two looks for a file
ALIVE_SECONDS = 0.05  # between two looks for its worker, and for its reason to have written none
ALIGNED = 64  # bytes


class SpoolError(OSError):
    """States that did not arrive. ``index``: the request of the batch that is to blame, if there is
    one.
    """

    def __init__(self, message: str, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


@dataclass(frozen=True, slots=True)
class Coding:
    """How a worker codes requests. ``columns``: of the n extracted states, those that the store
    keeps; ``last_column``: the one before the final ``norm``. ``embedding``: the target's, if the
    codec predicts from tokens.
    """

    codec: Codec
    columns: list[int]
    last_column: int
    norm: torch.nn.Module
    embedding: torch.Tensor | None = None

    def encode(
        self, states: torch.Tensor, stored: torch.Tensor, ids: Ids, sizes: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """``states[T, n, H]`` -> the codec's arrays; ``stored`` int64[M]: rows whose last state is
        stored; ``ids`` int32[T], of requests of ``sizes`` tokens.
        """

        tokens = None
        if self.codec.needs_tokens:
            assert self.embedding is not None
            start = np.cumsum([0, *sizes], dtype=np.int64)
            ids_there, start_there = (send(a, states.device) for a in (ids.astype(np.int64), start))
            tokens = Tokens(ids_there, start_there, stored, self.embedding)
        last = self.norm(states[stored, self.last_column])
        return self.codec.encode(states[:, self._taken].contiguous(), last, tokens)

    @property
    def _taken(self) -> slice | list[int]:
        """Return ``columns`` as an index: a slice where they are adjacent, for which nothing is
        copied to the device.
        """
        first, n = self.columns[0], len(self.columns)
        adjacent = self.columns == list(range(first, first + n))
        return slice(first, first + n) if adjacent else self.columns


def write_coding(folder: Path, coding: Coding) -> None:
    """Write the coding instructions, before the first coded request."""
    import torch

    codec = coding.codec
    given = {NORM: coding.norm, LEARNT: codec.calibration(), EMBEDDING: coding.embedding}
    for name, value in given.items():
        torch.save(value, folder / (name + PART))
        os.replace(folder / (name + PART), folder / name)
    body = {
        "codec": codec.name,
        "params": codec.params,
        "pack": codec.pack,
        "columns": coding.columns,
        "last_column": coding.last_column,
    }
    (folder / (CODING + PART)).write_text(json.dumps(body))
    os.replace(folder / (CODING + PART), folder / CODING)


def read_coding(folder: str, device: torch.device) -> Coding:
    """Read the coding instructions, in a worker."""
    import torch

    path = Path(folder) / CODING
    body: Mapping[str, Any] = json.loads(path.read_text())
    learnt, embedding = (
        torch.load(Path(folder) / name, map_location=to, weights_only=True)
        for name, to in ((LEARNT, "cpu"), (EMBEDDING, device))
    )
    # The norm is an object of whatever class the target's code has, so it comes pickled: from a
    # folder that only its owner may write to, and that the process that started this one made for
    # it.
    at = os.stat(folder)
    if at.st_uid != os.getuid() or at.st_mode & 0o022:
        raise SpoolError(
            f"{folder}: other users may write here, so no file that could run code is read from it"
        )
    norm = torch.load(Path(folder) / NORM, map_location=device, weights_only=False)
    codec = registry.load(body["codec"], body["params"], body["pack"], learnt, str(path))
    return Coding(codec, body["columns"], body["last_column"], norm, embedding)


def hold(folder: str) -> int:
    """Take the lock that tells readers that the worker lives, before its first request; returns a
    file descriptor to keep open.
    """
    lock = os.open(os.path.join(folder, WORKER), os.O_CREAT | os.O_WRONLY, 0o644)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


@dataclass(frozen=True, slots=True)
class OnHost:
    """Arrays of a batch on their way to the host: in ``slot``, each from byte ``places[name]`` on,
    or, without a slot, in memory of their own.
    """

    arrays: dict[str, torch.Tensor]
    slot: Slot | None = None
    places: dict[str, int] = field(default_factory=dict)


def to_host(arrays: Mapping[str, torch.Tensor], slots: Slots | None = None) -> OnHost:
    """Start copying the arrays of a batch to the host, into one of ``slots`` if there is room."""
    import torch

    slot = slots.take(arrays) if slots is not None else None
    if slot is not None:
        return OnHost(dict(arrays), slot, slot.fill(arrays))
    # Page-locked for a GPU, by torch, which keeps such memory for the next batch.
    return OnHost(
        {
            name: torch.empty_like(t, device="cpu", pin_memory=True).copy_(t, non_blocking=True)
            if t.is_cuda
            else t
            for name, t in arrays.items()
        }
    )


def write_batch(filename: str, batch: OnHost, told: Mapping[str, torch.Tensor]) -> None:
    """Hand over a batch that is on the host, and what is ``told`` about it, completely or not at
    all.

    A line of JSON (dtype and shape of each array, and where it is in the slot), then the bytes of
    those without a slot, each on a multiple of 64. Not safetensors: it copies every tensor with
    Python's lock held.
    """
    import torch

    head = {
        name: [str(t.dtype).removeprefix("torch."), list(t.shape), batch.places.get(name)]
        for name, t in (batch.arrays | dict(told)).items()
    }
    memory = batch.slot.block.handle() if batch.slot is not None else None
    with open(filename + PART, "wb", buffering=0) as file:
        _write_aligned(file, json.dumps({"memory": memory, "arrays": head}).encode() + b"\n")
        for t in (*(() if batch.slot is not None else batch.arrays.values()), *told.values()):
            _write_aligned(file, t.contiguous().view(-1).view(torch.uint8).numpy().data)
    os.replace(filename + PART, filename)


def report_failure(filename: str, error: BaseException, index: int | None = None) -> bool:
    """Write the reason where the reader looks, completely or not at all; returns whether it worked.
    A few bytes fit even on most full disks.
    """
    body = json.dumps({"index": index, "reason": f"{type(error).__name__}: {error}"})
    with contextlib.suppress(OSError):
        os.unlink(filename + PART)
    try:
        with open(filename + ERROR + PART, "w", encoding="utf-8") as file:
            file.write(body)
        os.replace(filename + ERROR + PART, filename + ERROR)
    except OSError:
        return False
    return True


@dataclass(slots=True)
class SpooledBatch:
    """``arrays``: rows of its requests end to end, T or M; ``ends``: by array, where each request's
    rows end, int64[k + 1] from 0. ``left``: requests not yet taken. ``times``: ``TIMES``, and when
    the file was written.
    """

    arrays: dict[str, torch.Tensor]
    ends: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.int64]]]
    left: int
    times: np.ndarray[tuple[int, ...], np.dtype[np.float64]]

    def rows(self, members: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return the rows of ``members``, in ascending order, concatenated: views if they are
        adjacent.
        """
        import torch

        runs = np.split(np.asarray(members), np.flatnonzero(np.diff(members) != 1) + 1)
        out = {}
        for name, t in self.arrays.items():
            ends = self.ends[name]
            pieces = [t[ends[run[0]] : ends[run[-1] + 1]] for run in runs]
            if name == EXACT_TOKEN:  # counted from the first token of what is taken
                pieces = self._counted_anew(pieces, runs)
            out[name] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return out

    def _counted_anew(self, pieces: list[torch.Tensor], runs: Sequence[Any]) -> list[torch.Tensor]:
        """Renumber ``EXACT_TOKEN`` of ``runs`` of requests, which counts from the batch's first
        token, to count from the first token of the first run.
        """
        out, before, ends = [], 0, self.ends[IDS]
        for piece, run in zip(pieces, runs, strict=True):
            first, end = int(ends[run[0]]), int(ends[run[-1] + 1])
            out.append(piece - (first - before))
            before += end - first
        return out


class SpoolReader:
    """The reading side. A file is mapped and deleted; its pages, or its slot, are freed with the
    last of its requests' arrays.
    """

    def __init__(self, folder: Path) -> None:
        self._slots = SlotReader()
        self._lock = folder / WORKER
        self._batches: dict[str, SpooledBatch] = {}
        self._lost: dict[str, OSError] = {}  # a second call must not wait
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def take(self, filename: str, members: Sequence[int], rank: int = 0) -> dict[str, torch.Tensor]:
        """Return the arrays of requests ``members`` (ascending) of a batch that ``rank`` wrote,
        with their rows concatenated. Waits for the file; raises SpoolError with the worker's reason
        if it was not written. Take each request once.
        """
        name = f"{filename}.rank{rank}" if rank else filename
        if name in self._lost:
            raise self._lost[name]
        batch = self._batches.get(name)
        if batch is None:
            try:
                batch = self._batches[name] = self._read(name, rank)
            except OSError as error:
                self._lost[name] = error
                raise
            for stage, seconds in zip(
                STAGES, np.diff(batch.times).clip(min=0).tolist(), strict=True
            ):
                self._seconds[stage] += seconds
        batch.left -= len(members)
        if not batch.left:
            del self._batches[name]
        return batch.rows(members)

    def spent(self) -> dict[str, float]:
        """Return the worker's total seconds per stage (``STAGES``) for the batches read since the
        last call; stages overlap.
        """
        out = dict(self._seconds)
        self._seconds.clear()
        return out

    def _read(self, name: str, rank: int) -> SpooledBatch:
        try:
            self._wait(name, rank)
            if os.path.exists(name + ERROR):
                with open(name + ERROR, encoding="utf-8") as file:
                    told = json.load(file)
                raise SpoolError(
                    f"the worker could not write {name}: {told['reason']}", told["index"]
                )
            if not os.path.exists(name):
                raise SpoolError(f"the worker wrote no {name}: it died, or its disk is full")
            return read_batch(name, self._slots)
        finally:
            for end in ("", PART, ERROR):
                with contextlib.suppress(OSError):  # which would hide the reason
                    os.unlink(name + end)

    def _wait(self, name: str, rank: int) -> None:
        patience = RANK_SECONDS if rank else WAIT_SECONDS
        now = look = time.monotonic()
        end = now + patience
        while not os.path.exists(name):
            if (now := time.monotonic()) >= look:
                if os.path.exists(name + ERROR) or not self._alive():
                    return
                look = now + ALIVE_SECONDS
            if now > end:
                raise SpoolError(
                    f"the worker is alive but has written no {name} for {patience:g} s: "
                    "the worker or its disk hangs"
                )
            time.sleep(LOOK_SECONDS)

    def _alive(self) -> bool:
        """Tell whether the worker still holds its lock."""
        try:
            with open(self._lock, "rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False


def read_batch(filename: str, slots: SlotReader) -> SpooledBatch:
    """Read what ``write_batch`` wrote, as tensors in its slot or in the mapped file, which live as
    long as any of them, even after the file is deleted.
    """
    import torch

    with open(filename, "rb") as file:
        line = file.readline()
        # Copy-on-write, although nothing writes: torch warns about a read-only mapping.
        data = torch.frombuffer(
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8
        )
        written = os.fstat(file.fileno()).st_mtime
    head = json.loads(line)
    shared = slots.read(Handle(*head["memory"])) if head["memory"] else data
    arrays, at = {}, _round_up(len(line))
    for name, (dtype, shape, place) in head["arrays"].items():
        kind = getattr(torch, dtype)
        size = math.prod(shape) * kind.itemsize
        source, start = (data, at) if place is None else (shared, place)
        arrays[name] = source[start : start + size].view(kind).view(shape)
        if place is None:
            at = _round_up(at + size)
    times = np.append(arrays.pop(TIMES).numpy(), written)
    counts = {name: arrays.pop(name).numpy() for name in (TOKENS, LASTS)}
    ends = {name: np.concatenate([[0], count.cumsum()]) for name, count in counts.items()}
    if EXACT_TOKEN in arrays:
        first = np.searchsorted(arrays[EXACT_TOKEN].numpy(), ends[TOKENS])
        ends[EXACTS] = first.astype(np.int64)
    of_axis = {"token": TOKENS, "last": LASTS, "exact": EXACTS}
    by_array = {n: ends[of_axis[axis_of(n)]] for n in arrays}
    return SpooledBatch(arrays, by_array, len(counts[TOKENS]), times)


def _round_up(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _write_aligned(file: FileIO, data: bytes | memoryview) -> None:
    """Write all of ``data``, which may take several unbuffered writes, and pad with NUL to the next
    multiple of ALIGNED.
    """
    for piece in (data, bytes(-len(data) % ALIGNED)):
        left = memoryview(piece)
        while left:
            left = left[file.write(left) :]
