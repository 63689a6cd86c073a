"""States of a real target, and every way of storing them that ``codec_frontier.py`` compares:
codecs that ship and candidates that do not.

A variant is a ``Measured``: decoded states with bits per value. Legend: T tokens, L aux layers, H
hidden size, C = L * H.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numcodecs.zstd import Zstd

from dspark.cache.codec.base import Codec
from dspark.cache.codec.quant import gaussian_levels
from dspark.cache.codec.rotated import Rotated
from dspark.cache.codec.rotation import hadamard, signs

LAYERS = (1, 8, 14, 20, 27)
CHUNK, LEVEL = 128, 1
STEPS = (0.335, 0.4, 0.5, 0.6, 0.8, 1.0, 1.1, 1.4, 2.0)


# -- states ----------------------------------------------------------------------------------------


@dataclass
class States:
    """``ids`` [T], ``aux`` [T, L, H], ``last`` [T, H] (after the final norm), all of whole samples
    that begin at ``start``.
    """

    ids: torch.Tensor
    aux: torch.Tensor
    last: torch.Tensor
    start: list[int]

    @property
    def ordinary(self) -> torch.Tensor:
        """bool[T]: tokens without a massive activation (an aux norm above 10 times its median)."""
        norm = self.aux.norm(dim=2)
        return (norm < 10 * norm.median(0).values).all(1)


def capture(target: Path, corpus: Path, tokens: int) -> tuple[States, States]:
    """Run the target in float32 over shuffled rows; states rounded to bfloat16. Returns (measured,
    calibration), disjoint in rows.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    with (gzip.open if corpus.suffix == ".gz" else open)(corpus, "rt") as file:
        rows = [json.loads(line)["messages"] for line in file]
    order = iter(np.random.default_rng(0).permutation(len(rows)))
    out = []
    for _ in range(2):
        ids, aux, last, start = [], [], [], [0]
        while start[-1] < tokens:
            made = tokenizer.apply_chat_template(
                rows[next(order)], tokenize=True, return_dict=True
            )["input_ids"][:1024]
            with torch.inference_mode():
                got = model.model(torch.tensor([made]), output_hidden_states=True)
            ids.append(torch.tensor(made))
            aux.append(torch.stack([got.hidden_states[i + 1][0] for i in LAYERS], 1).bfloat16())
            last.append(got.last_hidden_state[0].bfloat16())
            start.append(start[-1] + len(made))
        out.append(States(torch.cat(ids), torch.cat(aux), torch.cat(last), start))
    return out[0], out[1]


def load(args: argparse.Namespace) -> tuple[States, States]:
    files = [args.states / f"{n}.pt" for n in ("eval", "calib")] if args.states else []
    if files and all(f.exists() for f in files):
        pair = tuple(torch.load(f) for f in files)
    else:
        pair = tuple(vars(s) for s in capture(args.target, args.corpus, args.tokens))
        for f, s in zip(files, pair, strict=False):
            torch.save(s, f)
    a, b = (States(s["ids"], s["aux"].float(), s["last"].float(), s["start"]) for s in pair)
    return a, b


# -- figures ---------------------------------------------------------------------------------------


def db(ratio: float) -> float:
    return round(-10 * math.log10(ratio), 2)


def snr(x: torch.Tensor, y: torch.Tensor) -> list[float]:
    """dB per layer of ``x[T, L, H]``: mean over tokens of |x - y|^2 / |x|^2."""
    e = ((x - y) ** 2).sum(2) / (x**2).sum(2)
    return [db(float(v)) for v in e.mean(0)]


def channel_snr(x: torch.Tensor, y: torch.Tensor, keep: torch.Tensor) -> list[float]:
    """dB per layer: mean over channels of mean squared error / variance, over the ordinary
    tokens.
    """
    x, y = x[keep], y[keep]
    return [db(float(v)) for v in (((x - y) ** 2).mean(0) / x.var(0)).mean(1)]


def entropy0(code: np.ndarray[Any, Any]) -> float:
    """Order-0 entropy of integers, in bits."""
    _, n = np.unique(code, return_counts=True)
    p = n / code.size
    return float(-(p * np.log2(p)).sum())


def zstd_bits(array: np.ndarray[Any, Any]) -> int:
    """Bits of ``array`` [T, ...] in chunks of 128 tokens, each compressed as the store does it."""
    z = Zstd(level=LEVEL)
    return 8 * sum(
        len(z.encode(np.ascontiguousarray(array[i : i + CHUNK])))
        for i in range(0, len(array), CHUNK)
    )


