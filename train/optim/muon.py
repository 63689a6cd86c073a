"""Muon: the matrices of the draft's layers and ``fc`` take steps of equal size in every direction;
AdamW updates the rest.

A matrix's momentum is replaced by the nearest matrix with orthonormal rows (or columns): its
singular vectors with all singular values near 1. Five Newton-Schulz steps in bfloat16 do that with
products only. The step is scaled by ``0.2 sqrt(larger side)``, so that its elements are as large as
AdamW's usually are and one learning rate serves both (Moonlight, arXiv 2502.16982). Norms, biases,
the confidence head and the Markov factors, whose rows are embeddings of tokens, stay with AdamW.

It needs half of AdamW's moments for these matrices, and 15 products per matrix and step, which the
ranks share: altogether the arithmetic of two rows of 4,096 tokens at GLM-5.2's shapes, or one and a
half at Qwen3-4B's.

Why this is not ``torch.optim.Muon`` (2.9 and later), whose formulas it shares
(``adjust_lr_fn="match_rms_adamw"``; a test compares them): torch's needs every matrix as a separate
parameter with its own gradient, and steps through them one by one. Here masters, gradients and
momentum are in flat buckets, so that clipping, ZeRO's shares and the sums over ranks are a few
large operations; matrices of one shape are orthogonalised in one batch; and the ranks divide the
matrices among them instead of each repeating all products.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from dspark.train.distributed import World
from dspark.train.optim.adamw import Adam
from dspark.train.optim.base import AdamSettings, Rule, excess
from dspark.train.optim.flat import FlatOptimizer

MOMENTUM = 0.95
STEPS = 5
# Elements orthogonalised at once: half a GB in bfloat16, and as much again twice for the products.
TOGETHER = 1 << 28
# Of x (a + b x^2 + c x^4), which takes singular values in (0, 1] to about 1 +- 0.3 in five steps;
# Keller Jordan's choice, steep at 0.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonal(matrices: Tensor, steps: int = STEPS) -> Tensor:
    """Return the approximate orthogonal factors of ``matrices`` [n, rows, columns] with rows <=
    columns, in their dtype.
    """
    a, b, c = COEFFICIENTS
    x: Tensor = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def is_matrix(name: str, p: Tensor) -> bool:
    """Tell whether Muon updates the parameter of this name."""
    return p.ndim == 2 and name.startswith(("layers.", "midlayer.", "fc."))


class Factors:
    """Orthogonal factors of matrices, whose ``shapes`` are the same in every step. Each rank
    orthogonalises its share of them and sends the factors to the others, so a rank's cost is that
    of one process divided by the number of ranks.
    """

    def __init__(self, shapes: list[torch.Size], world: World) -> None:
        self.world = world
        self._owner = owners(shapes, world.size)

    def of(self, matrices: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Yield index and factor of all ``matrices`` (on every rank), in any order. Matrices have
        rows <= columns and are unchanged until their factor was yielded.
        """
        own = self._own(matrices)
        return self._sent(matrices, dict(own)) if self.world.size > 1 else own

    def _sent(self, matrices: list[Tensor], own: dict[int, Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Yield index and factor of all ``matrices``, each from its owner; ``own`` are this rank's
        and are overwritten.
        """
        for i, matrix in enumerate(matrices):
            factor = own.pop(i, None)
            if factor is None:
                factor = torch.empty(matrix.shape, dtype=precision(matrix), device=matrix.device)
            yield i, self.world.send_(factor, self._owner[i])

    def _own(self, matrices: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Yield index and orthogonal factor of this rank's share of ``matrices``. Those of one
        shape are processed together.
        """
        alike: dict[torch.Size, list[int]] = {}
        for i, matrix in enumerate(matrices):
            if self._owner[i] == self.world.rank:
                alike.setdefault(matrix.shape, []).append(i)
        for shape, members in alike.items():
            most = max(1, TOGETHER // shape.numel())
            for at in range(0, len(members), most):
                some = members[at : at + most]
                stacked = torch.stack([matrices[i].to(precision(matrices[i])) for i in some])
                yield from zip(some, orthogonal(stacked), strict=True)


def wide(matrix: Tensor) -> Tensor:
    """Return the matrix or its transpose, with rows <= columns."""
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix


def scale(shape: torch.Size) -> float:
    """Return what a factor of this shape is multiplied by (the module's docstring says why)."""
    return 0.2 * math.sqrt(max(shape))


class Muon:
    """The rule. For each flat float32 master, by its ``id``: ``gradients``, the whole buffer of
    which its ``grad`` is all or a part, and ``shapes``, the matrices in that buffer, as (start,
    shape). ``holders`` each have a part of each master. With several ranks, each orthogonalises its
    share of the matrices and sends the factors to the others, so a rank's cost is that of one
    process divided by the number of ranks.
    """

    moments: tuple[str, ...] = ("momentum",)

    def __init__(
        self,
        masters: list[nn.Parameter],
        gradients: Mapping[int, Tensor],
        shapes: Mapping[int, list[tuple[int, torch.Size]]],
        settings: AdamSettings,
        world: World,
        holders: World,
    ) -> None:
        self.masters, self.gradients, self.shapes = masters, gradients, shapes
        self.holders = holders
        self.weight_decay, self.clip = settings.weight_decay, settings.clip
        self.updates = 0
        self._momentum = {id(p): torch.zeros_like(p, requires_grad=False) for p in masters}
        self._factors = Factors([s for p in masters for _, s in shapes[id(p)]], world)

    def moment(self, name: str, master: nn.Parameter) -> Tensor:
        return self._momentum[id(master)]

    @torch.no_grad()
    def update(self, lr: float, norm: Tensor) -> None:
        """As ``Rule.update``. The gradients are overwritten: first by the matrices to
        orthogonalise, then by their factors.
        """
        self.updates += 1
        over = excess(norm, self.clip)
        matrices: list[Tensor] = []
        for p in self.masters:
            assert p.grad is not None
            gradient = p.grad.div_(over)
            momentum = self._momentum[id(p)].mul_(MOMENTUM).add_(gradient)
            gradient.add_(momentum, alpha=MOMENTUM)  # Nesterov
            whole = self.holders.gather_(self.gradients[id(p)])
            for at, shape in self.shapes[id(p)]:
                matrices.append(wide(whole[at : at + shape.numel()].view(shape)))
        for i, factor in self._factors.of(matrices):
            matrices[i].copy_(factor).mul_(scale(factor.shape))
        for p in self.masters:
            assert p.grad is not None
            p.mul_(1.0 - lr * self.weight_decay).add_(p.grad, alpha=-lr)


def precision(matrix: Tensor) -> torch.dtype:
    """Return the dtype in which a matrix is orthogonalised."""
    return torch.bfloat16 if matrix.is_cuda else matrix.dtype


def owners(shapes: list[torch.Size], ranks: int) -> list[int]:
    """Return which rank orthogonalises each matrix: the costliest first, each to the least loaded
    rank. The same on every rank.
    """
    cost = [min(shape) ** 2 * max(shape) for shape in shapes]
    out, load = [0] * len(shapes), [0] * ranks
    for i in sorted(range(len(shapes)), key=lambda i: (-cost[i], i)):
        out[i] = load.index(min(load))
        load[out[i]] += cost[i]
    return out


class MasterMuon(FlatOptimizer):
    """Muon over the matrices that ``is_matrix`` names, AdamW over the other parameters."""

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        settings: AdamSettings,
        world: World | None = None,
        *,
        shared: bool = False,
    ) -> None:
        super().__init__(named, world, is_matrix, shared=shared)
        kinds: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        shapes: dict[int, list[tuple[int, torch.Size]]] = {}
        for bucket in self._buckets:
            matrices = [
                (at, self.parameters[n].shape)
                for n, at in bucket.at.items()
                if is_matrix(n, self.parameters[n])
            ]
            kinds[bool(matrices)].append(bucket.master)
            shapes[id(bucket.master)] = matrices
        gradients = {id(bucket.master): bucket.gradients for bucket in self._buckets}
        rules: list[Rule] = [Muon(kinds[1], gradients, shapes, settings, self.world, self._holders)]
        if kinds[0]:
            rules.append(Adam(kinds[0], settings))
        self._rules = rules
