"""Our side inside a vLLM worker: the states of a finished request are coded on the worker's device, copied to the host and spooled.

Four kinds of request, told by ``kv_transfer_params``: with ``STORED`` (first and one-past-last position of every run of stored last states) the layers that the
store wants and the normed last state are coded as ``spool.write_coding`` says; without, raw states are spooled (calibration, self-check); with ``COMPARE``
every tensor-parallel rank spools its raw states, so that one that holds a partial sum is found; with ``SKIP`` no states are wanted.

vLLM's stock connector fails on a CPU (pinned memory) and only logs write errors. This one copies plainly where there is no CUDA, writes a file
whole or not at all, and leaves the reason when it could not (``spool.py``). The cache blocks are free again as soon as the states have been
gathered; coding, copy and writing happen in the writer threads, on a stream of their own.

Raw: ``hidden_states`` [T, n, H] in ascending order of the asked ids, ``token_ids`` [T]. Coded: the codecs' arrays, ``token_ids``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    PendingSave,
    extract_from_kv_cache,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

from dspark.dump.spool import CODING, COMPARE, SKIP, STORED, Coding, read_coding, report_failure


@dataclass
class Save(PendingSave):  # type: ignore[misc]
    """``stored``: runs of positions whose last state is stored, None for raw states. ``compare``: every rank writes. ``skip``: no states are wanted."""

    stored: list[list[int | None]] | None = None
    compare: bool = False
    skip: bool = False


class _Copied:
    """Stands for a CUDA event where the copy has already been made."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return None


@dataclass
class _Gathered:
    """States on the device, and the event behind them."""

    states: torch.Tensor
    ready: Any
    stream: Any = field(default=None)


class SpoolConnector(ExampleHiddenStatesConnector):  # type: ignore[misc]
    """Named in ``kv_connector`` with ``kv_connector_module_path`` = this module."""

    _coding: tuple[int, Coding] | None = None  # and when it was written

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """In the scheduler: pass on what the request asked for."""
        out: tuple[bool, dict[str, Any] | None] = super().request_finished(request, block_ids)
        asked = request.kv_transfer_params or {}
        pending = self._pending_saves.get(request.request_id)
        if pending is not None:
            self._pending_saves[request.request_id] = Save(
                **vars(pending),
                stored=asked.get(STORED),
                compare=bool(asked.get(COMPARE)),
                skip=bool(asked.get(SKIP)),
            )
        return out

    def _submit_async_write(self, pending: Any) -> None:
        rank = get_tensor_model_parallel_rank()
        if rank and not pending.compare:
            return
        gathered = self._gather(pending)
        if rank:  # a few samples of the self-check: waited for, and never reported to the scheduler
            self._write(gathered, pending, f"{pending.filename}.rank{rank}", None)
            return
        lock = self._lock_fds.pop(pending.req_id, None)
        os.makedirs(os.path.dirname(pending.filename), exist_ok=True)
        self._req_copy_events[pending.req_id] = gathered.ready
        future = self._executor.submit(self._write, gathered, pending, pending.filename, lock)
        self._req_futures[pending.req_id] = future
        future.add_done_callback(partial(self._on_write_done, pending.req_id))

    def _gather(self, pending: Any) -> _Gathered:
        """The request's states [T, n, H] out of the cache; its blocks may be used again once ``ready`` says so."""
        cache = self._kv_cache
        blocks = torch.tensor(pending.block_ids, dtype=torch.long)
        slots = (blocks[:, None] * self._block_size + torch.arange(self._block_size)).flatten()
        tokens = len(pending.token_ids)
        if cache.device.type != "cuda":  # indexing copies
            return _Gathered(extract_from_kv_cache(cache, slots, tokens), _Copied())
        stream = self._get_copy_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            states = extract_from_kv_cache(
                cache, slots.pin_memory().to(cache.device, non_blocking=True), tokens
            )
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(stream)
        return _Gathered(states, ready, stream)

    def _write(self, gathered: _Gathered, pending: Any, filename: str, lock: int | None) -> None:
        """In a writer thread: code, copy, write; release the lock whatever happened."""
        try:
            with torch.inference_mode():
                if gathered.stream is None:
                    tensors = self._tensors(gathered.states, pending)
                else:
                    with torch.cuda.stream(gathered.stream):
                        tensors = {k: t.cpu() for k, t in self._tensors(gathered.states, pending).items()}
            tensors["token_ids"] = pending.token_ids.clone()
            save_file({k: t.contiguous() for k, t in tensors.items()}, filename + ".part")
            os.replace(filename + ".part", filename)
        except BaseException as error:
            report_failure(filename, error)
            raise
        finally:
            if lock is not None:
                os.close(lock)

    def _tensors(self, states: torch.Tensor, pending: Any) -> dict[str, torch.Tensor]:
        if pending.skip:
            return {}
        if pending.stored is None:
            return {"hidden_states": states}
        written = os.stat(os.path.join(self._storage_path, CODING)).st_mtime_ns
        if self._coding is None or self._coding[0] != written:
            self._coding = written, read_coding(self._storage_path, states.device)
        return self._coding[1].encode(states, pending.stored)
