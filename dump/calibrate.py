"""Before a compact store is begun: the channel means and deviations that its codes are centred on (``cache/centre.py``).

They are taken from rows spread over the whole corpus, which is often sorted by topic, and are fixed in the manifest before the first part is
written: a resumed dump reads them there and codes exactly as the first run did. The price is one more pass of the target over about
``CALIBRATION`` tokens (at least ``LEAST_SAMPLES`` rows); 16-bit stores do not pay it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dspark.cache.centre import CENTRE_KEYS, spread, thin
from dspark.cache.codec import Codec, calibrated
from dspark.cache.manifest import FieldInfo, Manifest
from dspark.cache.records import TokenSample

if TYPE_CHECKING:
    from dspark.dump.capture import Engine
    from dspark.dump.corpus import Corpus
    from dspark.dump.tokens import SampleMaker


def calibration_samples(corpus: Corpus, maker: SampleMaker, rows: int, tokens: int) -> list[TokenSample]:
    """Samples of rows spread over the first ``rows`` of ``corpus``, which hold about ``tokens`` tokens; dropped rows are left out."""
    chosen = set(spread(rows, tokens / rows))
    made = (maker.make(row) for row in corpus.pick(chosen.__contains__))
    return [m.sample for m in made if m.sample is not None]


def calibrate(
    engine: Engine, samples: Sequence[TokenSample], codecs: tuple[Codec, Codec]
) -> tuple[Codec, Codec]:
    """``codecs`` of aux and last, centred on the states of ``samples``."""
    import torch

    with torch.inference_mode():
        found = {
            i: (thin(s.aux, len(samples)), thin(s.last, len(samples))) for i, s in engine.capture(samples)
        }
        aux, last = (torch.cat([found[i][k] for i in sorted(found)]) for k in (0, 1))
        return calibrated(codecs[0], aux), calibrated(codecs[1], last)


def centred_as(manifest: Manifest, stored: Manifest) -> Manifest:
    """``manifest`` with the means and deviations of ``stored``, the same plan's store that is being resumed."""

    def field(mine: FieldInfo, theirs: FieldInfo) -> FieldInfo:
        plain = {k: v for k, v in theirs.params.items() if k not in CENTRE_KEYS}
        return theirs if dataclasses.replace(theirs, params=plain) == mine else mine

    return dataclasses.replace(
        manifest, aux=field(manifest.aux, stored.aux), last=field(manifest.last, stored.last)
    )
