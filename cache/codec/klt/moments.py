"""Moments of rows, and what is computed from them: regressions, bases, and the metric of a target's
distribution. Pure functions on tensors.

Legend: D width of a row, F features, V vocabulary, H hidden size, M last states.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WIDE = 8192  # rows of up to this width are summed in float64
FISHER_FLOOR = 0.01  # of the metric's mean eigenvalue: no direction is free
FISHER_ROWS = 8192


@dataclass
class Moments:
    """First and second moments of rows [n, D], added up in float64 from float32 products."""

    sums: torch.Tensor
    gram: torch.Tensor
    rows: int = 0

    @classmethod
    def of_width(cls, width: int, device: torch.device) -> Moments:
        import torch

        wide = torch.float64 if width <= WIDE else torch.float32
        return cls(
            torch.zeros(width, dtype=wide, device=device),
            torch.zeros(width, width, dtype=wide, device=device),
        )

    def add(self, rows: torch.Tensor) -> None:
        rows = rows.float()
        self.sums += rows.sum(0)
        self.gram += rows.T @ rows
        self.rows += rows.shape[0]

    def covariance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean [D] and covariance [D, D]."""
        import torch

        mean = self.sums / self.rows
        return mean, self.gram / self.rows - torch.outer(mean, mean)


def regression(
    covariance: torch.Tensor, targets: int, ridge: float, apart: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ridge from the later columns of ``covariance`` to the first ``targets``: weights [F, targets]
    and the residual's covariance.

    ``ridge`` is relative to the features' mean variance; the first ``apart`` of them have another
    scale than the others and their own mean variance.
    """
    import torch

    yy, yf, ff = (
        covariance[:targets, :targets],
        covariance[:targets, targets:],
        covariance[targets:, targets:],
    )
    damped = ff.clone()
    diagonal = damped.diagonal()
    for group in (slice(0, apart), slice(apart, None)) if apart else (slice(None),):
        diagonal[group] += ridge * diagonal[group].mean()
    w = torch.linalg.solve(damped, yf.T)
    cross = yf @ w
    return w, yy - cross - cross.T + w.T @ (ff @ w)


def eigen(covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return eigenvalues in descending order and eigenvectors as columns; each vector's largest
    entry is positive, so that equal input gives equal signs.
    """
    import torch

    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    largest = vectors.abs().argmax(0)
    return values, vectors * vectors[
        largest, torch.arange(vectors.shape[1], device=vectors.device)
    ].sign()


def fisher(states: Iterable[torch.Tensor], head: torch.Tensor) -> torch.Tensor:
    """Return the mean over last states [M, H] of the Fisher information of the distribution
    ``softmax(head @ state)``: float64 [H, H].
    """
    import torch

    head = head.float()
    shares = torch.zeros(head.shape[0], dtype=torch.float64, device=head.device)
    squares = torch.zeros(head.shape[1], head.shape[1], dtype=torch.float64, device=head.device)
    rows = 0
    for block in states:
        if rows >= FISHER_ROWS:
            break
        for some in torch.split(block[: FISHER_ROWS - rows].to(head.device).float(), 512):
            p = (some @ head.T).softmax(1)
            shares += p.sum(0).double()
            centre = (p @ head).double()
            squares += centre.T @ centre
            rows += some.shape[0]
    weighted = head * (shares / rows).float()[:, None]
    return (head.T @ weighted).double() - squares / rows


def root(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the symmetric square root of ``matrix`` with ``FISHER_FLOOR`` added to its
    eigenvalues, and its inverse.
    """
    import torch

    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    values = values.clamp(min=0)
    values = values + (FISHER_FLOOR * float(values.mean()) or 1.0)
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
