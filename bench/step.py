"""One training step on random states: time by phase, peak memory, fast path against slow, and
DeepSpec beside it.

python bench/step.py [--shape qwen3-4b] [--peer DIR_OF_A_DEEPSPEC_CHECKOUT] [--scaling
[tokens,block]] [--adam] [--loss-fn '{"ce": 0.1, "kl": 0.3, "l1": 0.6}'] [--name step]

The peer runs in the same process on the same weights, tokens, states and anchors; nothing of it is
needed otherwise.
Forward, objective and backward are timed with device events, median of ``--repeat`` steps on
rotating rows.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from peer import Given, Peer
from torch import Tensor

from common import PUBLISHED_LOSS, RESULTS, write
from dspark.cache.target.logits import PLAIN
from dspark.train.data import anchors as rules
from dspark.train.data.batch import Batch
from dspark.train.draft.attention import MaskTables
from dspark.train.draft.config import DraftConfig
from dspark.train.draft.model import DraftModel
from dspark.train.objective import chunks as plain
from dspark.train.objective.config import ObjectiveConfig
from dspark.train.objective.metrics import SlotMetrics
from dspark.train.objective.objective import objective
from dspark.train.objective.slots import Denominators, SlotInputs
from dspark.train.ops import gated, qk_norm_rope, scaled
from dspark.train.optim.adamw import MasterAdamW
from dspark.train.optim.base import AdamSettings


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tokens: int
    anchors: int
    block: int
    aux: int = 5
    rank: int = 256


SHAPES = {
    "qwen3-4b": Shape(2560, 9728, 5, 32, 8, 128, 151_936, 4096, 512, 7),
    "glm-5.2": Shape(6144, 12_288, 5, 64, 64, 128, 154_880, 4096, 1024, 8),
    "smollm2": Shape(576, 1536, 3, 9, 3, 64, 49_152, 16_384, 2048, 7),
    "tiny": Shape(64, 96, 2, 4, 2, 16, 997, 256, 24, 4, rank=16),
}


def draft_config(s: Shape) -> DraftConfig:
    return DraftConfig(
        hidden_size=s.hidden,
        intermediate_size=s.intermediate,
        num_layers=s.layers,
        num_heads=s.heads,
        num_kv_heads=s.kv_heads,
        head_dim=s.head_dim,
        vocab_size=s.vocab,
        draft_vocab_size=s.vocab,
        mask_token_id=s.vocab - 1,
        target_layer_ids=tuple(range(0, 6 * s.aux, 6)),
        num_target_layers=6 * s.aux + 3,
        block_size=s.block,
        markov_rank=s.rank,
        rope_theta=1e6,
    )


def weights(s: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    """A tied target, as Qwen3-4B's: the head's rows give logits of a few units, so that both
    softmaxes have a shape.
    """
    head = torch.randn(s.vocab, s.hidden, device=device, dtype=dtype) * (3 / s.hidden**0.5)
    return SimpleNamespace(embed_tokens=head, lm_head=head, logits=PLAIN)


def row(
    s: Shape, seed: int, device: torch.device, dtype: torch.dtype, anchors: np.ndarray | None = None
) -> Batch:
    """One document of ``s.tokens`` supervised tokens, random states, ``s.anchors`` random
    anchors.
    """
    rng = np.random.default_rng(seed)
    mask, doc = np.ones(s.tokens, np.bool_), np.zeros(s.tokens, np.int32)
    can = rules.eligible(mask, doc)
    torch.manual_seed(seed)
    return Batch.build(
        input_ids=rng.integers(0, s.vocab - 1, s.tokens),
        loss_mask=mask,
        doc=doc,
        aux=torch.randn(s.tokens, s.aux, s.hidden, device=device, dtype=dtype),
        last=torch.randn(int(can.sum()), s.hidden, device=device, dtype=dtype),
        anchors=rules.choose(can, rng.random(s.tokens), s.anchors) if anchors is None else anchors,
        block_size=s.block,
        pad_anchors_to=s.anchors,
    ).to(device)


class Timer:
    """Milliseconds between marks, on the device's own clock where it has one."""

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.marks = cuda, list[Any]()

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def spans(self) -> list[float]:
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return [1e3 * (b - a) for a, b in zip(self.marks, self.marks[1:], strict=False)]


