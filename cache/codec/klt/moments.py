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
EIGEN_COPIES = 6  # of a matrix that its eigenvectors take, the solver's workspace included
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

        wide = torch.float64 if _is_narrow(width) else torch.float32
        return cls(
            torch.zeros(width, dtype=wide, device=device),
            torch.zeros(width, width, dtype=wide, device=device),
        )

    def add(self, rows: torch.Tensor, times: int = 1) -> None:
        """Add ``rows``; ``times`` -1 takes away what was added."""
        rows = rows.float()
        self.sums.add_(rows.sum(0), alpha=times)
        self.gram.add_(rows.T @ rows, alpha=times)
        self.rows += times * rows.shape[0]

    def covariance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean [D] and covariance [D, D]."""
        mean = self.sums / self.rows
        return mean, (self.gram / self.rows).addr_(mean, mean, alpha=-1)


def _is_narrow(width: int) -> bool:
    return width <= WIDE


def sums_bytes(width: int) -> int:
    """Bytes of the ``Moments`` of rows of ``width``."""
    return (8 if _is_narrow(width) else 4) * width * width


def where_it_fits(matrix: torch.Tensor, copies: int) -> torch.Tensor:
    """Return ``matrix`` where ``copies`` of it fit beside it: on its GPU, which an engine of the
    target may fill, or else on the host, where minutes pass (30,720 dimensions).
    """
    import torch

    if not matrix.is_cuda:
        return matrix
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(matrix.device)
    return matrix if free > copies * matrix.nbytes else matrix.cpu()


def regression(
    covariance: torch.Tensor, targets: int, ridge: float, apart: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ridge from the later columns of ``covariance`` to the first ``targets``: weights [F, targets]
    and the residual's covariance.

    ``ridge`` is relative to the features' mean variance; the first ``apart`` of them have another
    scale than the others and their own mean variance. Features that never vary have no weight.
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
        diagonal[group] += ridge * (float(diagonal[group].mean()) or 1.0)
    w = torch.linalg.solve(damped, yf.T)
    residual = yy.clone()
    cross = yf @ w
    residual -= cross
    residual -= cross.T
    del cross
    return w, residual.addmm_(w.T, ff @ w)


def eigen(covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return eigenvalues in descending order and eigenvectors as columns; each vector's largest
    entry is positive, so that equal input gives equal signs.
    """
    import torch

    device = covariance.device
    covariance = where_it_fits(covariance, EIGEN_COPIES)
    values, vectors = torch.linalg.eigh((covariance + covariance.T).div_(2))
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    largest = vectors.abs().argmax(0)
    at = torch.arange(vectors.shape[1], device=vectors.device)
    return values.to(device), vectors.mul_(vectors[largest, at].sign()).to(device)


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
