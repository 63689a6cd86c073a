"""What a codec loses: signal-to-noise ratios of decoded states, and the states they are measured
on.

Legend: T tokens, M stored last states, L aux layers, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from dspark.cache.codec.base import Tokens, tokens_of
from dspark.cache.codec.centre import CALIBRATION, spread, thin
from dspark.cache.records import TokenSample, last_rows

if TYPE_CHECKING:
    import torch

    from dspark.cache.codec.base import Codec
    from dspark.cache.reader import Cache


CALIBRATION_BYTES = (
    40e9  # of states on the host to learn from: 16 tokens per dimension at five layers of 6,144
)


GOLDEN = 0.6180339887498949  # multiples of it, modulo one, are spread evenly


def snr_db(x: torch.Tensor, y: torch.Tensor) -> float | None:
    """Return 10 log10 (signal / error) of ``y`` against ``x``, any shape; None if they are
    equal.
    """
    signal = float(x.double().square().sum())
    error = float((x.double() - y.double()).square().sum())
    return round(10 * math.log10(signal / error), 2) if error > 0 else None


class Probe(NamedTuple):
    """States that a codec is calibrated and measured on: ``aux`` [T, L, H], ``last`` [M, H].
    ``tokens``: if the codec needs them, else None.
    """

    aux: torch.Tensor
    last: torch.Tensor
    tokens: Tokens | None = None

    def beginning(self, most: int = CALIBRATION) -> Probe:
        """Return the first whole samples of about ``most`` tokens, on the device of the embedding,
        for coding; everything if no tokens are known.
        """
        if self.tokens is None:
            return self
        t = self.tokens
        device = t.embedding.device
        count = max(1, int((t.sample_start[1:] <= most).sum()))
        end = int(t.sample_start[count])
        rows = int((t.last_token < end).sum())
        cut = replace(
            t,
            input_ids=t.input_ids[:end].to(device),
            sample_start=t.sample_start[: count + 1].to(device),
            last_token=t.last_token[:rows].to(device),
        )
        return Probe(self.aux[:end].to(device), self.last[:rows].to(device), cut)


def quality(probe: Probe, codec: Codec, against: str | None = None) -> dict[str, Any]:
    """Measure what ``codec`` loses on the states of ``probe``: SNR in dB per layer and of the last
    state (None = lossless). ``against``: what the states are, if not the target's own.
    """
    import torch

    aux, last, tokens = probe.beginning()
    with torch.inference_mode():
        a, b = codec.decode(codec.encode(aux, last, tokens), aux.shape[-1], tokens)
        return {
            "tokens": aux.shape[0],
            **({"against": against} if against else {}),
            "aux_snr_db": [snr_db(aux[:, i], a[:, i]) for i in range(aux.shape[1])],
            "last_snr_db": snr_db(last, b),
        }


class Known(NamedTuple):
    """A sample and its states, cut to its share of the calibration data."""

    tokens: TokenSample
    aux: torch.Tensor
    last: torch.Tensor


SLACK = 1.25  # of the budget: samples that are chosen are rarely of the mean length


def longest_run(lengths: Sequence[int], budget: int) -> int:
    """Return how many tokens a sample may give so that all together give about ``budget``: all of
    them, where the samples are not much more than that.
    """
    if sum(lengths) <= SLACK * budget:
        return max(2, *lengths)
    left = float(budget)
    for n, length in enumerate(sorted(lengths)):
        level = left / (len(lengths) - n)
        if length > level:
            return max(2, int(level))
        left -= length
    return 2


def share_of(
    sample: TokenSample,
    states: tuple[torch.Tensor, torch.Tensor],
    lengths: Sequence[int],
    codec: Codec | None,
    budget: int,
    *,
    stays: bool = False,
) -> Known:
    """Return the part of one of the samples of ``lengths`` that ``codec`` is calibrated on, so that
    all together give about ``budget`` rows: every n-th row of a long one, or, if the codec uses
    neighbouring tokens, a run of it. Runs begin at another share of each sample, for the end of a
    conversation is not like its beginning. A run goes to the host, unless it ``stays`` where it is.
    """
    import torch

    aux, last = states
    if codec is None or not codec.needs_tokens:
        return Known(sample, *(thin(x, len(lengths), budget) for x in (aux, last)))
    size, most = len(sample.input_ids), longest_run(lengths, budget)
    begin = int((sample.row * GOLDEN % 1.0) * max(0, size - most + 1))
    run = slice(begin, begin + most)
    cut = TokenSample(
        sample.row, sample.key, sample.input_ids[run], sample.loss_mask[run], sample.turn
    )
    first = int(last_rows(sample.loss_mask)[:begin].sum())
    rows = slice(first, first + int(last_rows(cut.loss_mask).sum()))
    # In 16 bits, and on the host unless they are known to fit: for a large target they are tens of
    # gigabytes, and the engine uses the GPU.
    there = aux.device if stays else torch.device("cpu")
    return Known(cut, *(x.to(there, torch.bfloat16, copy=True) for x in (aux[run], last[rows])))


class Matrices(Protocol):
    """The target's input embedding and output matrix, each [V, H]."""

    @property
    def embed_tokens(self) -> torch.Tensor: ...
    @property
    def lm_head(self) -> torch.Tensor: ...


