"""Fit the tables of the transform codec to states of samples spread over a corpus.

There are three passes over the states, which may be on the host: norms (which rows are massive),
moments, and cells, which set the step (``Rates``). Then the last state follows, from decoded aux
coefficients. All work runs on the device of the embedding.

Legend: T tokens, M stored last states, L aux layers, H hidden size, C = L * H, F features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from dspark.cache.codec.base import Tokens
from dspark.cache.codec.klt.codec import Known
from dspark.cache.codec.klt.half import half_on
from dspark.cache.codec.klt.moments import FISHER_ROWS, Moments, eigen, fisher, regression, root
from dspark.cache.codec.klt.symbols import Packing, entropy_columns, offsets_of, quantise, step_for
from dspark.cache.codec.klt.tables import CONTEXT, Tables, Transform
from dspark.cache.errors import UsageError

if TYPE_CHECKING:
    import torch

Say = Callable[[str], None]

MASSIVE = 10.0  # a row of this many times a layer's median norm is left out of the moments
# of the median deviation, so that a constant channel does not divide by zero
LEAST_DEVIATION = 1e-3
RIDGE_AUX, RIDGE_LAST = 1e-2, 5e-2  # of the features' mean variance
PIECE = 4096  # tokens, in whole samples, that are on the device at once
HELD_OUT = 8  # every n-th sample tells what the fit takes for its own
RATE_ROWS = 8192  # maximum rows of each kind that set the step
LEAST_BITS = 0.02  # a column of less entropy is not kept
# a row is exact where its classes would add this many times an ordinary row's error
EXACT_NOISE = 2.0


class Rates(NamedTuple):
    """Coefficients that tell the bits per row of new text, each [n, K]: ``every`` of rows of all
    samples; ``held`` of samples that its transform was not fitted to; ``again`` of the same rows in
    the one that is.

    A fit takes some of its own rows' accident for law and codes them in fewer bits than others. How
    many fewer is the difference of ``held`` and ``again``, which a few samples tell well, as it
    compares each with itself. Their bits alone would not: those of two samples differ by a fifth.
    """

    every: torch.Tensor
    held: torch.Tensor
    again: torch.Tensor

    def bits(self, step: float) -> float:
        every, held, again = (float(entropy_columns(quantise(y, step)).sum()) for y in self)
        return every + held - again


class Piece(NamedTuple):
    """States of a run of samples: ``aux`` [T, L, H], ``last`` [M, H], any float dtype."""

    aux: torch.Tensor
    last: torch.Tensor
    tokens: Tokens


def pieces_of(
    aux: torch.Tensor, last: torch.Tensor, tokens: Tokens
) -> tuple[list[Piece], list[Piece]]:
    """Return runs of whole samples of about ``PIECE`` tokens: those to learn from, and those held
    out, which are every n-th sample, so that they are spread over the corpus as the others are.
    """
    import numpy as np

    starts = tokens.sample_start.cpu().numpy()
    samples = len(starts) - 1
    held = np.zeros(samples, np.bool_)
    held[HELD_OUT // 2 :: HELD_OUT] = True
    held[-1] |= not held.any()
    ends = [0]
    for i in range(1, samples + 1):
        full = starts[i] - starts[ends[-1]] >= PIECE
        if full or i == samples or held[i] != held[i - 1]:
            ends.append(i)
    at = np.searchsorted(tokens.last_token.cpu().numpy(), starts[ends])
    out: tuple[list[Piece], list[Piece]] = ([], [])
    for n in range(len(ends) - 1):
        a, b = int(starts[ends[n]]), int(starts[ends[n + 1]])
        rows = slice(int(at[n]), int(at[n + 1]))
        own = dataclasses.replace(
            tokens,
            input_ids=tokens.input_ids[a:b],
            sample_start=tokens.sample_start[ends[n] : ends[n + 1] + 1] - a,
            last_token=tokens.last_token[rows] - a,
        )
        out[int(held[ends[n]])].append(Piece(aux[a:b], last[rows], own))
    return out


def fit(
    aux: torch.Tensor,
    last: torch.Tensor,
    tokens: Tokens,
    *,
    aux_bits: float,
    last_bits: float,
    context: int | None = None,
    say: Say = lambda text: None,
) -> Tables:
    """Fit tables for ``aux_bits`` per value of the aux layers and ``last_bits`` per value of the
    last state, by entropy on held-out samples.

    ``context``: see ``Tables`` (None: two hidden sizes). Raises UsageError for fewer than two
    samples or without a stored last state.
    """
    learn, keep = pieces_of(aux, last, tokens)
    stored = [sum(p.last.shape[0] for p in some) for some in (learn, keep)]
    if not learn or not all(stored):
        raise UsageError(
            f"found {len(tokens.sample_start) - 1} samples to calibrate on, with {stored[0]} "
            f"stored last states to fit on and {stored[1]} to measure on; expected some of each. "
            "Choose a rotated codec (--codec rotated-4-4) or dump more rows."
        )
    layers, hidden = aux.shape[1:]
    work = _Fit(tokens, layers, hidden, say)
    ordinary = work.ordinary([*learn, *keep])
    found = work.aux(learn, keep, ordinary, aux_bits)
    return work.last(
        learn,
        keep,
        found,
        min(CONTEXT * hidden if context is None else context, found.kept),
        last_bits,
    )


@dataclass(frozen=True, slots=True)
class _Fit:
    """One calibration, on the device of ``about.embedding``."""

    about: Tokens
    layers: int
    hidden: int
    say: Say

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

    def ordinary(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Return the largest ordinary norm of each layer, float32 [L]."""
        import torch

        norms = [p.aux.to(self.device).float().norm(dim=2) for p in pieces]
        return MASSIVE * torch.cat(norms).median(0).values

    def centre(
        self, pieces: Sequence[Piece], most: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and deviation of ordinary rows, float32 [C]."""
        import torch

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
        return mean.float(), deviation.float()

    def aux(
        self, learn: Sequence[Piece], keep: Sequence[Piece], most: torch.Tensor, bits: float
    ) -> Transform:
        """Fit the aux layers' transform for ``bits`` per value."""
        import torch

        channels = self.layers * self.hidden
        mean, deviation = self.centre([*learn, *keep], most)
        moments = Moments.of_width(channels + 2 * self.hidden, self.device)

        def fitted(pieces: Sequence[Piece]) -> Transform:
            """Fit to ``pieces`` and to all that came before: the moments go on."""
            for piece in self.moved(pieces):
                ok = _is_ordinary(piece.aux, most)
                z = (piece.aux[ok].flatten(1).float() - mean) / deviation
                moments.add(torch.cat([z, _around(piece)[ok]], 1))
            centre, covariance = moments.covariance()
            weights, residual = regression(covariance, channels, RIDGE_AUX)
            energy = float(covariance[:channels, :channels].diagonal().sum())
            self.say(
                f"aux layers: {moments.rows:,} tokens, {moments.rows / channels:.1f} per each of "
                f"{channels:,} dimensions; embeddings explain "
                f"{1 - float(residual.diagonal().sum()) / max(energy, 1e-12):.1%} of the "
                "energy"
            )
            shifted = mean + deviation * (centre[:channels] - centre[channels:] @ weights).float()
            del covariance
            _, basis = eigen(residual)
            return _transform(shifted, deviation, basis.T, None, weights)

        def coefficients(transform: Transform, pieces: Sequence[Piece]) -> torch.Tensor:
            half = half_on(transform, self.device)
            found = (
                half.coefficients(p.aux.flatten(1), _around(p))[_is_ordinary(p.aux, most)]
                for p in self.moved(pieces)
            )
            return _some(found, sum(p.aux.shape[0] for p in pieces))

        held = coefficients(fitted(learn), keep)
        whole = fitted(keep)
        every = coefficients(whole, [*learn, *keep])
        return _quantised(whole, Rates(every, held, coefficients(whole, keep)), bits * channels)

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
                code = half.encode(piece.aux.flatten(1), _around(piece))[0]
                yield (
                    piece.last.float(),
                    Known.of(piece.tokens).near(at, half, code, count).plain().float(),
                )

        moments = Moments.of_width(count + 4 * hidden, self.device)
        head = self.about.head if self.about.head is not None else self.about.embedding
        metric, inverse = root(fisher(_spread([*learn, *keep]), head.to(self.device)))

        def fitted(pieces: Sequence[Piece]) -> Transform:
            """Fit to ``pieces`` and to all that came before: the moments go on."""
            for states, features in rows(pieces):
                moments.add(torch.cat([states, features], 1))
            return self.last_transform(moments, count, metric, inverse)

        def coefficients(transform: Transform, pieces: Sequence[Piece]) -> torch.Tensor:
            own = half_on(transform, self.device)
            states = sum(p.last.shape[0] for p in pieces)
            return _some((own.coefficients(*pair) for pair in rows(pieces)), states)

        held = coefficients(fitted(learn), keep)
        whole = fitted(keep)
        every = coefficients(whole, [*learn, *keep])
        found = Rates(every, held, coefficients(whole, keep))
        return dataclasses.replace(tables, last=_quantised(whole, found, bits * hidden))

    def last_transform(
        self, moments: Moments, count: int, metric: torch.Tensor, inverse: torch.Tensor
    ) -> Transform:
        """Return the last state's transform, from the moments of states, ``count`` coefficients and
        embeddings.
        """
        import torch

        hidden = self.hidden
        centre, covariance = moments.covariance()
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
        _, basis = eigen(left)
        back, forward = basis.T @ inverse, metric @ basis
        return _transform(mean, torch.ones_like(mean), back, forward, weights)


def _around(piece: Piece) -> torch.Tensor:
    """Return the features of the aux layers, float32 [T, 2 H]."""

    return Known.of(piece.tokens).around(slice(None)).plain()


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
) -> Transform:
    """A transform before quantisation."""
    import torch

    def half(x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.bfloat16).contiguous()

    empty = torch.zeros(2, 0)
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
    )


def _spread(pieces: Sequence[Piece]) -> Iterator[torch.Tensor]:
    """Yield last states of all ``pieces``, about as many as ``fisher`` takes."""
    step = max(1, sum(p.last.shape[0] for p in pieces) // FISHER_ROWS)
    return (p.last[::step] for p in pieces)


def _some(blocks: Iterable[torch.Tensor], rows: int) -> torch.Tensor:
    """Return every n-th of the ``rows`` rows of ``blocks``, at most about ``RATE_ROWS``."""
    import torch

    step = max(1, -(-rows // RATE_ROWS))
    return torch.cat([block[::step].clone() if step > 1 else block for block in blocks])


def _quantised(whole: Transform, rates: Rates, bits: float) -> Transform:
    """Return ``whole`` with the step at which new rows take ``bits`` each, and the columns worth
    keeping.
    """
    import torch

    y = rates.every
    step = step_for(rates.bits, float(y.abs().amax()) * 2 + 1e-3, bits)
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
        bits=rates.bits(step),
    )
    code_error = (y.abs() / step - cells).square().sum(1) * step * step
    noise = float(code_error.median())
    return dataclasses.replace(found, noise=noise, limit=EXACT_NOISE * noise)
