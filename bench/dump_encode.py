"""What coding a vLLM worker's batch costs the GPU, step by step, with nothing else on it.

    python bench/dump_encode.py [--hidden 576] [--tokens 32768] [--layers 5] [--sweep]

Milliseconds and nanoseconds per token of each step of a batch, as ``dump/engines/vllm`` takes them:
gather from the cache, the layers of the store, the codec's two fields, the copy to page-locked
memory. ``--sweep``: the encoder's kernel with other numbers of values per program and of warps;
each must give the bytes of the plain encoder. Writes bench/results/NAME.json.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch
from codec_speed import seconds, states

from common import write
from dspark.cache.codec.fields import codec_for
from dspark.cache.codec.rotated import Rotated

BLOCK = 16  # tokens of a block of vLLM's cache
VALUES, WARPS = (512, 1024, 2048, 4096, 8192), (1, 2, 4, 8, 16)


def steps(
    of_aux: Rotated, of_last: Rotated, cache: torch.Tensor, tokens: int, layers: int
) -> dict[str, Any]:
    """Each step's call, on ``cache[blocks, layers + 1, BLOCK, H]``."""
    device = cache.device
    index = torch.randperm(cache.shape[0] * BLOCK, device=device)[:tokens]
    gathered = cache[index // BLOCK, :, index % BLOCK]
    aux = gathered[:, :layers].contiguous()
    last = gathered[::2, layers].contiguous()
    coded = [*of_aux.encode(aux).values(), *of_last.encode(last).values()]
    cuda = device.type == "cuda"
    host = [torch.empty_like(t, device="cpu", pin_memory=cuda) for t in coded]
    return {
        "gather": lambda: cache[index // BLOCK, :, index % BLOCK],
        "layers": gathered[:, :layers].contiguous,
        "aux": lambda: of_aux.encode(aux),
        "last": lambda: of_last.encode(last),
        "copy": lambda: [h.copy_(t, non_blocking=True) for h, t in zip(host, coded, strict=True)],
    }


def sweep(codec: Rotated, x: torch.Tensor) -> dict[str, float]:
    """Milliseconds by values per program and warps, the least first."""
    from dspark.cache.codec import rotated_encode_kernel as kernel

    want, out, before = codec.encode_plain(x), dict[str, float](), kernel.LAUNCH
    for values, warps in itertools.product(VALUES, WARPS):
        kernel.LAUNCH = values, warps
        got = kernel.encode(codec, x)
        if not all(torch.equal(want[name], got[name]) for name in want):
            raise SystemExit(f"{values}/{warps}: other bytes than the plain encoder's")
        out[f"{values}/{warps}"] = 1e3 * seconds(lambda: kernel.encode(codec, x), x.device)
        print(values, warps, out[f"{values}/{warps}"], flush=True)
    kernel.LAUNCH = before
    return dict(sorted(out.items(), key=lambda pair: pair[1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--tokens", type=int, default=1 << 15)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--name", default="dump_encode")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = states(args.tokens, args.layers + 1, args.hidden, device)
    plain = codec_for(4)
    assert isinstance(plain, Rotated)
    codecs = plain.calibrated(x[:, : args.layers]), plain.calibrated(x[:, args.layers])
    cache = x.view(-1, BLOCK, args.layers + 1, args.hidden).transpose(1, 2).contiguous()
    results: dict[str, Any] = {}
    for name, call in steps(*codecs, cache, args.tokens, args.layers).items():
        took = seconds(call, device)
        results[name] = {"ms": 1e3 * took, "ns_per_token": 1e9 * took / args.tokens}
    if args.sweep:
        results["launches_ms"] = sweep(codecs[0], x[:, : args.layers].contiguous())
    about = {"hidden": args.hidden, "tokens": args.tokens, "layers": args.layers}
    write(args.name, about, results)


if __name__ == "__main__":
    main()