def probe_of(
    shares: Sequence[Known],
    codec: Codec | None,
    target: Callable[[], Matrices],
    device: torch.device | str | None = None,
    corpus: int = 0,
) -> Probe:
    """Join the shares, with what ``codec`` needs to know about their tokens; ``target`` is called
    only if it needs any. ``device``: of the target's matrices, on which a codec is calibrated (None
    = where the states are). ``corpus``: the tokens of all samples (0: unknown, or very many).
    """
    import torch

    aux, last = torch.cat([s.aux for s in shares]), torch.cat([s.last for s in shares])
    if codec is None or not codec.needs_tokens:
        return Probe(aux, last)
    matrices = target()
    there = device or aux.device
    tokens = tokens_of([s.tokens for s in shares], matrices.embed_tokens.to(there))
    share = min(1.0, aux.shape[0] / corpus) if corpus else 0.0
    return Probe(aux, last, replace(tokens, head=matrices.lm_head.to(there), share=share))


def budget_of(codec: Codec | None, layers: int, hidden: int, tokens: int | None = None) -> int:
    """Return how many of the corpus's ``tokens`` to calibrate and measure ``codec`` on: at most a
    quarter if it asks for many.
    """
    wanted = codec.calibration_tokens(layers, hidden) if codec is not None else 0
    if wanted > CALIBRATION and tokens is not None:
        wanted = min(wanted, tokens // 4)
    most = int(CALIBRATION_BYTES // calibration_bytes(1, layers, hidden))
    return max(min(wanted, most), CALIBRATION)


def calibration_bytes(tokens: int, layers: int, hidden: int) -> int:
    """Return the host memory, in bytes, of the 16-bit states that a codec is calibrated on."""
    return tokens * 2 * hidden * (layers + 1)


def spread_states(
    cache: Cache,
    codec: Codec | None = None,
    budget: int = CALIBRATION,
    device: torch.device | str | None = None,
) -> Probe:
    """Read states of samples spread over the store, about ``budget`` tokens (or all), for
    ``codec``, which is calibrated on ``device``.
    """
    m = cache.manifest
    budget = max(budget, budget_of(codec, len(m.layers), m.target.hidden_size, m.counts.tokens))
    chosen = spread(len(cache), float(cache.lengths.mean()), budget)
    coded = (cache.read(i) for i in chosen)
    lengths = cache.lengths[chosen].tolist()
    shares = [share_of(c.tokens, cache.decoded(c), lengths, codec, budget) for c in coded]
    return probe_of(shares, codec, lambda: cache.target, device, m.counts.tokens)
