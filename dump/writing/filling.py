"""A part whose states arrive batch by batch, in any order, and end up in the block that a worker
writes.

Codes on the host are copied to their rows. Codes on a device are put into arrays of the whole part
there, one indexed copy per batch, and cross to the host once, in the layout that is written: the
200 samples of a batch would take a thousand small steps of Python, each holding the lock that
launching the target's kernels needs, which made a dump a third slower than its stages
(docs/log/2026-11-22-speed-before-kernels.md).

Legend: T tokens of the part, M stored rows of the last state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dspark.cache.codec.base import EXACT_TOKEN, axis_of
from dspark.cache.shared.blocks import SharedBlock
from dspark.cache.shared.process import send
from dspark.dump.writing.places import regions

if TYPE_CHECKING:
    import torch

    from dspark.cache.parts.part import PartJob
    from dspark.cache.records import Coded
    from dspark.dump.corpus.parts import PartRows

Rows = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


class Filling:
    """A ``part`` being filled into ``block``. Rows of ``last`` are the stored ones."""

    def __init__(self, part: PartRows, job: PartJob, block: SharedBlock) -> None:
        self.part, self.job, self.block = part, job, block
        self.places, size = regions((s.name, s) for s in job.state_specs)
        block.reserve(size)
        self._arrays = {name: block.array(region) for name, region in self.places.items()}
        self._starts = {
            "token": job.arrays["sample_start"],
            "last": job.arrays["sample_last_start"],
        }
        self._missing = set(range(len(part.samples)))
        self._exact: list[dict[str, Any]] = []
        self._exact_on_device: list[dict[str, torch.Tensor]] = []  # rows as uint8 [X, bytes]
        self._on_device: dict[str, torch.Tensor] = {}  # uint8 [T or M, bytes of a row]

    @property
    def whole(self) -> bool:
        return not self._missing

    @property
    def missing(self) -> int:
        return len(self._missing)

    def put(self, members: list[int], coded: Coded) -> None:
        """Copy samples ``members``, concatenated in the host arrays ``coded``, to their rows."""
        at = {axis: as_slice(self.rows(axis, members)) for axis in self._starts}
        for name in self._arrays:
            self._arrays[name][at[axis_of(name)]] = coded[name]
        self._keep_exact(members, coded)
        self._missing -= set(members)

    def put_on_device(self, members: list[int], coded: Mapping[str, torch.Tensor]) -> None:
        """Do the same with tensors, which stay on their device until ``to_host``. All of a part
        must be on one device; launches on its current stream.
        """
        device = next(iter(coded.values())).device
        at = {axis: send(self.rows(axis, members), device) for axis in self._starts}
        for key in self._arrays:
            rows, data = at[axis_of(key)], _bytes_of(coded[key])
            assert data.shape[0] == rows.shape[0], (key, rows.shape, data.shape)
            if key not in self._on_device:
                here = data.new_empty(self._arrays[key].shape[0], data.shape[1])
                self._on_device[key] = here if data.is_cuda else self._on_host(key, here)
            self._on_device[key].index_copy_(0, rows, data)
        if self.job.exact:  # kept there, too: each copy to the host is a wait
            kept = {n: _bytes_of(coded[n]) for n in self.job.exact}
            kept[EXACT_TOKEN] = at["token"].index_select(0, coded[EXACT_TOKEN])
            self._exact_on_device.append(kept)
        self._missing -= set(members)

    def _keep_exact(self, members: list[int], coded: Coded) -> None:
        """Keep the few tokens of a batch that are stored exactly, by their place in the part."""
        if self.job.exact:
            at = self.rows("token", members)[coded[EXACT_TOKEN]]
            self._exact.append({n: coded[n] for n in self.job.exact} | {EXACT_TOKEN: at})

    def exact(self) -> dict[str, Any]:
        """Return all exactly stored tokens of the part, in order; empty if the codec has none."""
        if not self.job.exact:
            return {}
        joined = self._exact_of_device() or {
            n: np.concatenate([e[n] for e in self._exact]) for n in (EXACT_TOKEN, *self.job.exact)
        }
        order = np.argsort(joined[EXACT_TOKEN])
        return {n: a[order] for n, a in joined.items()}

    def _exact_of_device(self) -> dict[str, Any]:
        """Return what ``put_on_device`` has kept, not yet in order, as the codec's arrays."""
        import torch

        if not self._exact_on_device:
            return {}
        out: dict[str, Any] = {}
        for name in (EXACT_TOKEN, *self.job.exact):
            out[name] = torch.cat([e[name] for e in self._exact_on_device]).cpu().numpy()
        for name, spec in self.job.exact.items():
            out[name] = out[name].view(spec.dtype).reshape(-1, *spec.row_shape)
        return out

    def rows(self, axis: str, members: list[int]) -> Rows:
        """Return where the concatenated rows of samples ``members`` belong in the part's arrays of
        ``axis``: int64.
        """
        starts: Rows = self._starts[axis]
        at = np.asarray(members, dtype=np.int64)
        counts = starts[at + 1] - starts[at]
        ends = counts.cumsum()
        out: Rows = np.arange(ends[-1], dtype=np.int64) + np.repeat(
            starts[at] - (ends - counts), counts
        )
        return out

    def to_host(self) -> None:
        """Copy everything on a device into the block."""
        for key, data in self._on_device.items():
            if data.is_cuda:
                self.block.pin()
                self._on_host(key, data).copy_(data)
        self.release()

    def release(self) -> None:
        """Drop all views of the block, so that closing it frees its memory. Nothing can be put
        after this.
        """
        self._arrays.clear()
        self._on_device.clear()

    def _on_host(self, key: str, like: torch.Tensor) -> torch.Tensor:
        """View the block's array ``key`` as a tensor with the shape of ``like``, sharing its
        memory.
        """
        import torch

        flat: Any = self._arrays[key].reshape(-1).view(np.uint8)
        return torch.from_numpy(flat).view(like.shape)


def as_slice(rows: Rows) -> Rows | slice:
    """Turn ascending ``rows`` into a slice if they are adjacent, as with most engines, for one copy
    instead of one per row.
    """
    if rows.size and rows[-1] - rows[0] + 1 == rows.size and (np.diff(rows) == 1).all():
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


def _bytes_of(coded: torch.Tensor) -> torch.Tensor:
    """View [rows, ...] of any dtype as uint8 [rows, bytes per row], sharing its memory."""
    import torch

    return coded.contiguous().flatten(1).view(torch.uint8)
