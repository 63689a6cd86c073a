"""What a variant of bench/learn.py changes, and the weights of blocks that it tries.

A variant is KEY=VALUE pairs; what is not said is the recipe's:

lr, schedule, fall        of the optimizer; ``fall``: the share of the steps in which wsd falls
heads                     factor of the rate of what AdamW updates: Markov factors, norms,
                          confidence head
ce, l1, kl, confidence    weights of the terms
decay                     slot k weighs exp(-k / decay)
thin                      1: slot k is computed with probability exp(-k / decay) and weighs 1
                          instead: the same gradient on average for half of the products
anchors                   of a row; 0: all that were drawn
block, mix, alpha         weights of whole blocks: ``failure``: that the token before was refused,
                          by the acceptances of the present draft, ``exact`` (the objective once
                          more) or as its ``confidence`` head tells; ``mix``: their share, the rest
                          is uniform
init                      ``markov``: W1 begins as the principal parts of the target's embedding;
                          ``layers``: the draft's layers begin as the target's, evenly spread
steps                     instead of as many as fit into the time
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dspark.train.data.batch import Batch
from dspark.train.draft.config import DraftConfig
from dspark.train.objective.config import ObjectiveConfig
from dspark.train.objective.objective import objective
from dspark.train.objective.slots import Denominators, SlotInputs, slot_weights
from dspark.train.objective.states import FrozenHead, SlotStates
from dspark.train.optim.base import WSD_DECAY
from dspark.train.run.setup import Run

# Judged one by one, with one seed; those that pay are joined (``joined``).
CANDIDATES = {
    "kl-0.3": "ce=0.1 kl=0.3 l1=0.6",
    "kl-0.6": "ce=0.1 kl=0.6 l1=0.3",
    "kl-1": "ce=0 kl=1 l1=0",
    "ce-kl": "ce=0.3 kl=0.6 l1=0.1",
    "decay-3": "decay=3",
    "fall-0.4": "fall=0.4",
    "heads-3": "heads=3",
}
# By name only.
MORE = {
    "ce-0.3": "ce=0.3 l1=0.7 kl=0",
    "anchors-1024": "anchors=1024",
    "thin": "thin=1",
    "layers-init": "init=layers",
    "failure": "block=failure mix=0.5 alpha=confidence",
    "decay-8": "decay=8",
    "confidence-0.1": "confidence=0.1",
    "anchors-512": "anchors=512",
    "markov-init": "init=markov",
    "lr-3e-3": "lr=3e-3",
    # needs --train with as many and --base anchors=2048
    "anchors-4096": "anchors=4096",
}
# The published losses, with the schedule that was the default at first, and with the present one.
PUBLISHED = "ce=0.1 l1=0.9 kl=0"
ALWAYS = {"cosine": f"schedule=cosine {PUBLISHED}", "wsd": f"schedule=wsd {PUBLISHED}"}
TOGETHER = (("ce", "l1", "kl"), ("block", "mix", "alpha"))  # keys that are one change


@dataclass(frozen=True)
class Variant:
    name: str
    lr: float
    schedule: str
    ce: float
    l1: float
    kl: float
    confidence: float
    decay: float
    heads: float = 1.0
    fall: float = WSD_DECAY
    block: str = "none"
    mix: float = 1.0
    alpha: str = "exact"
    anchors: int = 0
    thin: int = 0
    init: str = "none"
    steps: int = 0

    @classmethod
    def parse(cls, name: str, text: str, run: Run) -> Variant:
        """From KEY=VALUE pairs; what is not said is the run's."""
        c, o = run.config, run.objective
        given: dict[str, Any] = {
            "lr": c.lr,
            "schedule": c.lr_schedule,
            "decay": c.decay,
            **{key: getattr(o, key) for key in ("ce", "l1", "kl", "confidence")},
        }
        kinds = {f.name: f.type for f in dataclasses.fields(cls) if f.name != "name"}
        makes = {"float": float, "int": int, "str": str}
        for key, value in pairs(text).items():
            if key not in kinds:
                raise SystemExit(f"{name}: {key} is not one of {', '.join(kinds)}")
            given[key] = makes[str(kinds[key])](value)
        return cls(name, **given)

    def objective(self, run: Run) -> ObjectiveConfig:
        """The run's, with the weights of this variant."""
        own = {key: getattr(self, key) for key in ("ce", "l1", "kl", "confidence")}
        return dataclasses.replace(run.objective, **own)

    @property
    def slot_decay(self) -> float:
        """Of the weights that slots still have: thinned out they weigh the same."""
        return 0.0 if self.thin else self.decay

    @property
    def shape(self) -> tuple[Any, ...]:
        """What decides how long a step takes."""
        return (self.anchors, self.thin and self.decay, self.block, self.alpha, self.kl > 0)


