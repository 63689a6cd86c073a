"""Finding the tables of the transform codec from states of samples from all over a corpus.

Three passes over states that lie on the host: norms (which rows are massive), moments, and cells of samples that were held out of the
moments, which set the step so that the rate is one that new text has. Then the last state, from decoded aux coefficients.

Legend: T tokens, L aux layers, H hidden size, C = L * H, F features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from dspark.cache.codec.klt import Context, Half, Klt
from dspark.cache.codec.klt_symbols import Packing, entropy_columns, offsets_of, quantise, step_for
from dspark.cache.codec.klt_tables import Tables, Transform
from dspark.cache.errors import UsageError

if TYPE_CHECKING:
    import torch

MASSIVE = 10.0  # a row of this many times a layer's median norm is left out of the moments
LEAST_DEVIATION = 1e-3  # of the median deviation, so that a constant channel does not divide by zero
RIDGE_AUX, RIDGE_LAST = 1e-2, 5e-2  # of the features' mean variance
FISHER_FLOOR = 0.01  # of the metric's mean eigenvalue: no direction is free
FISHER_ROWS = 8192
HELD_OUT = 8  # every so many-th sample is kept for the step
RATE_ROWS = 16384  # held-out rows at most that the step is set on
LEAST_BITS = 0.02  # a column of less entropy is not kept
EXACT_NOISE = 2.0  # a row is exact where its classes would add this many times an ordinary row's error


class Piece(NamedTuple):
    """States of some samples on the host: ``aux`` [T, L, H], ``last`` [M, H], any float dtype; ``context`` with int64 on the host."""

    aux: torch.Tensor
    last: torch.Tensor
    context: Context


@dataclass
class Moments:
    """First and second moments of rows [n, D], added up in float64 from float32 products."""

    sums: torch.Tensor
    gram: torch.Tensor
    rows: int = 0

    @classmethod
    def of_width(cls, width: int, device: torch.device) -> Moments:
        import torch

        wide = torch.float64 if width <= 8192 else torch.float32
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
    """Ridge from the later columns of ``covariance`` to the first ``targets``: weights [F, targets] and the residual's covariance.

    ``ridge`` is of the features' mean variance; the first ``apart`` of them have another scale than the others and a mean of their own.
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
    """Eigenvalues, falling, and eigenvectors as columns; each vector's largest entry positive, so that equal input gives equal signs."""
    import torch

    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    largest = vectors.abs().argmax(0)
    return values, vectors * vectors[largest, torch.arange(vectors.shape[1], device=vectors.device)].sign()


