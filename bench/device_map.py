"""A target spread by ``device_map`` over several places against the same target in one: are the
states the same?

    python bench/device_map.py --target DIR [--over gpus|cpu|disk] [--dtype bfloat16]

``gpus``: over all visible GPUs against the first alone. ``cpu``: half of the layers on the CPU,
half on the first GPU.
``disk``: half on the CPU, half read from disk at each use, against the CPU alone (no GPU needed).
Sequences are random ids. Prints where the layers are, the largest difference relative to a token's
state, and whether all are equal bit for bit; exit code 1 where a difference is more than rounding.
Writes bench/results/NAME.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import write
from dspark.cache.records import KEY_BYTES, TokenSample
from dspark.cache.target.taps import default_layers
from dspark.dump.engines.hf import TransformersEngine
from dspark.dump.target.config import load_target

ROUNDING = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}
LENGTHS = (17, 300, 64, 511, 128)


def samples(vocab: int) -> list[TokenSample]:
    rng = np.random.default_rng(0)
    return [
        TokenSample(
            i, bytes(KEY_BYTES), rng.integers(0, vocab, n, dtype=np.int32), np.arange(n) >= n // 3
        )
        for i, n in enumerate(LENGTHS)
    ]


def halves(target: str, first: Any, second: Any) -> dict[str, Any]:
    """Everything before the second half of the layers on ``first``, from there on ``second``."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    from dspark.dump.target.weights import model_class

    config = AutoConfig.from_pretrained(target)
    with init_empty_weights():
        model = model_class(config).from_config(config)
    prefix, layers = next(
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and name.endswith("layers")
    )
    out = {f"{prefix}.{i}": first if i < len(layers) // 2 else second for i in range(len(layers))}
    decoder = model.get_submodule(prefix.rpartition(".")[0])
    out |= {
        f"{prefix.rpartition('.')[0]}.{name}": first
        for name, _ in decoder.named_children()
        if name != prefix.rpartition(".")[2]
    }
    return out | {name: first for name, _ in model.named_children() if not prefix.startswith(name)}


def captured(
    target: Any, name: str, device: str, dtype: str, spread: Any, offload: Path | None
) -> Any:
    """States of every sample, how many modules are where, and seconds of loading and of the run."""
    began = time.monotonic()
    engine = TransformersEngine.load(
        name,
        target.shapes,
        default_layers(target.shapes.num_layers),
        device=device,
        dtype=dtype,
        batch_tokens=2048,
        device_map=spread,
        offload=offload,
    )
    loaded = time.monotonic()
    states = dict(engine.capture(samples(target.shapes.vocab_size)))
    kept = [
        torch.cat([states[i].aux.flatten(0, 1), states[i].last]).float().cpu()
        for i in sorted(states)
    ]
    places = Counter(str(p) for p in getattr(engine.model, "hf_device_map", {"": device}).values())
    return kept, dict(places), round(loaded - began, 2), round(time.monotonic() - loaded, 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True)
    parser.add_argument("--over", choices=("gpus", "cpu", "disk"), default="gpus")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--name", default="device_map")
    args = parser.parse_args()
    target = load_target(args.target)
    device = "cpu" if args.over == "disk" else "cuda:0"
    with tempfile.TemporaryDirectory() as folder:
        offload = Path(folder) if args.over == "disk" else None
        spread: Any = "balanced"
        if args.over != "gpus":
            first, second = ("cpu", "disk") if args.over == "disk" else (0, "cpu")
            spread = halves(args.target, first, second)
        one, _, *alone = captured(target, args.target, device, args.dtype, {"": device}, None)
        several, places, *spread_seconds = captured(
            target, args.target, device, args.dtype, spread, offload
        )
    gaps = torch.cat(
        [
            (a - b).norm(dim=-1) / a.norm(dim=-1).clamp(min=1e-6)
            for a, b in zip(one, several, strict=True)
        ]
    )
    found = {
        "over": args.over, "places": places, "states": len(gaps), "largest": float(gaps.max()),
        "equal": all(torch.equal(a, b) for a, b in zip(one, several, strict=True)),
        "seconds_alone": alone, "seconds_spread": spread_seconds,
    }  # fmt: skip
    write(
        args.name,
        {"target": Path(args.target).name, "dtype": args.dtype, "gpus": torch.cuda.device_count()},
        found,
    )
    if len(places) < 2 or not float(gaps.max()) < ROUNDING[args.dtype]:
        sys.exit(1)


if __name__ == "__main__":
    main()