def pairs(text: str) -> dict[str, str]:
    """KEY=VALUE pairs."""
    return dict(pair.split("=", 1) for pair in text.split())


def joined(settings: list[str]) -> str:
    """All ``settings`` as one; where two change the same, the earlier one counts."""
    out: dict[str, str] = {}
    for text in settings:
        new = pairs(text)
        wide = {k for key in new for k in next((g for g in TOGETHER if key in g), (key,))}
        if not wide & out.keys():
            out |= new
    return " ".join(f"{k}={v}" for k, v in out.items())


def after_failure(alpha: Tensor, batch: Batch) -> Tensor:
    """[A]: mean of 1 - alpha over the slots that predict the anchor's own token; the mean of all
    where none does.
    """
    length = batch.input_ids.shape[0]
    counted = batch.counted.to(alpha.dtype).flatten()
    label = batch.label_index.flatten()
    count = alpha.new_zeros(length).index_add(0, label, counted)
    wrong = alpha.new_zeros(length).index_add(0, label, counted * (1 - alpha.flatten()))
    mean = wrong.sum() / count.sum().clamp(min=1)
    return torch.where(count > 0, wrong / count.clamp(min=1), mean)[batch.anchors]


@torch.no_grad()
def weights_of(
    v: Variant, head: FrozenHead, batch: Batch, states: SlotStates, slots: SlotInputs
) -> Tensor | None:
    """Weights [N] of the token losses, with the sum of the usual ones; None for the usual ones."""
    if v.block == "none":
        return None
    assert v.block == "failure", f"block={v.block}"
    if v.alpha == "confidence":
        assert states.confidence is not None
        alpha = states.confidence.sigmoid().float() * batch.counted
    else:
        found = objective(slots, head, ObjectiveConfig(), Denominators(1.0, 1.0, 1.0))
        alpha = batch.in_blocks(found.accept.float())
    blocks, valid = after_failure(alpha, batch), batch.anchor_valid.float()
    mean = (blocks * valid).sum() / valid.sum().clamp(min=1)
    factor = 1 - v.mix + v.mix * blocks / mean.clamp(min=1e-9)
    weights = slots.weight * factor[batch.slots // batch.block_size]
    return weights * (slots.weight.sum() / weights.sum().clamp(min=1e-9))


def chances(v: Variant, size: int) -> Tensor:
    """Probability that slot k is computed, [B]."""
    return slot_weights(size, v.decay) if v.thin else torch.ones(size)


# Weights to begin with


def principal(embed: Tensor, rank: int, std: float) -> Tensor:
    """The ``rank`` directions of ``embed`` [V, H] that vary most, as [V, rank] of deviation
    ``std``. Fewer than ``rank`` dimensions leave zeros.
    """
    wide = embed.double() - embed.double().mean(0)
    _, vectors = torch.linalg.eigh(wide.T @ wide)
    out = (wide @ vectors.flip(1)[:, :rank]).float()
    out = torch.nn.functional.pad(out, (0, rank - out.shape[1]))
    return out * (std / out.std())


def of_layers(
    config: DraftConfig, theirs: dict[str, Tensor], count: int, masters: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What of ``masters`` begins as in the target, which has ``count`` layers: the draft's layers
    as layers of it, evenly spread, ``fc`` as a choice of the deepest state that the draft reads.

    The target norms no queries and keys: the draft's norms get the size that these have there for
    inputs of unit size.
    """
    out, size = dict[str, Tensor](), config.hidden_size
    at = [round(i * (count - 1) / max(1, config.num_layers - 1)) for i in range(config.num_layers)]
    for mine, layer in enumerate(at):
        here, there = f"layers.{mine}.", f"model.layers.{layer}."
        for name in masters:
            if (
                name.startswith(here)
                and (found := theirs.get(there + name[len(here) :])) is not None
            ):
                out[name] = found.float().clone()
        before = theirs[f"{there}input_layernorm.weight"].float()
        for kind in ("q", "k"):
            norm, product = f"{here}self_attn.{kind}_norm.weight", f"self_attn.{kind}_proj.weight"
            if norm not in out:
                seen = theirs[there + product].float() * before
                out[norm] = torch.full_like(
                    masters[norm], float(seen.square().sum(1).mean().sqrt())
                )
    fc = torch.zeros_like(masters["fc.weight"])
    fc[:, -size:] = torch.eye(size)
    out["fc.weight"] = fc
    out["hidden_norm.weight"] = theirs[f"model.layers.{count - 1}.input_layernorm.weight"].float()
    return out
