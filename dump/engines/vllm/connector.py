"""Our side inside a vLLM worker: the states of finished requests are coded on the worker's device,
copied to the host and spooled.

Four kinds of request, told apart by ``kv_transfer_params``: with ``STORED`` (first and
one-past-last position of every run of stored last states) the layers that the store wants and the
normed last state are coded as ``spool.write_coding`` says; without, raw states are spooled
(calibration, self-check); with ``COMPARE`` every tensor-parallel rank spools its raw states, so
that one that holds a partial sum is found; with ``SKIP`` no states are wanted, and nothing is done.

What finishes in one step of the engine is one batch: one gather from the cache, one call of each
codec, one file (``spool.py``). vLLM's stock connector, extended here, does all that once per
request, fails on a CPU (pinned memory) and only logs write errors; we keep how it finds its cache
and its paths. The scheduler assigns requests to batches, so a request's path is known before the
worker starts. The cache blocks are free again once the states have been gathered; coding, copy and
writing happen in writer threads, at most ``WRITING`` batches at a time.

On a GPU each batch in flight has its own stream, which waits for the step in which the last of its
requests finished, and not for steps launched since (vLLM launches a step before the previous one is
done, and 16,384 tokens of a 4B target take 0.2 s on an H100). These streams have a higher priority
than the target's, whose kernels would otherwise fill the GPU ahead of the few small kernels here.

Raw: ``hidden_states`` [T, n, H] in ascending order of the requested ids. Coded: the codecs' arrays.
Both: ``token_ids`` int32[T], and the rows of each request.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    extract_from_kv_cache,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

from dspark.cache.errors import EngineError
from dspark.cache.shared.process import send
from dspark.dump.engines.vllm.slots import Slots
from dspark.dump.engines.vllm.spool import (
    CODING,
    COMPARE,
    IDS,
    INDEX,
    LASTS,
    PATH,
    RAW,
    SKIP,
    STORED,
    TIMES,
    TOKENS,
    Coding,
    hold,
    read_coding,
    report_failure,
    to_host,
    write_batch,
)

Ints = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
# Batches whose states may be on the device at once, if there is room: a slow disk slows the engine
# down.
WRITING = 8
REMEMBERED = 16  # steps: vLLM names a request at most a few after its last one


@dataclass
class Save:
    """A finished request. ``ids`` int32[T]. ``stored``: runs of positions whose last state is
    stored, None for raw states. ``compare``: every rank writes.
    """

    request: str
    filename: str  # of its batch
    ids: np.ndarray[tuple[int, ...], np.dtype[np.int32]]
    blocks: list[int]
    stored: list[list[int | None]] | None
    compare: bool
    step: int  # the last one that computed tokens of it


class _Copied:
    """Stands in for a CUDA event when the copy has already been made."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


