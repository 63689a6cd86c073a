"""Fit the tables of the transform codec to states of samples spread over a corpus.

All work runs on the device of the embedding. The states may be on the host: they are brought there
once, or in pieces in each pass over them if they do not fit. Passes tell norms (which rows are
massive), moments, how many bits each sample will take, and the coefficients of some of them, which
set the step (``rate.py``). Then the last state follows, from decoded aux coefficients.

A fit takes some of its own rows' accident for law and codes them in fewer bits than others, so the
step is set on samples that it has not seen. They are few, and the bits of two samples differ by a
fifth: so they are chosen to be like the others in what can be told before the fit
(``one_in_eight``), and what difference is left is made up for (``Sizes.over``).

Legend: T tokens, M stored last states, L aux layers, H hidden size, C = L * H, F features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from dspark.cache.codec.base import Tokens
from dspark.cache.codec.klt.codec import Known
from dspark.cache.codec.klt.half import half_on
from dspark.cache.codec.klt.moments import Moments, eigen, fisher, regression, root
from dspark.cache.codec.klt.pieces import (
    Piece,
    one_in_eight,
    pieces_of,
    resident,
    some_of,
    spread,
)
from dspark.cache.codec.klt.rate import Corpus, Rows, stepped
from dspark.cache.codec.klt.symbols import Packing
from dspark.cache.codec.klt.tables import CONTEXT, Tables, Transform
from dspark.cache.codec.state_errors import check_finite
from dspark.cache.errors import UsageError
from dspark.cache.shared.phases import Phases

if TYPE_CHECKING:
    import torch

    Block = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # of ``rate.Rows``

Say = Callable[[str], None]

MASSIVE = 10.0  # a row of this many times a layer's median norm is left out of the moments
# of the median deviation, so that a constant channel does not divide by zero
LEAST_DEVIATION = 1e-3
RIDGE_AUX, RIDGE_LAST = 1e-2, 5e-2  # of the features' mean variance


def fit(
    aux: torch.Tensor,
    last: torch.Tensor,
    tokens: Tokens,
    *,
    aux_bits: float,
    last_bits: float,
    coarse: float = 1.0,
    context: int | None = None,
    say: Say = lambda text: None,
) -> Tables:
    """Fit tables with which a corpus takes ``aux_bits`` per value of the aux layers and
    ``last_bits`` per value of the last state on disk, tokens stored exactly included.

    ``coarse``: see ``Transform``, of the aux layers. ``context``: see ``Tables`` (None: two hidden
    sizes). ``say`` is told what was found, and the seconds of each phase. Raises UsageError for
    fewer than two samples or without a stored last state, EngineError for a state that is not
    finite.
    """
    starts = tokens.sample_start.cpu().numpy()
    stored = np.diff(np.searchsorted(tokens.last_token.cpu().numpy(), starts)) > 0
    if len(stored) < 2 or stored.sum() < 2:
        raise UsageError(
            f"found {len(stored)} samples to calibrate on, {stored.sum()} of them with a stored "
            "last state; expected two or more, some to fit on and some to measure on. Choose a "
            "rotated codec (--codec rotated-4-4) or dump more rows."
        )
    layers, hidden = aux.shape[1:]
    work = _Fit(tokens, layers, hidden, say, Phases(tokens.embedding.device))
    with work.phase("states"):
        aux, last = resident(aux, last, work.device)
        check_finite(aux, last)
    runs, _ = pieces_of(aux, last, tokens, np.zeros(len(stored), np.bool_))
    with work.phase("moments"):
        scale = work.scale(runs)
        moments = work.moments(runs, scale)
    with work.phase("samples"):
        sizes = work.sizes(runs, scale, moments, coarse)
    held = one_in_eight(sizes.norm, stored)
    learn, keep = pieces_of(aux, last, tokens, held)
    with work.phase("moments"):
        work.add(moments, keep, scale, -1)
    found = work.aux(learn, keep, scale, moments, aux_bits, coarse, sizes.over(held))
    del moments
    count = min(CONTEXT * hidden if context is None else context, found.kept)
    tables = work.last(learn, keep, found, count, last_bits)
    say(f"learnt in seconds: {work.phases}")
    return tables


class Scale(NamedTuple):
    """Of ordinary tokens: ``mean`` and ``deviation`` float32 [C], the largest norm of each layer
    float32 [L].
    """

    mean: torch.Tensor
    deviation: torch.Tensor
    most: torch.Tensor


class Sizes(NamedTuple):
    """Of what prediction leaves of a sample's tokens, float64 [N]: mean ``norm``, and mean norm in
    units of their steps, ``scaled``; ``tokens`` int64 [N].
    """

    norm: npt.NDArray[np.float64]
    scaled: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.int64]

    def over(self, held: npt.NDArray[np.bool_]) -> float:
        """Return how many times the mean of the ``held`` samples the mean of all is, in steps. The
        bits of a sample's tokens follow that (correlation 0.75), and where steps are equal the
        norm (0.97).
        """
        some = np.average(self.scaled[held], weights=self.tokens[held])
        return float(np.average(self.scaled, weights=self.tokens) / some) if some else 1.0


@dataclass(frozen=True, slots=True)
class _Fit:
    """One calibration, on the device of ``about.embedding``."""

    about: Tokens
    layers: int
    hidden: int
    say: Say
    phases: Phases

    def phase(self, name: str) -> AbstractContextManager[None]:
        return self.phases.phase(name)

    @property
    def device(self) -> torch.device:
        return self.about.embedding.device

    def moved(self, pieces: Sequence[Piece]) -> Iterator[Piece]:
        for p in pieces:
            t, device = p.tokens, self.device
            there = (x.to(device) for x in (t.input_ids, t.sample_start, t.last_token))
            ids, start, at = there
            tokens = dataclasses.replace(t, input_ids=ids, sample_start=start, last_token=at)
            yield Piece(p.aux.to(device), p.last.to(device), tokens)

    def scale(self, pieces: Sequence[Piece]) -> Scale:
        import torch

        norms = [p.aux.to(self.device).float().norm(dim=2) for p in pieces]
        most = MASSIVE * torch.cat(norms).median(0).values
        width = self.layers * self.hidden
        total, square = torch.zeros(2, width, dtype=torch.float64, device=self.device)
        rows = 0
        for piece in pieces:
            x = piece.aux.to(self.device).double()
            x = x[_is_ordinary(x, most)].flatten(1)
            rows += x.shape[0]
            total += x.sum(0)
            square += x.square().sum(0)
        mean = total / max(rows, 1)
        deviation = (square / max(rows, 1) - mean.square()).clamp(min=0).sqrt()
        least = float(deviation.median()) * LEAST_DEVIATION
        deviation = deviation.clamp(min=least) if least > 0 else torch.ones_like(deviation)
        return Scale(mean.float(), deviation.float(), most)

    def moments(self, pieces: Sequence[Piece], scale: Scale) -> Moments:
        """Return the moments of scaled aux layers and of their features, of ordinary tokens."""
        out = Moments.of_width((self.layers + 2) * self.hidden, self.device)
        self.add(out, pieces, scale)
        return out

    def add(self, moments: Moments, pieces: Sequence[Piece], scale: Scale, times: int = 1) -> None:
        import torch

        for piece in self.moved(pieces):
            ok = _is_ordinary(piece.aux, scale.most)
            z = (piece.aux[ok].flatten(1).float() - scale.mean) / scale.deviation
            moments.add(torch.cat([z, _around(piece)[0][ok]], 1), times)

    def sizes(
        self, pieces: Sequence[Piece], scale: Scale, moments: Moments, coarse: float
    ) -> Sizes:
        """Return what says how many bits a sample takes; all samples had a part in the
        prediction.
        """
        import torch

        channels = self.layers * self.hidden
        centre, covariance = moments.covariance()
        weights, _ = regression(covariance, channels, RIDGE_AUX)
        base = (centre[:channels] - centre[channels:] @ weights).float()
        weights = weights.float()
        del covariance
        out, tokens = [], []
        for piece in self.moved(pieces):
            z = (piece.aux.flatten(1).float() - scale.mean) / scale.deviation
            features, few = _around(piece)
            left = (z - base - features @ weights).norm(dim=1)
            left[~_is_ordinary(piece.aux, scale.most)] = 0
            steps = torch.where(few, coarse, 1.0)
            both = torch.stack([left, left / steps]).double()
            ends = torch.nn.functional.pad(both.cumsum(1), (1, 0))
            start = piece.tokens.sample_start
            tokens.append(start.diff())
            out.append(ends[:, start].diff(dim=1) / start.diff().clamp(min=1))
        norm, scaled = torch.cat(out, 1).cpu().numpy()
        return Sizes(norm, scaled, torch.cat(tokens).cpu().numpy())

    def aux(
        self,
        learn: Sequence[Piece],
        keep: Sequence[Piece],
        scale: Scale,
        moments: Moments,
        bits: float,
        coarse: float,
        over: float,
    ) -> Transform:
        """Return the transform of the aux layers for ``bits`` per value, from ``moments`` of
        ``learn``. ``over``: see ``Sizes``.
        """
        channels = self.layers * self.hidden
        with self.phase("prediction"):
            centre, covariance = moments.covariance()
            weights, residual = regression(covariance, channels, RIDGE_AUX)
        energy = float(covariance[:channels, :channels].diagonal().sum())
        self.say(
            f"aux layers: {moments.rows:,} tokens, {moments.rows / channels:.1f} per each of "
            f"{channels:,} dimensions; embeddings explain "
            f"{1 - float(residual.diagonal().sum()) / max(energy, 1e-12):.1%} of the energy"
        )
        mean = scale.mean + scale.deviation * (
            (centre[:channels] - centre[channels:] @ weights).float()
        )
        del covariance
        with self.phase("basis"):
            _, basis = eigen(residual)
        del residual
        whole = _transform(mean, scale.deviation, basis.T, None, weights, coarse)
        del basis
        half = half_on(whole, self.device)

        def rows(
            pieces: Sequence[Piece],
        ) -> Iterator[Block]:
            for piece in self.moved(pieces):
                massive = ~_is_ordinary(piece.aux, scale.most)
                features, few = _around(piece)
                y = half.coefficients(piece.aux.flatten(1), features)
                y[massive] = 0
                massive[piece.tokens.sample_start[:-1]] = False
                times = half.scale(few)
                yield y if times is None else y * times[:, None], few, massive

        found = self.corpus(learn, keep, rows, over)
        return stepped(whole, found, bits * channels, self.phases)

    def last(
        self, learn: Sequence[Piece], keep: Sequence[Piece], aux: Transform, count: int, bits: float
    ) -> Tables:
        """Return both transforms; the last state's is fitted for ``bits`` per value, predicted from
        ``count`` coefficients of ``aux``.
        """
        import torch

        hidden = self.hidden
        tables = Tables(aux, aux, self.layers, hidden, count)
        half = half_on(aux, self.device)

        def rows(pieces: Sequence[Piece]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for piece in self.moved(pieces):
                at = piece.tokens.last_token
                features, few = (x[at] for x in _around(piece))
                cells = half.encode(piece.aux[at].flatten(1), features, few)[0]
                code = cells.new_zeros(piece.aux.shape[0], cells.shape[1])
                code[at] = cells
                yield (
                    piece.last.float(),
                    Known.of(piece.tokens).near(at, half, code, count).plain().float(),
                )

        moments = Moments.of_width(count + 4 * hidden, self.device)
        with self.phase("moments"):
            for states, features in rows(learn):
                moments.add(torch.cat([states, features], 1))
        head = self.about.head if self.about.head is not None else self.about.embedding
        with self.phase("metric"):
            metric, inverse = root(fisher(spread([*learn, *keep]), head.to(self.device)))
        whole = self.last_transform(moments, count, metric, inverse)
        own = half_on(whole, self.device)

        def coefficients(
            pieces: Sequence[Piece],
        ) -> Iterator[Block]:
            for states, features in rows(pieces):
                y = own.coefficients(states, features)
                none = torch.zeros(y.shape[0], dtype=torch.bool, device=y.device)
                yield y, none, none

        found = self.corpus(learn, keep, coefficients)
        own_table = stepped(whole, found, bits * hidden, self.phases)
        return dataclasses.replace(tables, last=own_table)

    def corpus(
        self,
        learn: Sequence[Piece],
        keep: Sequence[Piece],
        rows: Callable[[Sequence[Piece]], Iterable[Block]],
        over: float = 1.0,
    ) -> Corpus:
        """Return the ``rows`` that stand for those of the corpus (``Rows.of``)."""
        total = sum(p.aux.shape[0] for p in [*learn, *keep])
        share = self.about.share * sum(p.aux.shape[0] for p in learn) / total
        with self.phase("coefficients"):
            own = Rows.of(rows(some_of(learn))) if share else None
            return Corpus(Rows.of(rows(some_of(keep))), own, share, over)

    def last_transform(
        self, moments: Moments, count: int, metric: torch.Tensor, inverse: torch.Tensor
    ) -> Transform:
        """Return the last state's transform, from the moments of states, ``count`` coefficients and
        embeddings.
        """
        import torch

        hidden = self.hidden
        centre, covariance = moments.covariance()
        with self.phase("prediction"):
            weights, residual = regression(covariance, hidden, RIDGE_LAST, count)
        # Moments of wide rows are float32 (``WIDE``); what is left is small enough for float64.
        mean = (centre[:hidden] - centre[hidden:] @ weights).to(metric.dtype)
        spread, left = (
            metric @ x.to(metric.dtype) @ metric for x in (covariance[:hidden, :hidden], residual)
        )
        self.say(
            f"last state: {moments.rows:,} rows; prediction leaves "
            f"{float(left.trace() / spread.trace()):.1%} of its energy, in the metric of "
            "the target's distribution"
        )
        with self.phase("basis"):
            _, basis = eigen(left)
        back, forward = basis.T @ inverse, metric @ basis
        return _transform(mean, torch.ones_like(mean), back, forward, weights)


def _around(piece: Piece) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the features of the aux layers, float32 [T, 2 H], and which rows are coarse."""
    known = Known.of(piece.tokens)
    return known.around(slice(None)).plain(), known.coarse


def _is_ordinary(aux: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    """Tell which rows of ``aux`` [T, L, H] have no massive activation, bool [T]."""
    out: torch.Tensor = (aux.float().norm(dim=2) <= most).all(1)
    return out


def _transform(
    mean: torch.Tensor,
    deviation: torch.Tensor,
    back: torch.Tensor,
    forward: torch.Tensor | None,
    predict: torch.Tensor,
    coarse: float = 1.0,
) -> Transform:
    """A transform before quantisation."""
    import torch

    def half(x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.bfloat16).contiguous()

    empty = torch.zeros(2 if coarse == 1 else 4, 0)
    nothing = Packing((0, 0, 0, 0))
    return Transform(
        mean.float(),
        deviation.float(),
        half(back),
        None if forward is None else half(forward),
        half(predict),
        empty,
        1.0,
        nothing,
        0.0,
        0.0,
        0.0,
        coarse,
    )
