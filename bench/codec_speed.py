"""Encode and decode of the compact codecs, GB/s: on one core, and on the GPU where there is one.

    python bench/codec_speed.py [--hidden 576,2560,4096,6144] [--bits 4,3,2] [--tokens 8192]
        [--layers 5] [--no-sweep] [--results DIR]

GB/s count the states: 2 bytes per value in bfloat16, read by the encoder, written by the decoder.
On the GPU the kernel's bits are compared with plain torch's before anything is timed (a difference
stops the script), and ``--sweep`` tries other launch shapes of the kernel. Writes
bench/results/codec_speed.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, write
from dspark.cache.codec.fields import codec_for
from dspark.cache.codec.rotated import Rotated

SWEEP = [
    (64, 4, 8),
    (64, 4, 4),
    (64, 1, 8),
    (64, 16, 8),
    (64, 1, 4),
    (128, 4, 8),
    (32, 4, 4),
    (32, 8, 4),
]
SECONDS = 1.0  # of repetitions, at least three


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Best time of one call: CUDA events around batches of ten on a GPU, the clock on a CPU."""
    call()
    best, began = float("inf"), time.perf_counter()
    for rounds in range(1000):
        if rounds >= 3 and time.perf_counter() - began > SECONDS:
            break
        if device.type == "cuda":
            a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            a.record()
            for _ in range(10):
                call()
            b.record()
            b.synchronize()
            best = min(best, a.elapsed_time(b) / 1e4)
        else:
            start = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - start)
    return best


def states(tokens: int, layers: int, hidden: int, device: torch.device) -> torch.Tensor:
    """Channels of different means and deviations and a massive first token, bfloat16 [T, L, H]."""
    g = torch.Generator(device).manual_seed(0)
    deviation = 10 ** (torch.rand(layers, hidden, generator=g, device=device) - 0.5)
    x = torch.randn(tokens, layers, hidden, generator=g, device=device) * deviation + deviation
    x[0, :, 3] = 25000.0
    return x.bfloat16()


def measure(
    hidden: int, bits: int, tokens: int, layers: int, device: torch.device, sweep: bool
) -> dict[str, Any]:
    x = states(tokens, layers, hidden, device)
    codec = codec_for(bits)
    assert isinstance(codec, Rotated)
    codec = codec.calibrated(x)
    size = 2e-9 * x.numel()
    row: dict[str, Any] = {
        "device": device.type,
        "hidden": hidden,
        "bits": bits,
        "group": codec.group(hidden),
    }
    with torch.inference_mode():
        row["encode_gb_per_s"] = size / seconds(lambda: codec.encode(x), device)
        coded = codec.encode(x)
        row["plain_gb_per_s"] = size / seconds(
            lambda: codec.decode_plain(coded, hidden).bfloat16(), device
        )
        if device.type == "cuda":
            row |= kernel(codec, coded, hidden, size, device, sweep)
        row["decode_gb_per_s"] = row.get("kernel_gb_per_s", row["plain_gb_per_s"])
    return {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}


def kernel(
    codec: Rotated,
    coded: dict[str, torch.Tensor],
    hidden: int,
    size: float,
    device: torch.device,
    sweep: bool,
) -> dict[str, Any]:
    from dspark.cache.codec import rotated_decode_kernel as fused

    for dtype in (torch.float32, torch.bfloat16):
        ours, plain = (
            fused.decode(codec, coded, hidden, dtype),
            codec.decode_plain(coded, hidden).to(dtype),
        )
        wrong = int((ours.view(torch.int16) != plain.view(torch.int16)).sum())
        if wrong:
            raise SystemExit(
                f"hidden {hidden}, {codec.bits} bits, {dtype}: {wrong} 16-bit words differ from "
                "plain torch"
            )
    out: dict[str, Any] = {}
    tried = {}
    for shape in [fused.LAUNCH, *(fused.Launch(*s) for s in SWEEP if sweep)]:
        took = seconds(
            lambda shape=shape: fused.decode(codec, coded, hidden, torch.bfloat16, shape), device
        )  # type: ignore[misc]
        tried["/".join(map(str, shape))] = round(size / took, 1)
    out["kernel_gb_per_s"] = tried["/".join(map(str, fused.LAUNCH))]
    if sweep:
        out["launch_tile_loop_warps"] = dict(sorted(tried.items(), key=lambda pair: -pair[1]))
    copy = torch.empty(int(size * 1e9), dtype=torch.uint8, device=device)
    # what merely writing so many bytes takes
    out["fill_gb_per_s"] = size / seconds(copy.zero_, device)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", default="576,2560,4096,6144")
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument(
        "--tokens", type=int, default=8192, help="on the GPU; an eighth of it on the CPU"
    )
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--sweep", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    rows = []
    for device in devices:
        for hidden in map(int, args.hidden.split(",")):
            for bits in map(int, args.bits.split(",")):
                tokens = args.tokens if device.type == "cuda" else args.tokens // 8
                row = measure(hidden, bits, tokens, args.layers, device, args.sweep and bits == 4)
                print(row, flush=True)
                rows.append(row)
    config = {"tokens": args.tokens, "layers": args.layers, "cpu_threads": 1, "calibrated": True}
    write("codec_speed", config, rows, args.results)


if __name__ == "__main__":
    main()
