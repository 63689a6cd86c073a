"""Muon where each rank holds some rows of every matrix, as FSDP2 shards them.

Momentum and the step are of a rank's own rows. A matrix is orthogonalised whole: the ranks gather
all matrices, in the dtype of the products, and each takes its rows of the factors that the owners
send (``muon.Factors``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dspark.train.distributed import World
from dspark.train.optim.base import AdamSettings, excess
from dspark.train.optim.muon import MOMENTUM, Factors, precision, scale, wide


class RowsMuon:
    """The rule over ``masters``: this rank's rows, perhaps none, of matrices of ``shapes``, the
    same matrices on every rank. Rank r has rows r n to (r + 1) n, n = rows / ranks rounded up.
    """

    moments: tuple[str, ...] = ("momentum",)

    def __init__(
        self,
        masters: list[nn.Parameter],
        shapes: list[torch.Size],
        settings: AdamSettings,
        world: World,
    ) -> None:
        self.masters, self.shapes, self.world = masters, shapes, world
        self.weight_decay, self.clip = settings.weight_decay, settings.clip
        self.updates = 0
        self._momentum = {id(p): torch.zeros_like(p, requires_grad=False) for p in masters}
        self._factors = Factors([wide_shape(shape) for shape in shapes], world)

    def moment(self, name: str, master: nn.Parameter) -> Tensor:
        return self._momentum[id(master)]

    @torch.no_grad()
    def update(self, lr: float, norm: Tensor) -> None:
        """As ``Rule.update``; a collective call."""
        self.updates += 1
        over = excess(norm, self.clip)
        rows = []
        for p in self.masters:
            assert p.grad is not None
            gradient = p.grad.div_(over)
            momentum = self._momentum[id(p)].mul_(MOMENTUM).add_(gradient)
            gradient.add_(momentum, alpha=MOMENTUM)  # Nesterov
            rows.append(gradient.to(precision(gradient)))
        matrices = self._gathered(rows)
        for i, factor in self._factors.of([wide(matrix) for matrix in matrices]):
            p, shape = self.masters[i], self.shapes[i]
            whole = factor.mT if shape[0] > shape[1] else factor
            first = self.world.rank * rows_of_a_rank(shape, self.world)
            own = whole[first : first + p.shape[0]].to(p.dtype)
            p.mul_(1.0 - lr * self.weight_decay).add_(own, alpha=-lr * scale(shape))

    def _gathered(self, rows: list[Tensor]) -> list[Tensor]:
        """The whole matrices, of which each rank gives its ``rows``."""
        if self.world.size == 1 or not rows:
            return rows
        counts = [rows_of_a_rank(shape, self.world) for shape in self.shapes]
        sizes = [n * shape[1] for n, shape in zip(counts, self.shapes, strict=True)]
        every = rows[0].new_zeros(self.world.size, sum(sizes))
        at, out = 0, []
        for own, size in zip(rows, sizes, strict=True):
            every[self.world.rank, at : at + own.numel()] = own.flatten()
            at += size
        self.world.gather_(every.view(-1))
        for part, shape in zip(torch.split(every, sizes, 1), self.shapes, strict=True):
            out.append(part.reshape(-1, shape[1])[: shape[0]])
        return out


def rows_of_a_rank(shape: torch.Size, world: World) -> int:
    """Return how many rows a rank holds of a matrix; the last ones may hold fewer, or none."""
    return -(-shape[0] // world.size)


def wide_shape(shape: torch.Size) -> torch.Size:
    """Return ``shape`` with rows <= columns."""
    return torch.Size(sorted(shape))