def measure(
    step: Callable[[int, Timer], None], phases: list[str], repeat: int, cuda: bool
) -> dict[str, float]:
    """Median ms of each phase and of the whole, and the peak of memory over what was there before
    the first step.
    """
    started = time.perf_counter()
    for i in range(3):
        step(i, Timer(cuda))
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    first = time.perf_counter() - started
    timers = [Timer(cuda) for _ in range(repeat)]
    for i, timer in enumerate(timers):
        # No waiting between steps, as in training: the host prepares a step while the device is in
        # the one before.
        timer.mark()
        step(i, timer)
    rows = [timer.spans() for timer in timers]
    out = {name: statistics.median(r[k] for r in rows) for k, name in enumerate(phases)}
    out["ms"] = statistics.median(sum(r) for r in rows)
    out["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0
    return out | {"first_three_steps_s": first}


def with_tables(model: DraftModel, batch: Batch) -> Batch:
    """The batch with the tables of the attention's mask, as a reader makes them."""
    made = MaskTables(model.config.slots, model.sights)
    found = made(*(x.cpu() for x in (batch.doc, batch.anchors, batch.anchor_valid)))
    device = batch.doc.device
    return replace(batch, tables=tuple({n: t.to(device) for n, t in of.items()} for of in found))


def ours(
    s: Shape,
    args: argparse.Namespace,
    model: DraftModel,
    rows: list[Batch],
    adam: bool = False,
    tables: bool = True,
) -> dict[str, float]:
    """Forward (with the attention plan), objective with gradients, backward, and metrics with the
    optimizer if asked. ``tables``: whether the readers have made those of the plan.
    """
    cuda = args.device.type == "cuda"
    rows = [with_tables(model, batch) for batch in rows] if tables else rows
    dens = [Denominators.of(r.to("cpu"), 4.0) for r in rows]
    settings = AdamSettings(betas=(0.9, 0.95), weight_decay=0.0, clip=1.0)
    optimizer = MasterAdamW(model.trained(), settings) if adam else None
    metrics = SlotMetrics(s.block, args.device)

    def step(i: int, timer: Timer) -> None:
        batch = rows[i % len(rows)]
        states = model(batch, model.plan(batch, "flex" if cuda else "sdpa"))
        timer.mark()
        slots = SlotInputs.gather(batch, states, 4.0)
        out = objective(slots, model.frozen_head, args.loss, dens[i % len(rows)])
        timer.mark()
        out.loss.backward()  # type: ignore[no-untyped-call]
        timer.mark()
        with torch.no_grad():
            metrics.add(batch, slots, out)
        if optimizer is not None:
            optimizer.step(1e-5)
            timer.mark()
        else:
            model.zero_grad(set_to_none=True)

    phases = ["forward_ms", "objective_ms", "backward_ms"] + (
        ["metrics_and_adam_ms"] if adam else []
    )
    return measure(step, phases, args.repeat, cuda)


def gradients(model: DraftModel) -> dict[str, Tensor]:
    out = {n: p.grad.detach().float().clone() for n, p in model.trained() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return out


@contextmanager
def no_kernels() -> Iterator[None]:
    """Inside, the draft's own operations are plain torch on a GPU too. (``terms`` selects the
    objective's path.)
    """
    with (
        patch.object(qk_norm_rope, "_by_kernel", lambda x: False),
        patch.object(gated, "gradient", gated.plain_gradient),
        patch.object(scaled, "KINDS", ()),
    ):
        yield


def furthest(found: dict[str, Tensor], reference: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative difference of a tensor's gradient, and whose it is."""
    return max((float((found[n] - g).norm() / g.norm()), n) for n, g in reference.items())


def agreement(
    s: Shape, device: torch.device, dtype: torch.dtype, loss: ObjectiveConfig
) -> dict[str, Any]:
    """Fast path (compiled, flex, Triton) against slow (eager, SDPA, plain torch) on the same row
    and weights; in bfloat16 both also against the slow path in float32 on the same values.
    """
    torch.manual_seed(0)
    model = DraftModel(draft_config(s), weights(s, device, dtype)).to(device=device, dtype=dtype)
    model.make_room()
    batch = row(s, 1, device, dtype)
    dens = Denominators.of(batch.to("cpu"), 4.0)

    def run(given: Batch, fast: bool) -> tuple[float, dict[str, Tensor]]:
        flex = fast and device.type == "cuda"
        given = with_tables(model, given) if flex else given
        forward: Any = torch.compile(model.forward, dynamic=False) if flex else model.forward
        terms = None if fast else plain.chunk_terms
        with nullcontext() if fast else no_kernels():
            states = forward(given, model.plan(given, "flex" if flex else "sdpa"))
            slots = SlotInputs.gather(given, states, 4.0)
            out = objective(slots, model.frozen_head, loss, dens, terms=terms)
            out.loss.backward()  # type: ignore[no-untyped-call]
            return out.loss.item(), gradients(model)

    (slow, slow_g), (quick, quick_g) = run(batch, False), run(batch, True)
    worst = furthest(quick_g, slow_g)
    whole = sum((quick_g[n] - g).square().sum() for n, g in slow_g.items()) / sum(
        g.square().sum() for g in slow_g.values()
    )
    found = {
        "dtype": str(dtype).removeprefix("torch."),
        "loss": slow,
        "loss_relative_difference": abs(quick - slow) / abs(slow),
        "largest_relative_gradient_difference": worst[0],
        "in": worst[1],
        "gradient_relative_difference": float(whole**0.5),
    }
    if dtype == torch.bfloat16:
        model.to(torch.float32)
        exact, exact_g = run(replace(batch, aux=batch.aux.float(), last=batch.last.float()), False)
        found["against_float32"] = {
            name: {
                "loss": abs(loss - exact) / abs(exact),
                "largest_gradient": dict(zip(("off", "in"), furthest(g, exact_g), strict=True)),
            }
            for name, loss, g in (("fast", quick, quick_g), ("slow", slow, slow_g))
        }
    return found


def peer(
    s: Shape, args: argparse.Namespace, model: DraftModel, rows: list[Batch]
) -> dict[str, Any]:
    """DeepSpec's model and loss, compiled as its trainer does, on our weights, rows and anchors."""
    other = Peer.build(args.peer, model, s.anchors, args.device)
    net = other.net.to(torch.bfloat16)
    net.load_state_dict(model.state_dict(), strict=True)
    net.set_embedding_head_trainable(False)
    given = [Given(r.anchors[None], r.anchor_valid[None]) for r in rows]
    compiled = torch.compile(net, dynamic=True) if args.peer_compile else net
    ones = torch.ones(1, s.tokens, device=args.device)
    # All S last states, as its cache stores them; ours keeps those that count.
    lasts = [torch.cat([r.last, r.last[-1:]])[None] for r in rows]
    losses: list[Tensor] = []

    def step(i: int, timer: Timer) -> None:
        turn = i % len(rows)
        batch, other.given = rows[turn], given[turn]
        out = compiled(
            input_ids=batch.input_ids[None],
            target_hidden_states=batch.aux.flatten(1)[None],
            loss_mask=ones,
            target_last_hidden_states=lasts[turn],
        )
        timer.mark()
        loss = other.loss(
            outputs=out,
            loss_decay_gamma=4.0,
            ce_loss_alpha=0.1,
            l1_loss_alpha=0.9,
            confidence_head_alpha=1.0,
        )
        timer.mark()
        loss.backward()
        timer.mark()
        losses.append(loss.detach())
        net.zero_grad(set_to_none=True)

    found = measure(step, ["forward_ms", "objective_ms", "backward_ms"], args.repeat, True)
    return found | {"loss": float(losses[-1]), "compiled": args.peer_compile}


def one_model(
    s: Shape, args: argparse.Namespace, dtype: torch.dtype, compiled: bool = True
) -> tuple[DraftModel, list[Batch]]:
    torch.manual_seed(0)
    model = DraftModel(draft_config(s), weights(s, args.device, dtype)).to(
        device=args.device, dtype=dtype
    )
    model.make_room()  # as in training, where the head comes from the host
    if compiled and args.device.type == "cuda":
        model.compile(dynamic=False)
    return model, [row(s, i, args.device, dtype) for i in range(args.rows)]


def clear() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


SIZES = {
    "tokens": (1024, 2048, 4096, 8192, 16_384),
    "anchors": (128, 256, 512, 1024, 2048),
    "vocab": (32_000, 64_000, 151_936),
    "block": (5, 7, 8, 16),
}


def scaling(s: Shape, args: argparse.Namespace, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One size at a time; eager backbone (compiling each shape would take minutes), Triton
    objective and flex attention.
    """
    table = []
    for field in args.scaling.split(","):
        for value in SIZES[field]:
            torch._dynamo.reset()
            model, rows = one_model(replace(s, **{field: value}), args, dtype, compiled=False)
            found = ours(replace(s, **{field: value}), args, model, rows)
            table.append(
                {"size": field, "value": value, "ms": found["ms"], "peak_gb": found["peak_gb"]}
            )
            print(table[-1], file=sys.stderr)
            del model, rows
            clear()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-4b")
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--peer-compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--scaling", nargs="?", const=",".join(SIZES), help="sizes to vary, comma separated  [all]"
    )
    parser.add_argument("--agreement", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--adam", action="store_true", help="with fp32 masters, AdamW and metrics")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument(
        "--loss-fn",
        dest="loss",
        type=ObjectiveConfig.from_json,
        default=PUBLISHED_LOSS,
        help="of ours  [DeepSpec's]",
    )
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument(
        "--device",
        type=torch.device,
        default=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    parser.add_argument("--name", default="step")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    s = SHAPES[args.shape]
    dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    results: dict[str, Any] = {}
    if args.agreement:
        results["agreement"] = [agreement(s, args.device, dtype, args.loss)]
        clear()
        small = replace(s, tokens=min(s.tokens, 1024), anchors=min(s.anchors, 128))
        results["agreement"].append(agreement(small, args.device, torch.float32, args.loss))
        clear()
        print(results["agreement"], file=sys.stderr)
    model, rows = one_model(s, args, dtype)
    results |= ours(s, args, model, rows, adam=args.adam)
    results["tokens_per_s"] = 1e3 * s.tokens / results["ms"]
    # in turns with the above, so that a slow minute of the machine is not taken for a difference
    alone = ours(s, args, model, rows, adam=args.adam, tables=False)
    again = ours(s, args, model, rows, adam=args.adam)
    results |= {"plan_made_on_device": alone, "again": again}
    print(results, file=sys.stderr)
    if args.peer:
        model.zero_grad(set_to_none=True)
        clear()
        beside = torch.cuda.memory_allocated() / 1e9
        found = peer(s, args, model, rows)
        # Our weights lie beside its own while it runs: they are not its memory. The rows are in
        # both figures.
        own = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
        results |= {
            "peer_ms": found["ms"],
            "peer_peak_gb": found["peak_gb"] - own,
            "peer": found,
            "held_beside_peer_gb": beside,
        }
    del model, rows
    clear()
    if args.scaling:
        results["scaling"] = scaling(s, args, dtype)
    write(
        args.name,
        {k: str(v) for k, v in vars(args).items() if k not in ("results", "peer")}
        | {"sizes": vars(s)},
        results,
        args.results,
    )


if __name__ == "__main__":
    main()