@dataclass
class Gathered:
    """States [T, n, H] of ``saves`` on the device, and the event after them. ``rows`` int64[M]:
    rows whose last state is stored; counts int64[k] per request. ``stream``: its own; None on a
    CPU. ``times``: clock times at which the batch arrived and was started.
    """

    saves: list[Save]
    states: torch.Tensor
    rows: torch.Tensor
    tokens: Ints
    lasts: Ints
    ready: Any
    stream: Any
    times: list[float]

    @property
    def ids(self) -> list[np.ndarray[tuple[int, ...], np.dtype[np.int32]]]:
        """Return the token ids of each request that has states."""
        return [save.ids[:n] for save, n in zip(self.saves, self.tokens, strict=True)]

    def on_stream(self) -> AbstractContextManager[Any]:
        """Queue work inside the context after the states."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)


class SpoolConnector(ExampleHiddenStatesConnector):  # type: ignore[misc]
    """Named in ``kv_connector`` with ``kv_connector_module_path`` = this module. In its extra
    config, ``batch_tokens`` bounds a batch; ``sharing``: engines on this GPU.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._batch_tokens = int(
            self._kv_transfer_config.get_from_extra_config("batch_tokens", 1 << 13)
        )
        self._sharing = int(self._kv_transfer_config.get_from_extra_config("sharing", 1))
        self._batches = 0  # the scheduler's: named so far
        self._members = self._tokens = 0  # of the last one named
        self._kind: Any = None  # of its requests; None: it takes no more
        self._coding: tuple[int, Coding] | None = None  # the worker's, and when it was written
        # requests whose blocks are kept until an event
        self._held: deque[tuple[Any, list[str]]] = deque()
        # The batches on their way, and their streams.
        self._writing: deque[tuple[Future[None], Any]] = deque()
        self._most: int | None = None  # of them at once
        # The scheduler's: steps so far, and the last one of each request.
        self._steps, self._step_of = 0, dict[str, int]()
        # The worker's: steps of late, and events at their beginning, behind all that was launched
        # before.
        self._begun: deque[tuple[int, Any]] = deque(maxlen=REMEMBERED)
        self._writers = ThreadPoolExecutor(WRITING, "dspark-spool")
        self._slots = Slots()
        self._lock = -1
        self._releasing = threading.Lock()  # two writers may fail at once
        self._reading = threading.Lock()

    # In the scheduler

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Put the request into a batch; its blocks are kept until ``get_finished`` names it."""
        scheduled = self._request_filenames.pop(request.request_id, None) is not None
        step = self._step_of.pop(request.request_id, self._steps)
        asked = request.kv_transfer_params or {}
        if not scheduled or asked.get(SKIP):
            return False, None
        # The last sampled token was never an input, so it has no state.
        ids = (
            list(request.all_token_ids)[:-1]
            if asked.get("include_output_tokens")
            else request.prompt_token_ids
        )
        stored, compare = asked.get(STORED), bool(asked.get(COMPARE))
        kind = stored is None, compare
        if kind != self._kind or self._tokens + len(ids) > self._batch_tokens:
            self._batches += 1
            self._kind, self._members, self._tokens = kind, 0, 0
        index, filename = self._members, os.path.join(self._storage_path, f"{self._batches}.batch")
        self._members, self._tokens = index + 1, self._tokens + len(ids)
        self._pending_saves[request.request_id] = Save(
            request.request_id,
            filename,
            np.array(ids, np.int32),
            list(block_ids),
            stored,
            compare,
            step,
        )
        return True, {PATH: filename, INDEX: index}

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        """Send everything that finished since the last call to the workers."""
        self._kind = None
        self._steps += 1
        self._step_of.update(dict.fromkeys(scheduler_output.num_scheduled_tokens, self._steps))
        told = super().build_connector_meta(scheduler_output)
        told.step = self._steps
        return told

    def get_finished_count(self) -> int:
        """Say that only rank 0 reports; versions before 0.32 wait for all."""
        return 1

    # In a worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        super().register_kv_caches(kv_caches)
        if not get_tensor_model_parallel_rank() and self._lock < 0:
            self._lock = hold(self._storage_path)

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """Start a step. vLLM puts its states into the cache once its tokens are sampled, in some
        versions after ``get_finished``: they are there at the event of the next step.
        """
        super().bind_connector_metadata(connector_metadata)
        if self._kv_cache.device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._begun.append((connector_metadata.step, event))

    def _done(self, saves: list[Save]) -> Any:
        """Return the first event after the last step of all ``saves``."""
        last = max(save.step for save in saves)
        return next(event for step, event in self._begun if step > last)

    def wait_for_save(self) -> None:
        """Do nothing: there is no lock per request."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Take the batches of this step; name the requests whose blocks are free again."""
        if self.has_connector_metadata():
            saves = getattr(self._get_connector_metadata(), "pending_saves", ())
            for filename, batch in groupby(saves, lambda save: save.filename):
                self._take(filename, list(batch), get_tensor_model_parallel_rank())
        done: set[str] = set()
        while self._held and self._held[0][0].query():
            done.update(self._held.popleft()[1])
        return done or None, None

    def _take(self, filename: str, saves: list[Save], rank: int) -> None:
        came = time.time()
        if rank:
            # A few samples of the self-check: written before returning, and never reported to the
            # scheduler.
            if saves[0].compare:
                self._write(self._gather(saves, self._stream(), came), f"{filename}.rank{rank}")
            return
        requests = [save.request for save in saves]
        try:
            gathered = self._gather(saves, self._stream(), came)
        except (
            torch.OutOfMemoryError
        ) as error:  # the engine's own thread: raised where the file is read
            report_failure(filename, error)
            self._held.append((_Copied(), requests))
            return
        self._held.append((gathered.ready, requests))
        self._writing.append(
            (self._writers.submit(self._write, gathered, filename), gathered.stream)
        )

    def _stream(self) -> Any:
        """Return the stream of one more batch; None on a CPU. Reuses the stream of the oldest batch
        in flight if that is done, or waits for it if no more are allowed.
        """
        if self._writing and (len(self._writing) >= self._at_once() or self._writing[0][0].done()):
            oldest, stream = self._writing.popleft()
            wait([oldest])
            return stream
        device = self._kv_cache.device
        return torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def _at_once(self) -> int:
        """Return how many batches may be in flight, by the memory that the GPU has left now. Asked
        again once the coding is known: the process that learnt the codec may have taken some.
        """
        if self._most is None:
            cache = self._kv_cache
            self._most = WRITING
            if cache.device.type == "cuda":
                tokens = max(self._batch_tokens, self._vllm_config.model_config.max_model_len)
                free, _ = torch.cuda.mem_get_info(cache.device)
                free //= self._sharing  # the others see all of it, too
                # what torch keeps for batches that have gone
                free += torch.cuda.memory_reserved(cache.device)
                free -= torch.cuda.memory_allocated(cache.device)
                self._most = batches(free, tokens * (cache[0].nbytes // self._block_size))
        return self._most

    def _gather(self, saves: list[Save], stream: Any, came: float) -> Gathered:
        """Copy the batch's states out of the cache; its blocks may be reused once ``ready`` says
        so.
        """
        times = [came, time.time()]
        cache, size = self._kv_cache, self._block_size
        blocks = np.concatenate([np.asarray(save.blocks, np.int64) for save in saves])
        counts = np.array([len(save.blocks) for save in saves])
        # An aborted request may have fewer blocks than its tokens need; the reader sees how many
        # arrived.
        tokens = np.minimum([len(save.ids) for save in saves], counts * size)
        first = tokens.cumsum() - tokens
        position = np.arange(tokens.sum()) - np.repeat(first, tokens)
        block = blocks[np.repeat(counts.cumsum() - counts, tokens) + position // size]
        stored, lasts = stored_rows([save.stored or [] for save in saves], tokens)
        index = np.concatenate([block * size + position % size, stored])
        if stream is None:  # indexing copies
            slots, rows = torch.from_numpy(index).tensor_split([len(block)])
            states = extract_from_kv_cache(cache, slots, len(block))
            return Gathered(saves, states, rows, tokens, lasts, _Copied(), None, times)
        stream.wait_event(self._done(saves))
        with torch.cuda.stream(stream):
            slots, rows = send(index, cache.device).tensor_split([len(block)])
            states = extract_from_kv_cache(cache, slots, len(block))
            ready = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            ready.record(stream)
        return Gathered(saves, states, rows, tokens, lasts, ready, stream, times)

    def _write(self, gathered: Gathered, filename: str) -> None:
        """Code, copy and write a batch, in a writer thread; on failure, write the reason."""
        try:
            with torch.inference_mode(), gathered.on_stream():
                gathered.ready.synchronize()
                times = [*gathered.times, time.time()]
                coded = gathered.saves[0].stored is not None
                batch = to_host(self._tensors(gathered), self._slots if coded else None)
                if gathered.stream is not None:
                    copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                    copied.record(gathered.stream)
                    copied.synchronize()
                times.append(time.time())
            counts = {
                TOKENS: gathered.tokens,
                LASTS: gathered.lasts,
                IDS: np.concatenate(gathered.ids),
                TIMES: np.array(times),
            }
            write_batch(filename, batch, {name: torch.from_numpy(a) for name, a in counts.items()})
        except BaseException as error:  # raised where the file is read
            try:
                index, reason = self._blamed(gathered, error)
            except BaseException:  # the search itself failed (memory): report the first error
                index, reason = None, error
            if not report_failure(filename, reason, index):
                # There is no space even for the reason: let the reader see that nothing will come.
                with self._releasing:
                    if self._lock >= 0:
                        os.close(self._lock)
                    self._lock = -1

    def _tensors(self, gathered: Gathered) -> dict[str, torch.Tensor]:
        if gathered.saves[0].stored is None:
            return {RAW: gathered.states}
        written = os.stat(os.path.join(self._storage_path, CODING)).st_mtime_ns
        with self._reading:  # writers begin together, and its tables are gigabytes
            if self._coding is None or self._coding[0] != written:
                self._coding = written, read_coding(self._storage_path, gathered.states.device)
                self._most = None
        ids = np.concatenate(gathered.ids)
        return self._coding[1].encode(gathered.states, gathered.rows, ids, gathered.tokens.tolist())

    def _blamed(self, gathered: Gathered, error: BaseException) -> tuple[int | None, BaseException]:
        """Find which request of the batch cannot be coded, and its own error; None if no single one
        is to blame.
        """
        if isinstance(error, EngineError) and self._coding is not None:
            pieces = torch.split(gathered.states, gathered.tokens.tolist())
            first = gathered.tokens.cumsum() - gathered.tokens
            stored = torch.split(gathered.rows, gathered.lasts.tolist())
            for i, (states, rows, ids) in enumerate(zip(pieces, stored, gathered.ids, strict=True)):
                try:
                    with torch.inference_mode(), gathered.on_stream():
                        self._coding[1].encode(states, rows - int(first[i]), ids, [len(ids)])
                except EngineError as own:
                    return i, own
        return None, error


def batches(free: int, size: int) -> int:
    """Return how many batches of ``size`` bytes of states may be on a GPU with ``free`` bytes: each
    takes three times as much again while it is coded, and a quarter is the target's, whose steps
    need more at times. At most ``WRITING``, at least one.
    """
    return max(1, min(WRITING, free * 3 // 4 // (4 * size)))


def stored_rows(runs: Sequence[Sequence[Sequence[int | None]]], tokens: Ints) -> tuple[Ints, Ints]:
    """Return the rows, of concatenated requests with ``tokens`` int64[k] each, that lie in each
    request's runs ``[start, stop)`` of positions (None = to its end), and their number per request,
    int64[k].
    """
    most = np.iinfo(np.int64).max
    flat = [(i, a, most if b is None else b) for i, own in enumerate(runs) for a, b in own]
    owner, start, stop = np.array(flat, np.int64).reshape(-1, 3).T
    sizes = (np.minimum(stop, tokens[owner]) - start).clip(min=0)
    begin = (tokens.cumsum() - tokens)[owner] + start
    rows = np.arange(sizes.sum()) + np.repeat(begin - (sizes.cumsum() - sizes), sizes)
    return rows, np.bincount(owner, sizes, len(tokens)).astype(np.int64)
