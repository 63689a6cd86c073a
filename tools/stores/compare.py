"""``dspark-tools compare``: compare two stores of the same samples: error by layer, and its effect
on the target's distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from dspark.cache.errors import MismatchError
from dspark.cache.shared.command import bar, command, emit, json_flag
from dspark.tools.flags import COUNT_OR_ALL

if TYPE_CHECKING:
    import torch

    from dspark.cache.reader import Cache

LOGIT_ROWS = 256  # rows of [rows, V] logits at a time


class SignalToNoise:
    """Running signal and error energy."""

    def __init__(self) -> None:
        self.signal = self.error = 0.0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.signal += float(x.double().square().sum())
        self.error += float((x.double() - y.double()).square().sum())

    @property
    def snr_db(self) -> float | None:
        """Return 10 log10 (signal / error); None if the two are equal."""
        return 10 * float(math.log10(self.signal / self.error)) if self.error > 0 else None


def compare(
    a: Cache,
    b: Cache,
    limit: int = 50,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Compare ``b`` with ``a`` over ``limit`` samples spread evenly (0 = all). TV and top-1 are for
    the target's softmax over lm_head(last).
    """
    import numpy as np

    same = (a.manifest.layers, a.manifest.target.hidden_size, len(a)) == (
        b.manifest.layers,
        b.manifest.target.hidden_size,
        len(b),
    )
    if not same or not np.array_equal(a.index["sample_key"], b.index["sample_key"]):
        raise MismatchError(
            f"{a.path} and {b.path} do not hold the same samples and layers; compare a store "
            "with its own recoding"
        )
    head, logits = a.target.lm_head.float(), a.target.logits
    layers, last = [SignalToNoise() for _ in a.manifest.layers], SignalToNoise()
    distance, agree, rows = 0.0, 0, 0
    chosen = np.unique(
        np.linspace(0, len(a) - 1, min(len(a), limit) if limit else len(a)).astype(int)
    )
    for done, i in enumerate(chosen):
        (x, u), (y, v) = a.decoded(a.read(int(i))), b.decoded(b.read(int(i)))
        for j, layer in enumerate(layers):
            layer.add(x[:, j], y[:, j])
        last.add(u, v)
        for at in range(0, u.shape[0], LOGIT_ROWS):
            p, q = (logits.of(s[at : at + LOGIT_ROWS] @ head.T).softmax(-1) for s in (u, v))
            distance += float((p - q).abs().sum()) / 2
            agree += int((p.argmax(-1) == q.argmax(-1)).sum())
            rows += p.shape[0]
        progress(done + 1, len(chosen))
    return {
        "a": str(a.path),
        "b": str(b.path),
        "samples_read": len(chosen),
        "layers": a.manifest.layers,
        "aux_snr_db": [e.snr_db for e in layers],
        "last_snr_db": last.snr_db,
        "last_tv": distance / rows if rows else None,
        "last_top1_agreement": agree / rows if rows else None,
        "last_rows": rows,
    }


@command("compare")
@click.argument("a")
@click.argument("b")
@click.option(
    "--limit", default=50, type=COUNT_OR_ALL, help="Samples to read, spread evenly; 0 = all."
)
@json_flag
def compare_command(a: str, b: str, limit: int, as_json: bool) -> None:
    """Compare two stores of the same samples: SNR per layer, and the target's distribution from B's
    last states against A's.
    """
    import dspark.cache

    with bar("compare") as progress:
        data = compare(dspark.cache.open(a), dspark.cache.open(b), limit, progress)
    if as_json:
        emit(data)
        return
    for layer, db in zip(
        [*data["layers"], "last"], [*data["aux_snr_db"], data["last_snr_db"]], strict=True
    ):
        print(f"layer {layer!s:>4}  {'equal' if db is None else f'{db:.2f} dB'}")
    if data["last_rows"]:
        print(
            f"target distribution: TV {data['last_tv']:.4f}, top-1 agreement "
            f"{data['last_top1_agreement']:.2%} of {data['last_rows']:,}"
        )
