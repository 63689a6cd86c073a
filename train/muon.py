"""Muon: the matrices of the draft's layers and ``fc`` take steps of equal size in every direction; AdamW has the rest.

A matrix's momentum is replaced by the nearest matrix with orthonormal rows (or columns): its singular vectors with all singular values
near 1. Five Newton-Schulz steps in bfloat16 do that with products alone. The step is scaled by ``0.2 sqrt(larger side)``, so that its
elements are as large as AdamW's usually are and one learning rate serves both (Moonlight, arXiv 2502.16982). Norms, biases, the
confidence head and the Markov factors, whose rows are embeddings of tokens, stay with AdamW.

Costs half of AdamW's moments for these matrices, and 15 small products a shape and step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from dspark.train.distributed import World
from dspark.train.optim import Adam, AdamSettings, FlatOptimizer, Rule, excess

MOMENTUM = 0.95
STEPS = 5
# Of x (a + b x^2 + c x^4), which takes singular values in (0, 1] to about 1 +- 0.3 in five steps; Keller Jordan's choice, steep at 0.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonal(matrices: Tensor, steps: int = STEPS) -> Tensor:
    """The orthogonal factors, roughly, of ``matrices`` [n, rows, columns] with rows <= columns, in their dtype."""
    a, b, c = COEFFICIENTS
    x: Tensor = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def is_matrix(name: str, p: nn.Parameter) -> bool:
    """Whether Muon has the parameter of this name."""
    return p.ndim == 2 and name.startswith(("layers.", "fc."))


class Muon:
    """The rule. ``shapes``: where matrices lie in each flat float32 master, by its ``id``, as (start, shape)."""

    moments: tuple[str, ...] = ("momentum",)

    def __init__(
        self,
        masters: list[nn.Parameter],
        shapes: Mapping[int, list[tuple[int, torch.Size]]],
        settings: AdamSettings,
    ) -> None:
        self.masters, self.shapes = masters, shapes
        self.weight_decay, self.clip = settings.weight_decay, settings.clip
        self.updates = 0
        self._momentum = {id(p): torch.zeros_like(p, requires_grad=False) for p in masters}

    def moment(self, name: str, master: nn.Parameter) -> Tensor:
        return self._momentum[id(master)]

    def _views(self, flat: Tensor, master: nn.Parameter) -> list[Tensor]:
        return [flat[at : at + shape.numel()].view(shape) for at, shape in self.shapes[id(master)]]

    @torch.no_grad()
    def update(self, lr: float, norm: Tensor) -> None:
        """As ``Rule.update``."""
        self.updates += 1
        over = excess(norm, self.clip)
        # Matrices of one shape, up to a transposition, are orthogonalised together.
        alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for p in self.masters:
            assert p.grad is not None
            gradient = p.grad / over
            momentum = self._momentum[id(p)].mul_(MOMENTUM).add_(gradient)
            ahead = gradient.add_(momentum, alpha=MOMENTUM)  # Nesterov
            p.mul_(1.0 - lr * self.weight_decay)
            for m, g in zip(self._views(p, p), self._views(ahead, p), strict=True):
                pair = (m.mT, g.mT) if m.shape[0] > m.shape[1] else (m, g)
                alike.setdefault((pair[0].shape[0], pair[0].shape[1]), []).append(pair)
        for (_, larger), pairs in alike.items():
            stacked = torch.stack([g for _, g in pairs])
            factors = orthogonal(stacked.bfloat16() if stacked.is_cuda else stacked).float()
            torch._foreach_add_([m for m, _ in pairs], list(factors), alpha=-lr * 0.2 * larger**0.5)


class MasterMuon(FlatOptimizer):
    """Muon over the matrices that ``is_matrix`` names, AdamW over the other parameters."""

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        settings: AdamSettings,
        world: World | None = None,
    ) -> None:
        super().__init__(named, world, is_matrix)
        kinds: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        shapes: dict[int, list[tuple[int, torch.Size]]] = {}
        for bucket in self._buckets:
            matrices = [(at, self.parameters[n].shape) for n, at in bucket.at.items() if is_matrix(n, self.parameters[n])]  # fmt: skip
            kinds[bool(matrices)].append(bucket.master)
            shapes[id(bucket.master)] = matrices
        rules: list[Rule] = [Muon(kinds[1], shapes, settings)]
        if kinds[0]:
            rules.append(Adam(kinds[0], settings))
        self._rules = rules
