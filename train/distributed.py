"""Several processes of one training run, started by torchrun: ranks, sums over them, and how one
failure stops all.

Two channels. Tensors on the device are summed through the backend of the device (NCCL, or gloo on a
CPU). A few numbers per step (weights of the loss, whether any rank was interrupted) go through gloo
on the host, so that exchanging them never waits for a GPU; and since every rank answers before any
collective of the step begins, none of those ever waits for a rank that has stopped.
"""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dspark.cache.errors import TrainError, UsageError
from dspark.cache.shared.host_cores import bound, cores

T = TypeVar("T")
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets
# torch 2.13 renamed them and warns of the old names.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# Long enough for validation and one rank's checkpoint; a rank that dies is noticed at once, by its
# closed connection.
PATIENCE = timedelta(hours=2)


class PeerError(TrainError):
    """Another rank failed; that rank, or rank 0 for it, says why."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run; ``World()`` is a single process, for which everything here does
    nothing.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1  # processes of this node
    control: Any = None  # the gloo group
    owned: bool = False  # whether the process group ends with the run
    cores: int | None = None  # this process's share of the node's; None: nobody else has any

    @property
    def first(self) -> bool:
        """Tell whether this rank writes what is written only once."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum host numbers over all ranks, float64, with the same bits on every rank."""
        return self._host(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        """As ``sum``, but the maximum of each."""
        return self._host(values, dist.ReduceOp.MAX)

    def _host(self, values: Sequence[float], operation: Any) -> list[float]:
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        with lost_peers():
            dist.all_reduce(tensor, operation, group=self.control)
        out: list[float] = tensor.tolist()
        return out

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a device tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def start_sum(self, tensor: Tensor) -> Any:
        """Start summing ``tensor`` in place; call ``.wait()`` on the result before reading it."""
        return dist.all_reduce(tensor, async_op=True)

    def start_sum_of_part(self, tensor: Tensor) -> Any:
        """As ``start_sum``, but only this rank's part (``part``) of ``tensor`` becomes the sum; the
        other parts are undefined afterwards.
        """
        return _reduce_scatter(self.part(tensor), tensor, async_op=True)

    def part(self, tensor: Tensor) -> Tensor:
        """Return this rank's of ``size`` equal parts of ``tensor`` [n], as a view."""
        return tensor.view(self.size, -1)[self.rank]

    def gather_(self, tensor: Tensor) -> Tensor:
        """Complete ``tensor`` [n], of which each rank has its own part, with every rank's part."""
        if self.size > 1:
            _all_gather(tensor, self.part(tensor))
        return tensor

    def start_gather(self, tensor: Tensor) -> Any:
        """As ``gather_``, begun only; call ``.wait()`` on the result before reading ``tensor``.
        None if there is nothing to gather.
        """
        if self.size == 1:
            return None
        return _all_gather(tensor, self.part(tensor), async_op=True)

    def send_(self, tensor: Tensor, source: int) -> Tensor:
        """Fill a device tensor on every rank with what rank ``source`` has in it."""
        if self.size > 1:
            dist.broadcast(tensor, source)
        return tensor

    def agreed(self, work: Callable[[], T]) -> T:
        """Do ``work()`` on every rank; if it fails on any, all raise: the failed ranks their own
        error, the others PeerError. If several fail in the same way (a wrong flag fails
        everywhere), rank 0's error stands for all.
        """
        if self.size == 1:
            return work()
        error: Exception | None = None
        try:
            value = work()
        except Exception as caught:
            error = caught
        mine = None if error is None else (str(error), getattr(error, "exit_code", 1))
        told: list[tuple[str, int] | None] = [None] * self.size
        with lost_peers():
            dist.all_gather_object(told, mine, group=self.control)
        failed = [(rank, *say) for rank, say in enumerate(told) if say is not None]
        if not failed:
            return value
        rank, message, code = failed[0]
        if error is not None and (self.first or rank != 0):
            raise error
        raise PeerError(f"rank {rank}: {message}", code)

    def gather(self, value: T) -> list[T]:
        """Return ``value`` of every rank, by rank."""
        if self.size == 1:
            return [value]
        told: list[Any] = [None] * self.size
        with lost_peers():
            dist.all_gather_object(told, value, group=self.control)
        return told

    def hosts(self) -> str:
        """Say which ranks are where, for the log: ``rank 0-7 on a, 8-15 on b``."""
        runs: list[tuple[str, int, int]] = []
        for rank, host in enumerate(self.gather(socket.gethostname())):
            if runs and runs[-1][0] == host:
                runs[-1] = (host, runs[-1][1], rank)
            else:
                runs.append((host, rank, rank))
        return "rank " + ", ".join(
            f"{a}-{b} on {h}" if a < b else f"{a} on {h}" for h, a, b in runs
        )

    def leave(self) -> None:
        """Leave at the normal end of a run. A process group that existed before stays."""
        if self.owned:
            dist.destroy_process_group()


def launched() -> bool:
    """Tell whether torchrun (or something that sets the same variables) started this process."""
    return all(name in os.environ for name in LAUNCHER)


def rank_here() -> int:
    """Return this process's rank without joining the others."""
    return int(os.environ["RANK"]) if launched() else 0


def join(device: str, strategy: str | None) -> World:
    """Join the world that torchrun describes; ``device`` as ``--device``. A single process joins
    only for ``fsdp2``.
    """
    if not launched():
        if strategy is not None:
            raise UsageError(
                f"--strategy {strategy} is for several processes: torchrun --nproc-per-node N "
                "$(which dspark-train) ..."
            )
        return World()
    rank, size, local = (int(os.environ[name]) for name in LAUNCHER[:3])
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if size == 1 and strategy != "fsdp2":
        return World()
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    owned = not dist.is_initialized()
    if cuda:
        if ":" in device:
            raise UsageError(
                f"--device {device}: under torchrun each process takes its own GPU; use --device "
                "cuda"
            )
        if torch.cuda.device_count() <= local:
            raise UsageError(
                f"torchrun starts process {local} on this machine, but torch sees "
                f"{torch.cuda.device_count()} GPUs; lower --nproc-per-node or use "
                "--device cpu"
            )
        torch.cuda.set_device(local)
        if owned:
            dist.init_process_group("nccl", device_id=torch.device("cuda", local))
        control = dist.new_group(backend="gloo", timeout=PATIENCE)
    else:
        if owned:
            dist.init_process_group("gloo", timeout=PATIENCE)
        control = dist.group.WORLD
    world = World(rank, size, local, here, control, owned)
    host = socket.gethostname()
    return dataclasses.replace(
        world, cores=share_of_cores(host, here, world.gather((host, bound())))
    )


def share_of_cores(host: str, count: int, told: Sequence[tuple[str, frozenset[int]]]) -> int:
    """Return how many cores each of ``count`` processes on ``host`` may use: an equal share of
    those that they are bound to, each to its own or all to the same. ``told``: of every rank, its
    host and its cores.
    """
    there = frozenset[int]().union(*(own for name, own in told if name == host))
    return max(1, cores(there) // count)


SIGNS = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "Connection refused",
    "Timed out waiting",
)


@contextmanager
def lost_peers() -> Iterator[None]:
    """Turn the backend's error about a closed connection into one that explains it."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in SIGNS):
            raise
        raise PeerError(
            "another process of this run ended (killed, or out of memory); see its output. "
            "Rerun the same command with --resume to continue from the last checkpoint."
        ) from error
