"""From states on the engine's device to parts on disk: three stages that run at once.

    engine (caller's thread) -> encode, put in place, copy (a thread per engine, each with a CUDA
    stream of its own) -> compress and write (workers)

The engine only launches work. A batch of states is coded on its device and its codes are put into
their part there (``filling.py``); a complete part is copied to a block on the host and compressed
by a worker process from that same block. States still in flight to the host (from a vLLM worker, by
file) are waited for here too, so that the engine's thread, which feeds it requests, never waits for
any. Every queue is bounded: a limited number of batches wait for the encoder, and the number of
blocks (parts in memory) is limited, so a slow disk slows the engine down and memory does not grow.
Of several engines (``dump/engines/vllm/replicas.py``), which fill different parts at once, none
waits for another's states: an engine and its parts belong to one encoder's thread. Such a thread
runs little Python, because it would hold the lock that the thread launching the target's kernels
needs. On a CPU, where compression would only take cores from the target, the workers are threads.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib import metadata
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from dspark.cache.codec.base import EXACT_TOKEN, tokens_of
from dspark.cache.codec.state_errors import naming
from dspark.cache.errors import EngineError
from dspark.cache.files.layout import SOURCE_STRIDE
from dspark.cache.parts.part import PartJob
from dspark.cache.parts.record import PartRecord
from dspark.cache.shared.blocks import SharedBlock
from dspark.cache.writer import StoreWriter
from dspark.dump.engines.engine import GROUPS, Captured, CodedStates
from dspark.dump.workers import WorkerPool
from dspark.dump.writing.filling import Filling
from dspark.dump.writing.places import SharedArrays, regions
from dspark.dump.writing.writers import write_shared, write_timed

if TYPE_CHECKING:
    import torch

    from dspark.cache.codec.base import Codec
    from dspark.dump.corpus.parts import PartRows
    from dspark.dump.progress import Bar

WAITING = 2  # batches of states between engine and encoder
COMING = 8  # batches per encoder whose states may be in flight, in files beside the store
BLOCK_BYTES = 4 << 30  # of parts in memory, unless the number of workers needs less
FREEING = 4  # threads that free blocks at the end
THREADS = (
    # concurrent commits without worker processes: a single one leaves cores idle while it waits for
    # the disk
    2
)


class Pipeline:
    """``pool``: processes that write parts, which end with this; None = threads. ``bar`` is
    notified of every batch in place and every complete part. ``groups``: parts that the engine may
    leave unfinished at once. ``seconds``: time per stage; the stages overlap. Use as a context
    manager: on leaving, also by an error, it waits until every complete part is on disk and
    discards the others. The processes end after that, and nobody waits for them here.
    """

    def __init__(
        self,
        writer: StoreWriter,
        codec: Codec,
        *,
        embedding: torch.Tensor | None = None,
        pool: WorkerPool | None,
        bar: Bar,
        groups: int = GROUPS,
    ) -> None:
        self.writer, self.codec, self._bar, self._embedding = writer, codec, bar, embedding
        self.versions = versions()
        shared = pool is not None
        self._workers = workers = pool.processes if pool is not None else THREADS
        self._pool: Executor = pool or ThreadPoolExecutor(workers, "commit")
        # The last one first: its pages are there.
        self._blocks: queue.LifoQueue[SharedBlock] = queue.LifoQueue()
        self._groups = groups
        self._all = [SharedBlock(shared) for _ in range(workers + groups)]
        for block in self._all:
            self._blocks.put(block)
        self._bytes: dict[int, int] = {}  # of the parts in memory, by block
        self._shared = shared
        self._filling: dict[int, Filling] = {}
        self._begun = 0
        lanes = max(1, groups // GROUPS)
        self._populating = ThreadPoolExecutor(lanes, "populate")
        self._freeing = ThreadPoolExecutor(FREEING, "free")
        self._lanes: list[queue.Queue[Captured | None]] = [queue.Queue() for _ in range(lanes)]
        self._room = threading.Semaphore(WAITING * lanes), threading.Semaphore(COMING * lanes)
        self._failed: BaseException | None = None
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._counting = threading.Lock()
        self._ending = False  # no part will begin any more
        self._writing = 0  # parts that the writers have
        self._written = threading.Condition()
        self._encoders = [
            threading.Thread(target=self._encode, args=(lane,), name="encode", daemon=True)
            for lane in self._lanes
        ]
        for encoder in self._encoders:
            encoder.start()

    def begin(self, part: PartRows) -> bool:
        """Make room for a part; waits while there is none. False for a part without samples, which
        is then already on disk: the next ``begin`` has its number.
        """
        block = self.writer.block(
            part.index,
            part.row_start,
            part.row_stop,
            dropped=part.dropped,
            truncated=part.truncated,
            rows_sha256=part.rows_sha256,
            versions=self.versions,
        )
        job = self.writer.job(part.index, part.samples, block)
        if not part.samples:
            self.writer.add(job.write(nothing(job)))
            self._bar.part(part.index, part.row_stop)
            return False
        size = regions((s.name, s) for s in job.state_specs)[1]
        with self._timed("wait for a free block"):
            memory = self._patiently(lambda: self._free_block(size), queue.Empty)
        self._filling[self._begun] = Filling(part, job, memory)
        self._populating.submit(memory.populate)  # while the part's first states are computed
        self._begun += 1
        return True

    def _free_block(self, size: int) -> SharedBlock:
        # The parts that the engine may leave unfinished always fit in memory; more are allowed only
        # while all of them fit.
        most = BLOCK_BYTES * self._groups // 2
        if len(self._bytes) >= self._groups and sum(list(self._bytes.values())) + size > most:
            time.sleep(0.01)
            self._refuse_if_stuck()
            raise queue.Empty
        try:
            block = self._blocks.get(timeout=0.1)
        except queue.Empty:
            self._refuse_if_stuck()
            raise
        self._bytes[id(block)] = size
        return block

    def _refuse_if_stuck(self) -> None:
        """Raise if there will never be room: every part in memory lacks states, and none are in
        flight.
        """
        if (
            not any(lane.unfinished_tasks for lane in self._lanes)
            and self._filling
            and len(self._filling) == len(self._bytes)
        ):
            self._refuse_gaps()

    def _refuse_gaps(self) -> None:
        for filling in self._filling.values():
            n = len(filling.part.samples)
            raise EngineError(
                f"the engine returned states for {n - filling.missing} of {n} samples of "
                f"part {filling.part.index}."
            )

    def put(self, captured: Captured) -> None:
        """Hand over a batch; its group is the number of the part in the order of ``begin`` calls.
        Waits while the encoder is behind.
        """
        with self._timed("wait for the encoder"):
            self._patiently(lambda: self._enter(captured), queue.Full)
        # By engine: two threads must not read from one engine, whose batches hold parts of groups.
        self._lanes[captured.engine % len(self._lanes)].put(captured)

    def _enter(self, captured: Captured) -> None:
        if not self._room_of(captured).acquire(timeout=0.1):
            raise queue.Full

    def _room_of(self, captured: Captured) -> threading.Semaphore:
        return self._room[callable(captured.states)]

    def finish(self) -> None:
        """Wait for everything; raises the error of any stage, or EngineError if a part is
        incomplete.
        """
        self.settle()
        self._refuse_gaps()

    def settle(self) -> None:
        """Wait for what was handed over, and until every complete part is on disk; raises the first
        error.
        """
        with self._timed("wait for the encoder"):
            self._drain()
        with self._timed("wait for the writers"):
            self._await_writers()
        self._check()

    def _drain(self) -> None:
        """End the encoders once they have processed what is waiting."""
        self._ending = True
        for lane in self._lanes:
            lane.put(None)
        for encoder in self._encoders:
            encoder.join()

    def _await_writers(self) -> None:
        """Wait until the writers have handed back all that they were given, once the encoders have
        ended: for the parts, not for the end of processes. Free the blocks that come back, beside
        it: half a gigabyte takes more than 0.1 s.
        """
        while True:
            with suppress(queue.Empty):
                while True:
                    block = self._blocks.get_nowait()
                    self._all.remove(block)
                    self._freeing.submit(block.close)
            with self._written:
                if not self._writing:
                    return
                if self._blocks.empty():
                    self._written.wait()

    def _check(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _patiently(self, attempt: Callable[[], Any], not_yet: type[Exception]) -> Any:
        """Repeat ``attempt`` until it succeeds or another stage has failed."""
        while True:
            self._check()
            try:
                return attempt()
            except not_yet:
                continue

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._spent(stage, time.perf_counter() - began)

    def _spent(self, stage: str, seconds: float) -> None:
        with self._counting:
            self.seconds[stage] += seconds

    def _encode(self, lane: queue.Queue[Captured | None]) -> None:
        """Run an encoder's thread."""
        import torch

        stream: torch.cuda.Stream | None = None
        try:
            with torch.inference_mode():
                while (captured := lane.get()) is not None:
                    self._room_of(captured).release()
                    if captured.ready is None:
                        self._place(captured)
                    else:
                        if stream is None:
                            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                        with torch.cuda.stream(stream):
                            stream.wait_event(captured.ready)
                            self._place(captured)
                        # After it, the states' memory belongs to the engine again.
                        stream.synchronize()
                    lane.task_done()
        except torch.OutOfMemoryError as error:
            # Not with --regenerate, whose states arrive coded on the host; it refuses
            # --part-tokens.
            self._failed = EngineError(
                f"out of memory while a part's codes were assembled on the GPU: {error}. "
                "Use a smaller --batch-tokens (it may change with --resume), or a "
                "smaller --part-tokens, which needs a new store."
            )
        except BaseException as error:  # re-raised in the caller's thread
            self._failed = error

    def _place(self, captured: Captured) -> None:
        """Code a batch and put it into its part; if the part is then complete, hand it to the
        writers.
        """
        filling, states = self._filling[captured.group], captured.states
        members = list(captured.members)
        if callable(states):
            with self._timed("wait for states"):
                states = states()
        if isinstance(states, CodedStates):
            for stage, seconds in states.seconds.items():
                self._spent(stage, seconds)
            with self._timed("put in place"):
                filling.put(members, states.arrays)
        else:
            with self._timed("encode"):
                samples, tokens = [filling.part.samples[i] for i in members], None
                if self.codec.needs_tokens:
                    tokens = tokens_of(samples, self._embedding_on(states.aux.device))
                with naming(samples, self.writer.manifest.layers, self._source(filling.part)):
                    filling.put_on_device(members, self.codec.encode(*states, tokens))
        with self._counting:
            self._bar.tokens(sum(len(filling.part.samples[i].input_ids) for i in members))
        if filling.whole:
            with self._timed("copy to the host"):
                filling.to_host()
            del self._filling[captured.group]
            with self._counting:
                self._bar.part(filling.part.index, filling.part.row_stop)
            self._commit(filling)

    def _source(self, part: PartRows) -> str:
        return self.writer.manifest.sources[part.index // SOURCE_STRIDE].id

    def _embedding_on(self, device: torch.device) -> torch.Tensor:
        """Return the target's embedding, moved to the device once."""
        assert self._embedding is not None, "a codec that predicts from tokens needs the embedding"
        self._embedding = self._embedding.to(device)
        return self._embedding

    def _commit(self, filling: Filling) -> None:
        with self._written:
            self._writing += 1
        try:
            self._give(filling)
        except BaseException:
            self._handed_back()
            raise

    def _give(self, filling: Filling) -> None:
        """Give a whole part to the writers."""
        job, exact = filling.job, filling.exact()
        beside = None
        if self._shared:
            beside = SharedArrays({**job.arrays, **exact})
            commit = self._pool.submit(
                write_shared,
                dataclasses.replace(job, arrays={}),
                list(job.arrays),
                (filling.block.handle(), filling.places),
                (beside.handle(), beside.places),
                self._at_work(),
            )
        else:
            arrays = {name: filling.block.array(region) for name, region in filling.places.items()}
            commit = self._pool.submit(write_timed, job, arrays | exact)

        def done(commit: Future[tuple[PartRecord, float]]) -> None:
            try:
                if beside is not None:
                    beside.close()
                self._committed(commit, filling.block)
            finally:
                self._handed_back()

        commit.add_done_callback(done)

    def _at_work(self) -> int:
        """Count the writers among which the cores are shared: all of them, until the last parts,
        for which only some are needed.
        """
        if not self._ending:
            return self._workers
        return min(self._workers, self._writing + len(self._filling))

    def _committed(self, commit: Future[tuple[PartRecord, float]], block: SharedBlock) -> None:
        error = commit.exception()
        if error is None:
            record, seconds = commit.result()
            self.writer.add(record)
            self._spent("compress and write", seconds)
        elif self._failed is None:
            self._failed = error
        self._bytes.pop(id(block), None)
        self._blocks.put(block)

    def _handed_back(self) -> None:
        with self._written:
            self._writing -= 1
            self._written.notify_all()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._drain()
        finally:  # a second Ctrl-C ends the waiting, not the blocks
            self._pool.shutdown(wait=False)  # first: an encoder that still runs gives it no more
            self._await_writers()
            self._populating.shutdown(wait=True, cancel_futures=True)
            for filling in list(self._filling.values()):
                filling.release()
            for block in self._all:  # of parts that are not whole
                block.close()
            # What has come back is freed beside what follows, or, with an error, before it.
            self._freeing.shutdown(wait=kind is not None)


def nothing(job: PartJob) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[Any]]]:
    """Return the states of a part without samples."""
    out = {s.name: np.empty(s.shape, s.dtype) for s in job.state_specs}
    exact = {n: np.empty((0, *s.row_shape), s.dtype) for n, s in job.exact.items()}
    return out | exact | {EXACT_TOKEN: np.zeros(0, np.int64)}


def versions() -> dict[str, str]:
    """Return the versions of what makes parts here, for their records."""
    return {name: metadata.version(name) for name in ("torch", "transformers", "zarr")}
