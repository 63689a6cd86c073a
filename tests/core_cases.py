"""Small rows, targets and drafts that the tests of the maths core share. All on the CPU, all
tiny.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dspark.cache.target.logits import PLAIN, Logits
from dspark.train.data import anchors as rules
from dspark.train.data.batch import Batch
from dspark.train.draft.config import DraftConfig
from dspark.train.draft.model import DraftModel

HIDDEN, VOCAB, BLOCK = 32, 50, 4


@dataclass
class Target:
    embed_tokens: Tensor
    lm_head: Tensor
    logits: Logits = PLAIN


def small_target(*, tied: bool = False, seed: int = 0) -> Target:
    g = torch.Generator().manual_seed(seed)
    embed = torch.randn(VOCAB, HIDDEN, generator=g)
    head = embed if tied else torch.randn(VOCAB, HIDDEN, generator=g) * 0.5
    return Target(embed, head)


def small_config(**changes: Any) -> DraftConfig:
    given: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCAB,
        "draft_vocab_size": VOCAB,
        "mask_token_id": VOCAB - 1,
        "target_layer_ids": (0, 2),
        "num_target_layers": 4,
        "block_size": BLOCK,
        "markov_rank": 6,
        "rope_theta": 10000.0,
    }
    return DraftConfig(**(given | changes))


def small_draft(
    seed: int = 1, draft_ids: Tensor | None = None, *, tied: bool = False, **changes: Any
) -> DraftModel:
    """A draft none of whose parameters is at its initial value (a zero bias would hide a missing
    term).
    """
    torch.manual_seed(seed)
    if draft_ids is not None:
        changes["draft_vocab_size"] = draft_ids.numel()
    model = DraftModel(small_config(**changes), small_target(tied=tied), draft_ids)
    with torch.no_grad():
        for _, parameter in model.trained():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def small_batch(
    seed: int = 2, lengths: tuple[int, ...] = (13, 11), padding: int = 3, max_anchors: int = 0
) -> Batch:
    """Documents of ``lengths``, then padding; about one token in ten unsupervised; two padding
    anchors.
    """
    rng = np.random.default_rng(seed)
    doc = np.repeat(np.array([*range(len(lengths)), -1], dtype=np.int32), [*lengths, padding])
    mask = (rng.random(doc.size) < 0.9) & (doc >= 0)
    can = rules.eligible(mask, doc)
    at = rules.choose(can, rng.random(doc.size), max_anchors)
    g = torch.Generator().manual_seed(seed)
    return Batch.build(
        input_ids=rng.integers(0, VOCAB, doc.size),
        loss_mask=mask,
        doc=doc,
        aux=torch.randn(doc.size, 2, HIDDEN, generator=g),
        last=torch.randn(int(can.sum()), HIDDEN, generator=g),
        anchors=at,
        block_size=BLOCK,
        pad_anchors_to=at.size + 2,
    )
