"""Bits a value against error, for every way of storing hidden states that was considered: what each
idea is worth, in numbers.

    python bench/codec_frontier.py --target DIR --corpus train.jsonl.gz [--states FOLDER]
        [--tokens 20000]

States of a real target on corpus text; half of them calibrate whatever is calibrated, the other
half is measured. No draft is trained here. A linear probe stands in for one: ridge regression,
fitted on decoded states, from the aux layers at ``t`` and the token at ``t + 1`` to the last state
at ``t + 1``, then run on exact states, as a draft is when it serves; its acceptance is the mean of
``1 - TV``.

Figures of a variant: ``disk``: bits per value of the chunks as zstd leaves them, scales included;
``entropy``: order-0 bits per value, which repeated text cannot flatter; ``snr_db``: a layer, from
the mean over tokens of the relative squared error; ``channel_db``: the same over channels, each
against its own variance (what a layer that rescales channels sees). ``gain_bits``: bits saved at
equal ``snr_db`` against the shipped codec's curve, from the entropies.

Legend: T tokens, L aux layers, H hidden size, C = L * H.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numcodecs.zstd import Zstd

from codec_variants import (
    CHUNK,
    LAYERS,
    LEVEL,
    STEPS,
    Bench,
    Measured,
    States,
    exact_scale,
    fixed_rate,
    karhunen,
    lloyd,
    load,
    predicted,
    ridge,
    shipped,
    snr,
    stepped,
    token_scale,
    transformed,
)
from common import write
from dspark.cache.codec.fields import codec_for
from dspark.cache.codec.rotated import Rotated

# -- what it does to a draft and to the target's distribution --------------------------------------


class Probe:
    """The linear stand-in for a draft; see the module's docstring."""

    def __init__(self, s: States, c: States, embed: torch.Tensor) -> None:
        self.embed, self.s, self.c = embed, s, c
        at = self.positions(s)
        self.at = at[:: max(1, len(at) // 1500)]
        self.x = self.features(s, s.aux, self.at)
        self.p = (s.last[self.at + 1] @ embed.T).softmax(1)

    @staticmethod
    def positions(s: States) -> torch.Tensor:
        ok = s.ordinary
        ok[torch.tensor(s.start[1:]) - 1] = False
        return ok.nonzero()[:, 0]

    def features(self, s: States, aux: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        token = self.embed[s.ids[at + 1]]
        a = aux[at] / self.c.aux.pow(2).mean(2).sqrt().median(0).values[:, None]
        return torch.cat([a.flatten(1), token / token.std(), torch.ones(len(at), 1)], 1)

    def accept(self, aux: torch.Tensor, last: torch.Tensor, strength: float = 3e-2) -> float:
        """Acceptance on exact measured states of the probe fitted to decoded ``aux`` and ``last``
        of the calibration tokens.
        """
        at = self.positions(self.c)
        w = ridge(self.features(self.c, aux, at), last[at + 1], strength)
        q = (self.x @ w @ self.embed.T).softmax(1)
        return float(1 - 0.5 * (q - self.p).abs().sum(1).mean())


def divergence(
    exact: torch.Tensor, other: torch.Tensor, embed: torch.Tensor
) -> tuple[float, float]:
    """Mean TV and top-1 agreement of the target's distributions from two last states [N, H]."""
    p, q = (exact @ embed.T).softmax(1), (other @ embed.T).softmax(1)
    return round(float(0.5 * (p - q).abs().sum(1).mean()), 5), round(
        float((p.argmax(1) == q.argmax(1)).float().mean()), 4
    )


def last_states(s: States, c: States, embed: torch.Tensor) -> list[dict[str, Any]]:
    """Codecs of the last state, and its k most probable tokens instead of it; bytes per token."""
    out: list[dict[str, Any]] = []
    at = torch.arange(0, len(s.last), max(1, len(s.last) // 1500))
    exact, hidden = s.last[at], s.last.shape[1]
    for name, codec in (
        ("8 bits", codec_for(8)),
        *((f"step {v}", stepped(v)) for v in (0.25, 0.4, 0.6, 1.1)),
    ):
        assert isinstance(codec, Rotated)
        for words, used in ((name, codec), (f"{name}, centred", codec.calibrated(c.last[:4000]))):
            m = shipped(words, used, s.last[:, None])
            tv, top = divergence(exact, m.y[at, 0], embed)
            out.append(
                {
                    "variant": words,
                    "entropy_bits": round(m.entropy, 3),
                    "bytes": round(m.entropy * hidden / 8),
                    "snr_db": snr(s.last[:, None], m.y)[0],
                    "tv": tv,
                    "top1": top,
                }
            )
    p = (exact @ embed.T).softmax(1)
    for k in (16, 32, 64, 128):
        # float16 and a 16-bit id each (V < 65,536); the kept mass is renormalised, so the TV is the
        # mass that was cut.
        cut = 1 - p.topk(k).values.half().float().sum(1)
        out.append(
            {
                "variant": f"top-{k} probabilities",
                "bytes": 4 * k,
                "tv": round(float(cut.mean()), 5),
                "top1": 1.0,
            }
        )
    for row in out:
        print(row, file=sys.stderr, flush=True)
    return out


def speed(x: torch.Tensor) -> list[dict[str, Any]]:
    """GB/s of float32 states on one core, the best of three; and of zstd, in the same measure."""
    out = []
    size = x.numel() * 4 / 1e9
    for bits in (8, 4, 3, 2):
        codec = codec_for(bits)
        coded = codec.encode(x)
        encode = min(timed(lambda c=codec: c.encode(x)) for _ in range(3))  # type: ignore[misc]
        decode = min(timed(lambda c=codec, e=coded: c.decode(e, x.shape[-1])) for _ in range(3))  # type: ignore[misc]
        code = coded["code"].numpy()
        for level in (1, 3, 5):
            z = Zstd(level=level)
            chunks = [
                z.encode(np.ascontiguousarray(code[i : i + CHUNK]))
                for i in range(0, len(code), CHUNK)
            ]
            pack = timed(
                lambda z=z, a=code: [
                    z.encode(np.ascontiguousarray(a[i : i + CHUNK]))
                    for i in range(0, len(a), CHUNK)
                ]
            )  # type: ignore[misc]
            unpack = min(timed(lambda z=z, b=chunks: [z.decode(c) for c in b]) for _ in range(3))  # type: ignore[misc]
            out.append(
                {
                    "bits": bits,
                    "encode_gb_s": round(size / encode, 3),
                    "decode_gb_s": round(size / decode, 3),
                    "zstd_level": level,
                    "code_bits": round(8 * sum(map(len, chunks)) / x.numel(), 3),
                    "zstd_encode_mb_s": round(code.nbytes / pack / 1e6),
                    "zstd_decode_mb_s": round(code.nbytes / unpack / 1e6),
                }
            )
            print(out[-1], file=sys.stderr, flush=True)
    return out


def timed(call: Any) -> float:
    t = time.perf_counter()
    call()
    return time.perf_counter() - t


def study(s: States, c: States, embed: torch.Tensor, with_joint: bool) -> dict[str, Any]:
    bench, x = Bench(s, c), s.aux
    for step in STEPS:
        bench.add(shipped(f"rotated, step {step}", stepped(step), x), reference=True)
    for step in STEPS:
        bench.add(
            shipped(f"centred and rotated, step {step}", stepped(step).calibrated(c.aux[:4000]), x)
        )
    unit = stepped(1.1).calibrated(c.aux[:4000])
    assert unit.centre
    ones = np.full(x[0].numel(), 0x3F80, "<u2").tobytes()
    bench.add(
        shipped(
            "mean taken out, deviation not, step 1.1",
            replace(unit, centre=replace(unit.centre, deviation=ones)),
            x,
        )
    )
    for tokens in (250, 1000, 20000):
        bench.add(
            shipped(
                f"centred on {tokens} tokens, step 1.1", stepped(1.1).calibrated(c.aux[:tokens]), x
            )
        )
    bench.add(shipped("8 bits", codec_for(8), x))
    for bits, step in ((4, 0.335), (3, 0.586), (2, 0.996)):
        half = 1 << (bits - 1)
        edges = [k * step for k in range(1 - half, half)]
        bench.add(
            fixed_rate(
                f"fixed {bits} bits, uniform",
                edges,
                [(k + 0.5) * step for k in range(-half, half)],
                x,
            )
        )
        bench.add(fixed_rate(f"fixed {bits} bits, Lloyd-Max", *lloyd(2 * half), x))
    for g in (8, 16, 32, 64):
        bench.add(shipped(f"groups of {g}, step 0.6", stepped(0.6, g), x))
        bench.add(
            shipped(
                f"centred, groups of {g}, step 0.6", stepped(0.6, g).calibrated(c.aux[:4000]), x
            )
        )
    for step in (0.6, 1.1):
        bench.add(exact_scale(step, 64, x))

    # Everything further works on centred states: the mean alone would otherwise be credited to
    # whatever removes it.
    keep = c.ordinary
    mean, deviation = c.aux[keep].mean(0), c.aux[keep].std(0)

    def centred(states: States) -> States:
        return States(states.ids, (states.aux - mean) / deviation, states.last, states.start)

    def undo(m: Measured) -> Measured:
        return Measured(m.name, m.y * deviation + mean, m.disk, m.entropy)

    zs, zc = centred(s), centred(c)
    for kind in ("channel", "matrix"):
        for step in (0.6, 1.1):
            bench.add(undo(predicted(kind, step, zs, zc)))
    scaled = (zc.aux / token_scale(zc.aux))[keep]
    inner = [karhunen(scaled[:, i]) for i in range(len(LAYERS))]
    for step in (0.6, 1.0, 1.5):
        bench.add(
            undo(transformed(f"KLT within a layer, centred, step {step}", step, zs.aux, inner))
        )
    joint = [karhunen(scaled.flatten(1))] if with_joint else []
    for step in (0.6, 1.0, 1.5, 2.0) if joint else ():
        bench.add(
            undo(transformed(f"KLT over all layers, centred, step {step}", step, zs.aux, joint))
        )

    out = {"codec": bench.rows, "last": last_states(s, c, embed), "speed": speed(x[:8192])}
    probe, out["probe"] = Probe(s, c, embed), []
    fits: list[tuple[str, torch.Tensor, float]] = [("exact", c.aux, 16.0)]
    for step in (0.6, 1.1, 2.0):
        m = shipped("", stepped(step), c.aux)
        fits.append((f"rotated, step {step}", m.y, m.entropy))
        m = shipped("", stepped(step).calibrated(c.aux[:4000]), c.aux)
        fits.append((f"centred and rotated, step {step}", m.y, m.entropy))
    for step in (1.0, 2.0) if joint else ():
        m = undo(transformed("", step, zc.aux, joint))
        fits.append((f"KLT over all layers, centred, step {step}", m.y, m.entropy))
    for name, aux, bits in fits:
        out["probe"].append(
            {
                "variant": name,
                "entropy_bits": round(bits, 3),
                "accept": round(probe.accept(aux, c.last), 4),
            }
        )
        print(out["probe"][-1], file=sys.stderr, flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument(
        "--states", type=Path, help="folder that keeps the captured states between runs"
    )
    parser.add_argument("--tokens", type=int, default=20000)
    parser.add_argument(
        "--no-joint",
        dest="joint",
        action="store_false",
        help="leave out the transform over all layers",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    s, c = load(args)
    from safetensors.torch import load_file

    weights = load_file(args.target / "model.safetensors")
    embed = weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).float()
    config = {
        "target": args.target.name,
        "layers": list(LAYERS),
        "tokens": len(s.ids),
        "calibration_tokens": len(c.ids),
        "chunk_tokens": CHUNK,
        "zstd_level": LEVEL,
        "threads": 1,
    }
    write("codec_frontier", config, study(s, c, embed, args.joint))


if __name__ == "__main__":
    main()
