"""Our side inside a vLLM worker: states of a finished request go to a spool file, and a write that failed says so.

vLLM's stock connector fails on a CPU (pinned memory) and only logs write errors. This one copies plainly where there is no CUDA, writes a file
whole or not at all, and leaves the reason when it could not (``spool.py``).

``hidden_states`` [T, n, H] in ascending order of the asked ids, ``token_ids`` [T].
"""

from __future__ import annotations

import os
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    extract_from_kv_cache,
)

from dspark.dump.spool import report_failure


class _Copied:
    """Stands for a CUDA event where the copy has already been made."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return None


class SpoolConnector(ExampleHiddenStatesConnector):  # type: ignore[misc]
    """Named in ``kv_connector`` with ``kv_connector_module_path`` = this module."""

    def _submit_async_write(self, pending: Any) -> None:
        if self._kv_cache is None or self._kv_cache.device.type == "cuda":
            super()._submit_async_write(pending)
            return
        if not self._is_tp_rank_zero:
            return
        blocks = torch.tensor(pending.block_ids, dtype=torch.long)
        slots = (blocks[:, None] * self._block_size + torch.arange(self._block_size)).flatten()
        # Indexing copies, so the blocks may be freed and used again as soon as this returns.
        states = extract_from_kv_cache(self._kv_cache, slots, len(pending.token_ids))
        copied = _Copied()
        tensors = {"hidden_states": states.contiguous(), "token_ids": pending.token_ids.clone()}
        lock = self._lock_fds.pop(pending.req_id, None)
        future = self._executor.submit(self._write_tensors, tensors, copied, pending.filename, lock)
        self._req_copy_events[pending.req_id] = copied
        self._req_futures[pending.req_id] = future
        future.add_done_callback(lambda done: self._on_write_done(pending.req_id, done))

    @staticmethod
    def _write_tensors(
        tensors: dict[str, torch.Tensor], event: Any, filename: str, lock_fd: int | None
    ) -> None:
        """In a writer thread: wait for the copy, write, release the lock whatever happened."""
        try:
            event.synchronize()
            save_file(tensors, filename + ".part")
            os.replace(filename + ".part", filename)
        except BaseException as error:
            report_failure(filename, error)
            raise
        finally:
            if lock_fd is not None:
                os.close(lock_fd)
