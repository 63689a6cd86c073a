"""DeepSpec's own model, loss and optimizer, trained on the rows, anchors and schedule that
``dspark-train`` with the same flags would take.

python bench/peer.py --deepspec DIR_OF_A_CHECKOUT --store hs.zarr --output DRAFT [--train
"--num-layers 3 --max-steps 1500"] [--eager]

Writes a draft folder that ``dspark-tools score`` reads, and prints one JSON object. Nothing of
DeepSpec is needed otherwise.

Its own: the network and how it is initialised, the loss, AdamW on float32 masters with torch's
betas (0.9, 0.999), the warm-up of ``int(ratio * steps)``, the gradients' bfloat16, torch.compile
with dynamic shapes. Ours: which samples share a row, which anchors are drawn, learning rate, steps,
clipping norm, loss weights. Three things are done to it:

- It knows one document per sequence. Its mask is narrowed to the block's document, so that a packed
  row passes as one sequence; its positions then count along the row, which RoPE does not see. The
  slots it counts are compared with ours at the first step.
- ``model.to(bfloat16)`` rounds its RoPE frequencies, which servers and ``score`` keep exact. They
  are put back, in its favour.
- Its running metrics, which only its logger reads, are left out.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from feed import config, rows_of
from torch import Tensor

from common import PUBLISHED_LOSS
from dspark.train.data.batch import Batch
from dspark.train.data.feed import Feed
from dspark.train.draft.model import DraftModel
from dspark.train.draft.saved.folder import save_draft
from dspark.train.loop import Schedule
from dspark.train.objective.config import ObjectiveConfig
from dspark.train.run import folder
from dspark.train.run.report import RunLog
from dspark.train.run.setup import Run, prepare


@dataclass(slots=True)
class Given:
    """What the peer is told of a row instead of drawing or assuming it: ``anchors`` [1, A],
    ``keep`` [1, A], and the first position of each block's document, ``start`` [A]; None: the row
    is one document.
    """

    anchors: Tensor
    keep: Tensor
    start: Tensor | None = None


@dataclass(slots=True)
class Peer:
    """``net`` with our anchors: set ``given`` before each forward."""

    net: Any
    loss: Callable[..., Tensor]
    given: Given | None = None

    @classmethod
    def build(cls, checkout: Path, model: DraftModel, anchors: int, device: torch.device) -> Peer:
        """Its network for the config of ``model``, initialised its own way, on the target's frozen
        matrices, in float32.
        """
        sys.path.insert(0, str(checkout))
        import torch.distributed as dist
        from deepspec.modeling.dspark import common
        from deepspec.modeling.dspark.loss import compute_dspark_loss
        from deepspec.modeling.dspark.qwen3 import modeling
        from transformers import Qwen3Config

        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), world_size=1, rank=0)
        written = Qwen3Config.from_dict({**model.config.to_flat(), "num_anchors": anchors})
        written._attn_implementation = "flex_attention" if device.type == "cuda" else "eager"
        with torch.device(device):
            net = modeling.Qwen3DSparkModel(written)
        net.initialize_embeddings_and_head(embed_tokens=model.embed_tokens, lm_head=model.lm_head)
        net.train()
        peer = cls(net, compute_dspark_loss)
        modeling.sample_anchor_positions = lambda **unused: (peer.given.anchors, peer.given.keep)
        whole = common.create_block_mask if device.type == "cuda" else _dense

        def narrowed(mask_mod: Any, **sizes: Any) -> Any:
            start = peer.given.start
            if start is None:
                return whole(mask_mod, **sizes)
            size = model.config.block_size

            def within(b: Any, h: Any, q: Any, kv: Any) -> Any:
                # The blocks' own keys lie behind all of the row's, so this is true of them.
                return mask_mod(b, h, q, kv) & (kv >= start[q // size])

            return whole(within, **sizes)

        common.create_block_mask = narrowed
        return peer


def _dense(mask_mod: Any, B: int, H: Any, Q_LEN: int, KV_LEN: int, device: Any) -> Tensor:
    """The mask for eager attention, [B, 1, Q, KV]: flex attention has no backward on a CPU."""
    b, q, kv = torch.arange(B)[:, None, None], torch.arange(Q_LEN)[:, None], torch.arange(KV_LEN)
    return torch.where(mask_mod(b, 0, q, kv), 0.0, torch.finfo(torch.float32).min)[:, None]


def quiet() -> None:
    """Leave out the metrics that its logger would read: they pile up, and a compiler stops at
    each.
    """
    from deepspec.modeling.dspark import loss
    from deepspec.modeling.dspark.qwen3 import modeling

    modeling.log_sampler_stats = loss.add_metric = lambda *unused, **also_unused: None


def given_of(batch: Batch) -> Given:
    """Anchors and document starts of a packed row."""
    at = torch.arange(batch.doc.shape[0], device=batch.doc.device)
    first = at - batch.position  # positions restart in each document
    return Given(batch.anchors[None], batch.anchor_valid[None], first[batch.anchors])


def inputs(batch: Batch) -> dict[str, Tensor]:
    """What its forward takes, of one packed row. Its cache stores the last state of every token;
    ours those that count.
    """
    return {
        "input_ids": batch.input_ids[None],
        "target_hidden_states": batch.aux.flatten(1)[None],
        "loss_mask": batch.loss_mask[None].float(),
        "target_last_hidden_states": batch.last[batch.last_index.clamp(min=0)][None],
    }


def train(run: Run, checkout: Path, output: Path, eager: bool) -> dict[str, Any]:
    """Train and write the draft; its last numbers."""
    settings, device = run.config, run.compute.device
    torch.manual_seed(settings.seed)
    peer = Peer.build(checkout, run.model, settings.max_anchors, device)
    quiet()
    frequencies = peer.net.rotary_emb.inv_freq.clone()
    peer.net.to(dtype=run.compute.dtype)
    peer.net.rotary_emb.inv_freq = frequencies
    from deepspec.utils import BF16Optimizer

    total = Schedule.of(run).total
    optimizer = BF16Optimizer(
        peer.net,
        lr=settings.lr,
        total_steps=total,
        warmup_ratio=settings.warmup_ratio,
        weight_decay=settings.weight_decay,
    )
    forward = (
        torch.compile(peer.net, dynamic=True) if run.compute.compiled and not eager else peer.net
    )
    objective = ObjectiveConfig.from_json(settings.loss_fn)
    if objective.kl:
        raise SystemExit("--loss-fn: the peer's loss has no divergence")
    feed = Feed(rows_of(run), lambda row: row.place(run.cache, device, run.compute.dtype), device)
    report = RunLog(output, 0)
    out: dict[str, Any] = {}
    since, tokens = time.perf_counter(), 0
    for number in range(1, total + 1):
        rows = [row for row in feed.take() if row.slots]
        loss = torch.zeros((), device=device)
        for batch in feed.batches(rows):
            peer.given = given_of(batch)
            outputs = forward(**inputs(batch))
            if number == 1 and not torch.equal(outputs.eval_mask[0], batch.counted):
                raise SystemExit(
                    "the peer counts other slots of this row than we do: no fair comparison"
                )
            part = peer.loss(
                outputs=outputs,
                loss_decay_gamma=settings.decay,
                ce_loss_alpha=objective.ce,
                l1_loss_alpha=objective.l1,
                confidence_head_alpha=settings.confidence_head_alpha,
            ) / len(rows)
            part.backward()
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(peer.net.parameters(), settings.grad_clip)
        lr = optimizer.get_learning_rate()
        optimizer.step()
        feed.queued()
        tokens += sum(row.tokens for row in rows)
        if number < total:
            feed.fetch()
        if number % settings.log_every == 0 or number == total:
            seconds, steps = time.perf_counter() - since, (number - 1) % settings.log_every + 1
            out = {
                "step": number,
                "loss": loss.item(),
                "grad_norm": norm.item(),
                "lr": lr,
                "tokens_per_second": tokens / seconds,
                "step_ms": 1e3 * seconds / steps,
            }
            report.row(out)
            print(f"peer {number}/{total} loss {out['loss']:.3f}", file=sys.stderr)
            since, tokens = time.perf_counter(), 0
    report.close()
    learnt = {n: p.detach().float() for n, p in peer.net.state_dict().items()}
    run.model.load_state_dict(learnt, strict=True)
    save_draft(output, run.model)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    return out | {"peak_gb": peak}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--deepspec", required=True, type=Path)
    parser.add_argument("--store", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--train", default="", help="flags of dspark-train")
    parser.add_argument("--eager", action="store_true", help="do not compile its network")
    args = parser.parse_args()
    output = shlex.quote(str(args.output))
    settings = config(args.store, f"--loss-fn '{PUBLISHED_LOSS}' {args.train} --output {output}")
    folder.claim(args.output, settings, resume=False, overwrite=True)
    run = prepare(settings)
    folder.begin(args.output, run, resume=False, overwrite=True)
    print(json.dumps(train(run, args.deepspec, args.output, args.eager)))


if __name__ == "__main__":
    main()
