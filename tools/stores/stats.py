"""``dspark-tools stats``: show what the states look like, layer by layer, and how long the samples
are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from dspark.cache.shared.command import bar, command, emit, json_flag
from dspark.tools.flags import COUNT_OR_ALL

if TYPE_CHECKING:
    from dspark.cache.reader import Cache

OUTLIER = 20.0  # a value beyond this many times its layer's rms


class Moments:
    """Running sums of one field: ``rms``, ``absmax`` and the share of values beyond ``OUTLIER`` rms
    of their own sample.
    """

    def __init__(self) -> None:
        self.squares = self.outliers = 0.0
        self.values = 0
        self.absmax = 0.0

    def add(self, x: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        """``x`` [rows, H]."""
        if x.size == 0:
            return
        square = float(np.square(x, dtype=np.float64).sum())
        self.squares += square
        self.values += x.size
        self.absmax = max(self.absmax, float(np.abs(x).max()))
        self.outliers += float((np.abs(x) > OUTLIER * np.sqrt(square / x.size)).sum())

    def result(self) -> dict[str, float | None]:
        if not self.values:
            return {"rms": None, "absmax": None, "outlier_share": None}
        return {
            "rms": float(np.sqrt(self.squares / self.values)),
            "absmax": self.absmax,
            "outlier_share": self.outliers / self.values,
        }


def stats(
    cache: Cache, limit: int = 200, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Return statistics over ``limit`` samples spread evenly through the store (0 = all); lengths
    cover all samples.
    """
    n = len(cache)
    chosen = np.unique(np.linspace(0, n - 1, min(n, limit) if limit else n).astype(int))
    layers = [Moments() for _ in cache.manifest.layers]
    last = Moments()
    for done, i in enumerate(chosen):
        sample = cache[int(i)]
        for j, moments in enumerate(layers):
            moments.add(sample.aux[:, j])
        last.add(sample.last[sample.last_mask])
        progress(done + 1, len(chosen))
    lengths = cache.lengths
    edges = [0, *(2**k for k in range(5, 21))]
    histogram = np.histogram(lengths, bins=edges)[0]
    snr = cache.manifest.quality
    return {
        "samples_read": len(chosen),
        "samples": n,
        "layers": [
            {"layer": i, **m.result()} for i, m in zip(cache.manifest.layers, layers, strict=True)
        ],
        "last": last.result(),
        "quality": snr,
        "length": {
            "min": int(lengths.min()),
            "median": float(np.median(lengths)),
            "mean": float(lengths.mean()),
            "max": int(lengths.max()),
            "histogram": {
                f"{a}-{b - 1}": int(c)
                for a, b, c in zip(edges[:-1], edges[1:], histogram, strict=True)
                if c
            },
        },
        "supervised_share": float(cache.index["sample_supervised"].sum() / lengths.sum()),
    }


@command("stats")
@click.argument("cache")
@click.option(
    "--limit", default=200, type=COUNT_OR_ALL, help="Samples to read, spread evenly; 0 = all."
)
@json_flag
def stats_command(cache: str, limit: int, as_json: bool) -> None:
    """Print rms, absmax, outlier share and SNR of the stored code per layer, and a histogram of
    lengths.
    """
    import dspark.cache

    with bar("stats") as progress:
        data = stats(dspark.cache.open(cache), limit, progress)
    if as_json:
        emit(data)
        return
    snr = data["quality"].get("aux_snr_db") or [None] * len(data["layers"])
    print(f"{'layer':>6} {'rms':>10} {'absmax':>10} {'> 20 rms':>10} {'SNR dB':>7}")
    for row, db in zip(
        [*data["layers"], {"layer": "last", **data["last"]}],
        [*snr, data["quality"].get("last_snr_db")],
        strict=True,
    ):
        if row["rms"] is not None:
            print(
                f"{row['layer']:>6} {row['rms']:>10.4g} {row['absmax']:>10.4g} "
                f"{row['outlier_share']:>10.2e} {'-' if db is None else f'{db:.1f}':>7}"
            )
    length = data["length"]
    print(
        f"length  min {length['min']}  median {length['median']:.0f}  mean {length['mean']:.0f}  "
        f"max {length['max']}"
    )
    for span, count in length["histogram"].items():
        print(
            f"{span:>14} {count:>9} "
            f"{'#' * max(1, round(50 * count / max(length['histogram'].values())))}"
        )
