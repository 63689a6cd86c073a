"""What calibrating the transform codec takes at a large target's shapes: seconds and memory of each
stage, on random states.

    python bench/klt_scale.py [--hidden 6144] [--layers 5] [--tokens 131072] [--device cuda]
        [--out DIR] [--stages moments,solve,eig,range,code]

``moments``: products of rows [n, C + 2H] (C = L * H), summed. ``solve``: the ridge regression from
2H features and the residual's covariance. ``eig``: its eigendecomposition, whole. ``range``:
instead of it the K = ``--keep`` * H leading components by block power iterations from a random
start. ``code``: rows of K coefficients coded and decoded. Each stage is printed when it is done, so
that a run cut short says what it found; memory is the peak that torch allocated on the device while
the stage ran.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import RESULTS, write
from dspark.cache.codec.klt import fast
from dspark.cache.codec.klt.half import half_on
from dspark.cache.codec.klt.moments import Moments, eigen, regression
from dspark.cache.codec.klt.symbols import Packing, band_count
from dspark.cache.codec.klt.tables import Transform

ROWS = 4096


# of the columns in the first three classes of cells, about as SmolLM2's at one bit
SHARES = 0.02, 0.13, 0.25


class Bench:
    """One shape on one device; ``results``: stage -> seconds, peak bytes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.channels, self.features = args.layers * args.hidden, 2 * args.hidden
        self.kept = args.keep * args.hidden
        self.results: dict[str, Any] = {}
        g = torch.Generator(self.device).manual_seed(0)
        self.random = g
        # Rows with a falling spectrum: a random mix of fewer sources, and noise.
        self.mix = (
            torch.randn(args.hidden, self.channels, generator=g, device=self.device)
            / args.hidden**0.5
        )

    def rows(self, count: int, width: int) -> Tensor:
        source = torch.randn(count, self.args.hidden, generator=self.random, device=self.device)
        x = source @ self.mix + 0.3 * torch.randn(
            count, self.channels, generator=self.random, device=self.device
        )
        if width == self.channels:
            return x
        return torch.cat([x, source.repeat(1, 2)[:, : width - self.channels]], 1)

    def timed(self, stage: str, work: Callable[[], Any]) -> Any:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        try:
            out = work()
        except torch.OutOfMemoryError as error:
            self.results[stage] = {"failed": str(error).splitlines()[0]}
            print(stage, json.dumps(self.results[stage]), flush=True)
            return None
        if cuda:
            torch.cuda.synchronize()
        found = {"seconds": round(time.perf_counter() - began, 3)}
        if cuda:
            found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        self.results[stage] = found
        print(stage, json.dumps(found), flush=True)
        return out

    def moments(self) -> Moments:
        """Sums over ``--tokens`` rows; making the rows counts too, which stands for bringing them
        from the host.
        """
        total = Moments.of_width(self.channels + self.features, self.device)
        for _ in range(self.args.tokens // ROWS):
            total.add(self.rows(ROWS, self.channels + self.features))
        return total

    def leading(self, covariance: Tensor, iterations: int = 3) -> Tensor:
        """Orthonormal columns [C, K] that span nearly the K leading eigenvectors."""
        basis = torch.randn(self.channels, self.kept, generator=self.random, device=self.device)
        for _ in range(iterations):
            basis = torch.linalg.qr(covariance @ basis)[0]
        inner = torch.linalg.eigh(basis.T @ covariance @ basis).eigenvectors
        return basis @ inner.flip(1)

    def code(self, basis: Tensor) -> None:
        """Tokens per second of coding and decoding, with a step of one deviation."""
        shares = [int(self.kept * share) // 30 * 30 for share in SHARES]
        packing = Packing((*shares, self.kept // 30 * 30 - sum(shares)))
        zeros = torch.zeros(self.channels, device=self.device)
        table = Transform(
            zeros, zeros + 1, basis[:, : packing.total].T.contiguous().bfloat16(), None,
            torch.zeros(self.features, self.channels, device=self.device).bfloat16(),
            torch.zeros(2, band_count(packing)), 1.0, packing, 1e9, 1.0, 0.0,
        )  # fmt: skip
        half = half_on(table, self.device)
        rows = fast.rows_at_once(half)
        x = self.rows(rows, self.channels).bfloat16()
        hidden = self.features // 2
        ids = torch.randint(0, 1000, (2, rows), device=self.device)
        seen = fast.Seen(ids, torch.randn(1000, hidden, device=self.device).bfloat16())
        code, out = half.encode(x, seen.plain())[0], torch.empty_like(x)
        ways = {
            "encode, plain": lambda: half.encode(x, seen.plain()),
            "decode, plain": lambda: out.copy_(half.rows(half.read(code), seen.plain())),
        }
        if self.device.type == "cuda":
            self.results["apart"] = dict(zip(("bytes", "rows"), fast.trial(half), strict=True))
            print(json.dumps(self.results["apart"]))
            ways["encode"] = lambda: fast.encode(half, x, seen)
            ways["decode"] = lambda: fast.decode(half, code, seen, out)
        for stage, work in ways.items():
            work()
            self.timed(stage, lambda work=work: [work() for _ in range(4)])  # type: ignore[misc]
            if "seconds" in self.results[stage]:
                speed = round(4 * rows / max(self.results[stage]["seconds"], 1e-9))
                self.results[stage]["tokens_per_s"] = speed
                print(stage, json.dumps(self.results[stage]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=6144)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--keep", type=int, default=2, help="hidden sizes' worth of components")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stages", default="moments,solve,range,code,eig")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    bench, stages = Bench(args), args.stages.split(",")
    moments = bench.timed("moments", bench.moments)
    covariances = [moments.covariance()[1]]
    del moments
    found = bench.timed("solve", lambda: regression(covariances.pop(), bench.channels, 1e-2))
    if found is None:
        raise SystemExit("no memory for the regression")
    residual = found[1].float()
    del found
    basis = bench.timed("range", lambda: bench.leading(residual)) if "range" in stages else None
    if "code" in stages and basis is not None:
        bench.code(basis)
    del basis
    if "eig" in stages:
        bench.timed("eig", lambda: eigen(residual))
    config = {k: str(v) for k, v in vars(args).items() if k != "out"}
    write("klt_scale", config, bench.results, args.out)


if __name__ == "__main__":
    main()
