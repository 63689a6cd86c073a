"""What calibrating the transform codec takes at a large target's shapes: seconds and memory of each
stage, on random states.

    python bench/klt_scale.py [--hidden 6144] [--layers 5] [--tokens 131072] [--device cuda]
        [--out DIR] [--stages moments,solve,eig,range,code,learn]

``moments``: products of rows [n, C + 2H] (C = L * H), summed. ``solve``: the ridge regression from
2H features and the residual's covariance. ``eig``: its eigendecomposition, whole. ``range``:
instead of it the K = ``--keep`` * H leading components by block power iterations from a random
start. ``code``: rows of K coefficients coded and decoded. ``learn`` (alone or last): the product's
own calibration of ``--codec`` on states that lie on the host, twice, with the seconds of its
phases, then the measurement of sizes; the first time pays for what a process loads and compiles
once. SmolLM2's: ``--hidden 576 --tokens 138240 --stages learn``.

Each stage is printed when it is done, so that a run cut short says what it found; memory is the
peak that torch allocated on the device while the stage ran.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import RESULTS, write
from dspark.cache.codec.base import Tokens
from dspark.cache.codec.klt import fast
from dspark.cache.codec.klt.half import half_on
from dspark.cache.codec.klt.moments import Moments, eigen, regression
from dspark.cache.codec.klt.symbols import Packing, band_count
from dspark.cache.codec.klt.tables import Transform
from dspark.cache.codec.registry import make
from dspark.cache.quality import Probe
from dspark.cache.sizing import RowBytes

ROWS = 4096
SAMPLE, VOCABULARY = 307, 49152  # tokens of a sample, as of the shared corpus; ids


# of the columns in the first three classes of cells, about as SmolLM2's at one bit
SHARES = 0.02, 0.13, 0.25


class Heard(logging.Handler):
    """Keeps what is logged."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


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

    def learn(self) -> None:
        """Calibrate a codec as a dump does it, on samples of 307 tokens, the second half of each
        with last states.
        """
        args = self.args
        count = max(8, args.tokens // SAMPLE)
        states = [self.rows(SAMPLE, self.channels).cpu().bfloat16() for _ in range(count)]
        aux = torch.cat(states).view(-1, args.layers, args.hidden)
        at = torch.arange(len(aux)).view(count, SAMPLE)[:, SAMPLE // 2 : -1].flatten()
        g = torch.Generator().manual_seed(1)
        matrix = torch.randn(VOCABULARY, args.hidden, generator=g).mul(0.05).bfloat16()
        tokens = Tokens(
            torch.randint(0, VOCABULARY, (len(aux),), generator=g),
            torch.arange(count + 1) * SAMPLE,
            at,
            matrix.to(self.device),
            head=matrix.to(self.device),
            share=0.1,
        )
        probe = Probe(aux, aux[at, -1].contiguous(), tokens)
        for turn in ("cold", "warm"):
            heard: list[str] = []
            hears = Heard(heard)
            log = logging.getLogger("dspark.cache")
            log.setLevel(logging.INFO)
            log.addHandler(hears)
            codec = make(args.codec)
            with torch.inference_mode():
                learnt = self.timed(f"learn, {turn}", lambda codec=codec: codec.calibrated(*probe))
                log.removeHandler(hears)
                self.results[f"learn, {turn}"]["phases"] = heard
                print("\n".join(heard), flush=True)
                if learnt is not None:
                    sizes = lambda learnt=learnt: RowBytes.of(learnt, *probe.beginning())  # noqa: E731
                    self.timed(f"sizes, {turn}", sizes)

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
            self.results["apart"] = {
                "bytes": fast.bytes_apart(half),
                "rows": fast.rows_apart(half),
            }
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
    parser.add_argument("--codec", default="klt-1-1-2", help="of the stage learn")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    bench, stages = Bench(args), args.stages.split(",")
    if stages != ["learn"]:
        matrices(bench, stages)
    if "learn" in stages:
        bench.learn()
    config = {k: str(v) for k, v in vars(args).items() if k != "out"}
    write("klt_scale", config, bench.results, args.out)


def matrices(bench: Bench, stages: list[str]) -> None:
    """Run all stages but ``learn``."""
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


if __name__ == "__main__":
    main()
