"""Calibrate a compact store before it is started: the channel means and deviations that its codes
are centred on (``cache/codec/centre.py``).

They are taken from rows spread over the whole corpus, which is often sorted by topic, and are fixed
in the manifest before the first part is written: a resumed dump reads them there and codes exactly
as the first run did. The cost is one more pass of the target over about ``CALIBRATION`` tokens (at
least ``LEAST_SAMPLES`` rows); 16-bit stores do not need it.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from dspark.cache.codec.base import Codec
from dspark.cache.codec.centre import spread
from dspark.cache.codec.klt.pieces import room
from dspark.cache.codec.state_errors import check_finite, naming
from dspark.cache.quality import SLACK, Probe, calibration_bytes, probe_of, share_of
from dspark.cache.records import TokenSample
from dspark.cache.shared.phases import Phases
from dspark.cache.sizing import RowBytes

if TYPE_CHECKING:
    import torch

    from dspark.cache.shared.command import Progress
    from dspark.dump.corpus.masks import SampleMaker
    from dspark.dump.corpus.rows import Corpus
    from dspark.dump.engines.engine import Engine
    from dspark.dump.plan import Plan


def calibration_samples(
    corpus: Corpus, maker: SampleMaker, rows: int, tokens: int, budget: int
) -> list[TokenSample]:
    """Return samples of rows spread over the first ``rows`` of ``corpus``, about ``budget`` of the
    ``tokens`` tokens that these hold; dropped rows are left out.
    """
    chosen = set(spread(rows, tokens / rows, budget))
    made = (maker.make(row) for row in corpus.pick(chosen.__contains__))
    return [s for m in made for s in m.samples]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a few thousand tokens tell about all: the store's calibrated codec and the bytes per
    row.
    """

    codec: Codec
    size: RowBytes

    @classmethod
    def of(
        cls, probe: Probe, codec: Codec, *, learns: bool = True, phases: Phases | None = None
    ) -> Self:
        """Calibrate ``codec`` on the states of ``probe``, in the order of their samples; unchanged
        if there is nothing left to learn (``learns``).
        """
        import torch

        phases = phases or Phases()
        with torch.inference_mode():
            with phases.phase("learning"):
                learnt = codec.calibrated(*probe) if learns else codec
            with phases.phase("sizes"):
                return cls(learnt, RowBytes.of(learnt, *probe.beginning()))


def captured(
    engine: Engine,
    samples: Sequence[TokenSample],
    codec: Codec,
    budget: int,
    layers: Sequence[int],
    source: str,
    device: str | None = None,
    corpus: int = 0,
    progress: Progress = lambda done, total, text="": None,
) -> Probe | None:
    """Capture the states of ``samples`` for ``codec``, in order, cut on arrival so that all of them
    fit in memory, on the host or where they are (``fit_beside``); None without samples.

    ``device``: where the codec is fitted; None = where the states are. ``corpus``: its tokens, if
    known. ``progress`` is told of tokens. Raises EngineError for a state that is not finite, with
    the row of ``source`` and the one of ``layers``.
    """
    found = {}
    lengths = [len(s.input_ids) for s in samples]
    done, total = 0, sum(lengths)
    stays: bool | None = None
    for i, states in engine.capture(samples):
        if stays is None:
            stays = fit_beside(states.aux, codec, budget, device)
        with naming([samples[i]], layers, source):
            check_finite(*states)
        found[i] = share_of(samples[i], states, lengths, codec, budget, stays=stays)
        done += lengths[i]
        progress(done, total)
    shares = [found[i] for i in sorted(found)]
    return probe_of(shares, codec, engine.frozen, device, corpus) if shares else None


def fit_beside(aux: torch.Tensor, codec: Codec, budget: int, device: str | None) -> bool:
    """Tell whether states of ``budget`` tokens like ``aux`` [T, L, H] may stay on the GPU that they
    are on until ``codec`` is fitted there: if three times their size, for they are joined, is at
    most half of what the engine leaves beside fitting.
    """
    if not (codec.needs_tokens and aux.is_cuda and device == aux.device.type):
        return False
    layers, hidden = aux.shape[1:]
    states = SLACK * calibration_bytes(budget, layers, hidden)
    return 3 * states < room(aux.device, layers, hidden) / 2


def learning_device(plan: Plan, engine: Engine, codec: Codec) -> str | None:
    """Choose where to fit a codec that predicts from tokens: on the plan's GPU if its sums fit
    beside the engine, else on the CPU. None = no such codec.
    """
    import torch

    if not codec.needs_tokens:
        return None
    if plan.device != "cuda" or not torch.cuda.is_available():
        return "cpu"
    free, _ = torch.cuda.mem_get_info()
    shapes = plan.shapes
    need = codec.fitting_bytes(len(plan.layers), shapes.hidden_size, shapes.vocab_size)
    return "cuda" if free > need else "cpu"


def release() -> None:
    """Give the GPU memory that torch keeps in this process back to the driver."""
    import torch

    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        gc.collect()
        torch.cuda.empty_cache()
