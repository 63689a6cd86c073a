"""EAGLE-3's loss and gradients, ours against DeepSpec's own, on the same weights, tokens and
states.

python bench/peer_eagle3.py --deepspec DIR_OF_A_CHECKOUT [--lengths 40,23] [--steps 7] [--device
cpu|cuda]

Prints one JSON object; exit code 1 where a difference exceeds 1e-6. Its loss is a soft
cross-entropy, ours a divergence: the two differ by the targets' entropy, which has no gradient and
is added to ours here. Its sums are divided by the length of a document; that is undone. What is
done to it:

- It norms queries and keys of a head (Qwen3); the drafts that vLLM serves as EAGLE-3 (Llama) do
  not. The two norms are replaced by nothing.
- It is told which positions count: ours need a next token to be held to, which its last one lacks.
  Its blocks also begin before the supervised part and count where they reach it, ours do not:
  documents here are supervised from their second token on, so that both count the same slots, which
  is checked.
- On a CPU its attention and its fused loss have no backward pass or do not run; both are replaced
  by the plain formulas that they state. With ``--device cuda`` they are its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.cache.target.frozen import FrozenTarget
from dspark.train.data import anchors as rules
from dspark.train.data.batch import Batch
from dspark.train.draft.config import DraftConfig
from dspark.train.draft.eagle3.model import Eagle3Model
from dspark.train.draft.types import drafter
from dspark.train.objective.config import ObjectiveConfig
from dspark.train.objective.objective import objective
from dspark.train.objective.slots import Denominators, SlotInputs

STEP_DECAY = 0.8
LIMIT = 1e-6
WIDTH, VOCAB, LAYERS = 64, 512, (1, 4, 6)


def ours(steps: int, device: str) -> Eagle3Model:
    """A draft with random weights of a size at which every part matters."""
    torch.manual_seed(0)
    target = {
        "hidden_size": WIDTH,
        "intermediate_size": 160,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
    }
    config = DraftConfig.sized_for(
        target,
        target_layer_ids=LAYERS,
        mask_token_id=0,
        speculator_type="eagle3",
        num_layers=1,
        block_size=steps,
    )
    embed, head = torch.randn(VOCAB, WIDTH), torch.randn(VOCAB, WIDTH) * 0.3
    model = drafter("eagle3").network(
        config, FrozenTarget(embed, torch.ones(WIDTH), head, False), None
    )
    assert isinstance(model, Eagle3Model)
    with torch.no_grad():
        for _, parameter in model.trained():
            parameter.copy_(
                1 + 0.3 * torch.randn_like(parameter)
                if parameter.ndim == 1
                else torch.randn_like(parameter) / parameter.shape[1] ** 0.5
            )
    return model.to(device)


def packed(lengths: list[int], steps: int) -> Batch:
    """Documents of ``lengths`` tokens in one row, all but the first token of each supervised, every
    eligible anchor taken.
    """
    total = sum(lengths)
    doc = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    mask = np.concatenate([np.arange(n) > 0 for n in lengths])
    eligible = rules.eligible(mask, doc)
    g = torch.Generator().manual_seed(1)
    return Batch.build(
        input_ids=torch.randint(0, VOCAB, (total,), generator=g).numpy(),
        loss_mask=mask,
        doc=doc,
        aux=torch.randn(total, len(LAYERS), WIDTH, generator=g),
        last=torch.randn(int(eligible.sum()), WIDTH, generator=g),
        anchors=np.flatnonzero(eligible),
        block_size=steps,
    )


def our_loss(model: Eagle3Model, batch: Batch) -> Tensor:
    """Sum over slots of 0.8^step times the soft cross-entropy."""
    config = ObjectiveConfig(
        ce=0.0, l1=0.0, confidence=0.0, kl=1.0, decay=float(-1 / np.log(STEP_DECAY))
    )
    slots = SlotInputs.gather(batch, model(batch, model.plan(batch)), config.decay)
    loss = objective(slots, model.frozen_head, config, Denominators(1.0, 1.0, 1.0)).loss
    assert slots.target_at is not None
    log_q = model.frozen_head.target_logits(slots.target[slots.target_at]).float().log_softmax(-1)
    return loss - (slots.weight * (log_q.exp() * log_q).sum(-1)).sum()


def peer_of(checkout: Path, model: Eagle3Model, device: str) -> tuple[Any, Callable[..., Tensor]]:
    """Its network with our weights, and its loss."""
    sys.path.insert(0, str(checkout))
    from deepspec.modeling.eagle3 import common, loss
    from deepspec.modeling.eagle3.qwen3 import modeling
    from transformers import Qwen3Config

    own = {
        "ttt_length": model.config.block_size,
        "step_loss_decay": STEP_DECAY,
        "layer_types": None,
        "architectures": None,
    }
    written = Qwen3Config.from_dict({**model.config.to_flat(), "model_type": "qwen3", **own})
    written._attn_implementation = "flex_attention"
    net = modeling.Qwen3Eagle3Model(written).to(device)
    net.initialize_embeddings_and_head(
        embed_tokens=model.embed_tokens, lm_head=_Head(model.frozen_head.lm_head)
    )
    for layer in net.layers:
        layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()
    learnt = {n.replace("midlayer.", "layers.0."): p.detach() for n, p in model.trained()}
    missing, unexpected = net.load_state_dict(learnt, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"embed_tokens.weight", "lm_head.weight"}, missing
    loss.add_metric = lambda *unused, **also_unused: None
    if device == "cpu":
        common.create_block_mask = _dense
        modeling.flex_attention = _attention
        loss.FusedLogSoftmaxLoss = _SoftCrossEntropy
    return net, loss.compute_eagle3_loss


class _Head:
    def __init__(self, weight: Tensor) -> None:
        self.weight = weight


def _dense(mask_mod: Any, B: int, H: Any, Q_LEN: int, KV_LEN: int, device: Any) -> Tensor:
    b, q, kv = torch.arange(B)[:, None, None], torch.arange(Q_LEN)[:, None], torch.arange(KV_LEN)
    seen: Tensor = mask_mod(b, 0, q, kv)[:, None]
    return seen


def _attention(
    *, query: Tensor, key: Tensor, value: Tensor, block_mask: Tensor, enable_gqa: bool
) -> Tensor:
    # a query that sees nothing counts nowhere
    seen = block_mask | ~block_mask.any(-1, keepdim=True)
    return F.scaled_dot_product_attention(query, key, value, seen, enable_gqa=enable_gqa)


class _SoftCrossEntropy:
    @staticmethod
    def apply(logits: Tensor, target: Tensor, mask: Tensor, normalizer: float) -> Tensor:
        return -(mask * target * logits.float().log_softmax(-1)).sum() / normalizer


def peer_loss(net: Any, loss: Callable[..., Tensor], batch: Batch, steps: int) -> Tensor:
    """The same sum from its loss, a document at a time."""
    total = torch.zeros((), device=batch.aux.device)
    slot0 = torch.zeros(batch.doc.shape[0], dtype=torch.bool, device=batch.aux.device)
    slot0[batch.anchors - 1] = batch.counted[:, 0]  # its row q predicts what our anchor q + 1 does
    count = 0
    for document in batch.doc.unique().tolist():
        at = (batch.doc == document).nonzero()[:, 0]
        last = batch.last[batch.last_index[at].clamp(min=0)]
        mask = slot0[at].float()
        count += sum(int(mask[k:].sum()) for k in range(steps))
        total = total + len(at) * loss(
            model=net,
            ttt_length=steps,
            step_loss_decay=STEP_DECAY,
            batch={
                "input_ids": batch.input_ids[at][None],
                "attention_mask": torch.ones_like(at)[None],
                "loss_mask": mask[None],
                "target_hidden_states": batch.aux[at].flatten(1)[None],
                "target_last_hidden_states": last[None],
            },
        )
    if count != int(batch.counted.sum()):
        raise SystemExit(
            f"the peer counts {count} slots, we {int(batch.counted.sum())}: no fair comparison"
        )
    return total


def differences(
    model: Eagle3Model, net: Any, batch: Batch, loss: Callable[..., Tensor]
) -> dict[str, Any]:
    """Relative differences: of the loss, and of each gradient against its tensor's largest
    value.
    """
    mine, theirs = our_loss(model, batch), peer_loss(net, loss, batch, model.config.block_size)
    mine.backward()
    theirs.backward()
    other = dict(net.named_parameters())
    gradients = {}
    for name, parameter in model.trained():
        a, b = parameter.grad, other[name.replace("midlayer.", "layers.0.")].grad
        assert a is not None
        gradients[name] = ((a - b).abs().max() / b.abs().max()).item()
    return {
        "slots": int(batch.counted.sum()), "loss": mine.item(), "peer_loss": theirs.item(),
        "loss_difference": abs(mine.item() - theirs.item()) / abs(theirs.item()),
        "largest_gradient_difference": max(gradients.values()), "gradient_differences": gradients,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--deepspec", required=True, type=Path)
    parser.add_argument("--lengths", default="40,23")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    model = ours(args.steps, args.device)
    net, loss = peer_of(args.deepspec, model, args.device)
    lengths = [int(n) for n in args.lengths.split(",")]
    batch = packed(lengths, args.steps).to(args.device)
    found = differences(model, net, batch, loss)
    holds = max(found["loss_difference"], found["largest_gradient_difference"]) <= LIMIT
    print(
        json.dumps(
            {"holds": holds, "limit": LIMIT, "steps": args.steps, "lengths": lengths, **found}
        )
    )
    raise SystemExit(not holds)


if __name__ == "__main__":
    main()