def nibbles(code: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.stack([code & 15, code >> 4])


@dataclass
class Measured:
    """One variant: ``y`` [T, L, H] decoded; figures as in the module's docstring."""

    name: str
    y: torch.Tensor
    disk: float | None
    entropy: float


class Bench:
    """Collects variants of aux states and prints each as it is measured."""

    def __init__(self, states: States, calib: States) -> None:
        self.s, self.c = states, calib
        self.keep = states.ordinary
        self.rows: list[dict[str, Any]] = []
        self.curve: list[tuple[float, float]] = []

    def add(self, m: Measured, *, reference: bool = False) -> None:
        values = snr(self.s.aux, m.y)
        mean = float(np.mean(values))
        if reference:
            self.curve.append((mean, m.entropy))
            self.curve.sort()
        at = (
            float(np.interp(mean, *zip(*self.curve, strict=True)))
            if len(self.curve) > 1
            else math.nan
        )
        self.rows.append(
            {
                "variant": m.name,
                "disk_bits": None if m.disk is None else round(m.disk, 3),
                "entropy_bits": round(m.entropy, 3),
                "snr_db": values,
                "mean_snr_db": round(mean, 2),
                "channel_db": channel_snr(self.s.aux, m.y, self.keep),
                "gain_bits": None if math.isnan(at) else round(at - m.entropy, 3),
            }
        )
        print(self.rows[-1], file=sys.stderr, flush=True)


# -- variants --------------------------------------------------------------------------------------


def stepped(step: float, limit: int = 128) -> Rotated:
    return Rotated(4, step, tuple(gaussian_levels(step, 16)), limit)


def shipped(name: str, codec: Codec, x: torch.Tensor) -> Measured:
    """A codec of the package, on real bytes."""
    coded = {n: t.numpy() for n, t in codec.encode(x).items()}
    y = codec.decode({n: torch.from_numpy(a) for n, a in coded.items()}, x.shape[-1])
    code = coded["code"]
    bits = entropy0(code if isinstance(codec, Rotated) and codec.per_byte == 1 else nibbles(code))
    scale = entropy0(coded["scale"]) * coded["scale"].size / x.numel()
    return Measured(name, y, sum(zstd_bits(a) for a in coded.values()) / x.numel(), bits + scale)


def grouped(x: torch.Tensor, g: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal rotated groups [T, L, H/g, g] of ``x`` and the matrix that made them."""
    m = torch.from_numpy(hadamard(g) * signs(g)) / math.sqrt(g)
    return x.view(*x.shape[:-1], -1, g) @ m.T, m


def fixed_rate(
    name: str, thresholds: list[float], levels: list[float], x: torch.Tensor
) -> Measured:
    """A fixed number of bits per value, packed; ``thresholds`` and ``levels`` in sigma of a
    bfloat16 scale per group of 64.
    """
    z, m = grouped(x)
    scale = z.pow(2).mean(-1, keepdim=True).sqrt().bfloat16().float()
    code = torch.bucketize(z / scale.clamp(min=1e-30), torch.tensor(thresholds), right=True)
    y = (torch.tensor(levels)[code] * scale) @ m
    bits = round(math.log2(len(levels)))
    planes = np.unpackbits(code.to(torch.uint8).numpy().reshape(len(x), -1, 1), axis=2)[
        :, :, -bits:
    ]
    packed = np.packbits(planes.reshape(len(x), -1), axis=1)
    scales = scale.bfloat16().view(torch.uint16).numpy().view(np.uint8).reshape(len(x), -1, 2)
    disk = zstd_bits(packed) + sum(zstd_bits(scales[..., i]) for i in range(2))
    return Measured(name, y.view(x.shape), disk / x.numel(), bits + 16 / 64)


def lloyd(levels: int) -> tuple[list[float], list[float]]:
    """Thresholds and levels of the Lloyd-Max quantiser of a unit Gaussian."""
    x = np.linspace(-8, 8, 160001)
    p = np.exp(-x * x / 2)
    v = np.linspace(-2, 2, levels)
    for _ in range(2000):
        t = (v[1:] + v[:-1]) / 2
        cell = np.searchsorted(t, x)
        v = np.bincount(cell, p * x, levels) / np.bincount(cell, p, levels)
    return t.tolist(), v.tolist()


def exact_scale(step: float, g: int, x: torch.Tensor) -> Measured:
    """The shipped quantiser with unrounded scales, charged 16 bits each."""
    z, m = grouped(x, g)
    scale = z.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-30)
    code = (z / scale / step).floor().clamp(-8, 7).long() + 8
    levels = gaussian_levels(step, 16)
    table = torch.tensor([-v for v in levels[::-1]] + levels) / 64
    y = ((table[code] * scale) @ m).view(x.shape)
    return Measured(
        f"exact 16-bit scale, groups of {g}, step {step}",
        y,
        None,
        entropy0(code.numpy().astype(np.int8)) + 16 / g,
    )


def predicted(kind: str, step: float, s: States, c: States) -> Measured:
    """Layer l from the decoded layer before it, residual coded as shipped. ``kind``: 'channel' (one
    factor each) or 'matrix' (ridge).
    """
    codec, layers = stepped(step), []
    keep, bits, disk = c.ordinary, 0.0, 0.0
    before = before_c = None
    for i in range(s.aux.shape[1]):
        x, xc = s.aux[:, i], c.aux[:, i]
        if before is None or before_c is None:
            guess, guess_c = torch.zeros_like(x), torch.zeros_like(xc)
        elif kind == "channel":
            f = (xc * before_c)[keep].sum(0) / (before_c**2)[keep].sum(0)
            guess, guess_c = before * f, before_c * f
        else:
            w = ridge(before_c[keep], xc[keep], 1e-3)
            guess, guess_c = before @ w, before_c @ w
        m = shipped("", codec, (x - guess)[:, None])
        bits, disk = bits + m.entropy, disk + (m.disk or 0)
        before, before_c = (
            guess + m.y[:, 0],
            guess_c + shipped("", codec, (xc - guess_c)[:, None]).y[:, 0],
        )
        layers.append(before)
    n = len(layers)
    return Measured(
        f"prediction from the layer before, {kind}, step {step}",
        torch.stack(layers, 1),
        disk / n,
        bits / n,
    )


def ridge(x: torch.Tensor, y: torch.Tensor, strength: float) -> torch.Tensor:
    """[F, O] least squares from ``x[T, F]`` to ``y[T, O]``, regularised by ``strength`` times the
    mean square of x.
    """
    gram = x.T @ x
    gram.diagonal().add_(strength * float(gram.diagonal().mean()))
    return torch.linalg.solve(gram, x.T @ y)


@dataclass
class Transform:
    """Orthogonal ``basis`` [C, C], columns by falling variance, and ``mean`` [C], of states divided
    by a token's RMS in each layer.
    """

    mean: torch.Tensor
    basis: torch.Tensor
    variance: torch.Tensor


def token_scale(x: torch.Tensor) -> torch.Tensor:
    """RMS of each row to a quarter octave, so that one byte holds it."""
    return ((x.pow(2).mean(-1, keepdim=True).clamp(min=1e-30).log2() * 2).round() / 4).exp2()


def karhunen(x: torch.Tensor) -> Transform:
    """Eigenvectors of the covariance of ``x[T, C]``."""
    mean = x.mean(0)
    cov = (x - mean).T @ (x - mean) / len(x)
    values, vectors = torch.linalg.eigh(cov)
    return Transform(mean, vectors.flip(1), values.flip(0).clamp(min=1e-12))


def transformed(name: str, step: float, x: torch.Tensor, transforms: list[Transform]) -> Measured:
    """Uniform quantiser of transform coefficients with one step for all. ``x`` [T, L, H];
    transforms: one for all layers or one per layer.

    Disk bytes: coefficients sorted by variance in bands of 64, each band its own array: a byte, a
    nibble, two bits or (variance below a tenth of the cell's noise) nothing a value; values beyond
    a band's range are clamped.
    """
    scale = token_scale(x)
    parts = [(x / scale).flatten(1)] if len(transforms) == 1 else list((x / scale).unbind(1))
    bits, disk, back = 0.0, 0, []
    for z, t in zip(parts, transforms, strict=True):
        q = ((z - t.mean) @ t.basis / step).round()
        for a in range(0, q.shape[1], 64):
            deviation = float(t.variance[a : a + 64].max().sqrt()) / step
            if deviation**2 < 0.1 / 12:
                q[:, a : a + 64] = 0
                continue
            reach, each = (127, 1) if deviation > 2 else (7, 2) if deviation > 0.35 else (1, 4)
            band = q[:, a : a + 64].clamp_(-reach, reach)
            code = (band + reach).to(torch.uint8).numpy()
            width = 8 // each
            disk += zstd_bits(
                sum(
                    (code[:, i::each] << (width * i) for i in range(1, each)),
                    start=code[:, 0::each],
                )
            )
            bits += sum(entropy0(code[:, i]) for i in range(code.shape[1]))
        back.append((q * step) @ t.basis.T + t.mean)
    y = (back[0] if len(transforms) == 1 else torch.stack(back, 1)).view(x.shape) * scale
    per = x[0].numel()
    scales = (scale.log2() * 4).to(torch.int8).numpy()
    disk += zstd_bits(scales)
    return Measured(name, y, disk / x.numel(), bits / per + entropy0(scales) / x.shape[2])