def fit(
    pieces: Sequence[Piece],
    embed: torch.Tensor,
    head: torch.Tensor,
    *,
    aux_bits: float,
    last_bits: float,
    context: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Tables:
    """Tables for ``aux_bits`` a value of the aux layers and ``last_bits`` a value of the last state, by entropy on held-out samples.

    ``embed`` [V, H], ``head`` [V, H] on the device where the work is done. ``context``: see ``Tables`` (None: two hidden sizes).
    Raises UsageError with fewer than two samples' worth of pieces.
    """
    if len(pieces) < 2:
        raise UsageError(f"found {len(pieces)} pieces of states to calibrate on, expected at least 2")
    layers, hidden = pieces[0].aux.shape[1:]
    held = [i for i in range(len(pieces)) if i % HELD_OUT == HELD_OUT // 2] or [len(pieces) - 1]
    learn = [p for i, p in enumerate(pieces) if i not in set(held)]
    keep = [p for i, p in enumerate(pieces) if i in set(held)]
    work = _Fit(embed, layers, hidden)
    ordinary = work.ordinary(pieces)
    mean, deviation = work.centre(learn, ordinary)
    aux = work.aux(learn, keep, ordinary, mean, deviation, aux_bits, say)
    count = min(2 * hidden if context is None else context, aux.kept)
    return work.last(learn, keep, aux, count, head, last_bits, say)


@dataclass
class _Fit:
    """One calibration. ``embed`` [V, H] says the device."""

    embed: torch.Tensor
    layers: int
    hidden: int

    def _moved(self, piece: Piece) -> Piece:
        device = self.embed.device
        context = Context(*(x.to(device) for x in piece.context))
        return Piece(piece.aux.to(device), piece.last.to(device), context)

    def ordinary(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """The largest ordinary norm of each layer, float32 [L]."""
        import torch

        norms = torch.cat([p.aux.to(self.embed.device).float().norm(dim=2) for p in pieces])
        return MASSIVE * norms.median(0).values

    def centre(self, pieces: Sequence[Piece], most: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of ordinary rows, float32 [C]."""
        import torch

        total = square = None
        rows = 0
        for piece in pieces:
            x = piece.aux.to(self.embed.device).double()
            x = x[(x.norm(dim=2) <= most).all(1)].flatten(1)
            rows += x.shape[0]
            total = x.sum(0) if total is None else total + x.sum(0)
            square = x.square().sum(0) if square is None else square + x.square().sum(0)
        assert total is not None
        assert square is not None
        mean = total / rows
        deviation = (square / rows - mean.square()).clamp(min=0).sqrt()
        least = float(deviation.median()) * LEAST_DEVIATION
        deviation = deviation.clamp(min=least) if least > 0 else torch.ones_like(deviation)
        return mean.float(), deviation.float()

    def aux(
        self,
        learn: Sequence[Piece],
        keep: Sequence[Piece],
        most: torch.Tensor,
        mean: torch.Tensor,
        deviation: torch.Tensor,
        bits: float,
        say: Callable[[str], None],
    ) -> Transform:
        import torch

        channels = self.layers * self.hidden
        plain = Klt(_blank(self, mean, deviation), self.embed)
        moments = Moments.of_width(channels + 2 * self.hidden, self.embed.device)
        for piece in map(self._moved, learn):
            ok = (piece.aux.float().norm(dim=2) <= most).all(1)
            z = (piece.aux[ok].flatten(1).float() - mean) / deviation
            features = plain.aux_features(piece.context, slice(None))[ok]
            moments.add(torch.cat([z, features.float()], 1))
        centre, covariance = moments.covariance()
        weights, residual = regression(covariance, channels, RIDGE_AUX)
        energy = float(covariance[:channels, :channels].diagonal().sum())
        say(
            f"aux layers: {moments.rows:,} tokens, {moments.rows / channels:.1f} for each of {channels:,} dimensions; "
            f"embeddings explain {1 - float(residual.diagonal().sum()) / energy:.1%} of the energy"
        )
        shifted = mean + deviation * (centre[:channels] - centre[channels:] @ weights).float()
        _, basis = eigen(residual)
        whole = _transform(shifted, deviation, basis.T, None, weights)
        half = Half(whole, self.embed.device)

        def coefficients() -> Iterable[torch.Tensor]:
            for piece in map(self._moved, keep):
                ok = (piece.aux.float().norm(dim=2) <= most).all(1)
                features = plain.aux_features(piece.context, slice(None))
                yield half.coefficients(piece.aux.flatten(1), features)[ok]

        return _quantised(whole, _some(coefficients()), bits * channels)

    def last(
        self,
        learn: Sequence[Piece],
        keep: Sequence[Piece],
        aux: Transform,
        count: int,
        head: torch.Tensor,
        bits: float,
        say: Callable[[str], None],
    ) -> Tables:
        import torch

        tables = Tables(aux, aux, self.layers, self.hidden, count)
        klt = Klt(tables, self.embed)

        def rows(pieces: Sequence[Piece]) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
            for piece in map(self._moved, pieces):
                if piece.last.shape[0]:
                    code = klt.encode_aux(piece.aux, piece.context).code
                    yield piece.last.float(), klt.last_features(piece.context, code, slice(None)).float()

        width = self.hidden + count + 3 * self.hidden
        moments = Moments.of_width(width, self.embed.device)
        for states, features in rows(learn):
            moments.add(torch.cat([states, features], 1))
        centre, covariance = moments.covariance()
        weights, residual = regression(covariance, self.hidden, RIDGE_LAST, count)
        metric, inverse = root(fisher((p.last for p in learn), head.to(self.embed.device)))
        _, basis = eigen(metric @ residual @ metric)
        say(
            f"last state: {moments.rows:,} rows; prediction leaves "
            f"{float((metric @ residual @ metric).trace() / (metric @ covariance[: self.hidden, : self.hidden] @ metric).trace()):.1%} "
            "of its energy in the metric of the target's distribution"
        )
        mean = centre[: self.hidden] - centre[self.hidden :] @ weights
        ones = torch.ones_like(mean)
        whole = _transform(mean, ones, basis.T @ inverse, metric @ basis, weights)
        half = Half(whole, self.embed.device)
        found = _some(half.coefficients(states, features) for states, features in rows(keep))
        return dataclasses.replace(tables, last=_quantised(whole, found, bits * self.hidden))


def fisher(states: Iterable[torch.Tensor], head: torch.Tensor) -> torch.Tensor:
    """Mean over last states [M, H] of the Fisher information of the distribution ``softmax(head @ state)``: float64 [H, H]."""
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
    """The symmetric square root of ``matrix`` with ``FISHER_FLOOR`` added to its eigenvalues, and its inverse."""
    import torch

    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    values = values.clamp(min=0)
    values = values + (FISHER_FLOOR * float(values.mean()) or 1.0)
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T


def _transform(
    mean: torch.Tensor,
    deviation: torch.Tensor,
    back: torch.Tensor,
    forward: torch.Tensor | None,
    predict: torch.Tensor,
) -> Transform:
    """A transform that is not quantised yet."""
    import torch

    def half(x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.bfloat16).contiguous()

    empty = torch.zeros(2, 0)
    nothing = Packing((0, 0, 0, 0))
    return Transform(
        mean.float(), deviation.float(), half(back), None if forward is None else half(forward), half(predict),
        empty, 1.0, nothing, 0.0, 0.0, 0.0,
    )  # fmt: skip


def _blank(work: _Fit, mean: torch.Tensor, deviation: torch.Tensor) -> Tables:
    """Tables that only know the shapes."""
    import torch

    none = torch.zeros(0, mean.shape[0], device=mean.device)
    transform = _transform(mean, deviation, none, None, none)
    return Tables(transform, transform, work.layers, work.hidden, 0)


def _some(blocks: Iterable[torch.Tensor]) -> torch.Tensor:
    """The first ``RATE_ROWS`` rows."""
    import torch

    out: list[torch.Tensor] = []
    for block in blocks:
        out.append(block[: RATE_ROWS - sum(map(len, out))])
        if sum(map(len, out)) >= RATE_ROWS:
            break
    return torch.cat(out)


def _quantised(whole: Transform, y: torch.Tensor, bits: float) -> Transform:
    """``whole`` with the step at which held-out coefficients ``y`` take ``bits`` a row, and the columns that are worth keeping."""
    import torch

    step = step_for(y, bits)
    q = quantise(y, step)
    wanted = (entropy_columns(q) > LEAST_BITS).nonzero()[:, 0]
    kept = int(wanted[-1]) + 1 if wanted.numel() else 0
    packing = Packing.fitting(q[:, :kept])
    kept = packing.total
    y = y[:, :kept]
    offsets = offsets_of(y, step, packing)
    limits = torch.tensor(packing.limits(), dtype=y.dtype, device=y.device)
    cells = torch.minimum((y.abs() / step + 0.5).floor(), limits)
    found = dataclasses.replace(
        whole,
        back=whole.back[:kept].clone(),
        forward=None if whole.forward is None else whole.forward[:, :kept].clone(),
        offsets=offsets,
        step=step,
        packing=packing,
        bits=float(entropy_columns(q[:, :kept]).sum()),
    )
    code_error = (y.abs() / step - cells).square().sum(1) * step * step
    noise = float(code_error.median())
    return dataclasses.replace(found, noise=noise, limit=EXACT_NOISE * noise)
