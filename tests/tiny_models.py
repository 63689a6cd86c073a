"""Tiny random targets and drafts, for tests of decoding and serving; weights so large that argmaxes
vary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dspark.tools.decode.target import DecodingTarget
from dspark.train.draft.config import DraftConfig
from dspark.train.draft.model import DraftModel
from dspark.train.draft.types import drafter

VOCAB, HIDDEN, LAYERS, MASK = 160, 32, (0, 2), 159


def target(kind: str = "qwen3", seed: int = 0, **changes: Any) -> Any:
    """A random causal LM of 4 layers in fp32; ``kind`` qwen3 (untied head) or llama (tied)."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": kind == "llama",
    }
    config, model = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[kind]
    torch.manual_seed(seed)
    return model(config(**(sizes | changes))).float().eval()


def draft(model: Any, seed: int = 1, draft_ids: Tensor | None = None, **changes: Any) -> DraftModel:
    """A random draft for ``model``, 2 layers, block size 4, fp32, DSpark unless ``changes`` say
    otherwise.
    """
    settings: dict[str, Any] = {
        "target_layer_ids": LAYERS,
        "mask_token_id": MASK,
        "num_layers": 2,
        "block_size": 4,
        "markov_rank": 8,
    }
    if draft_ids is not None:
        settings["draft_vocab_size"] = len(draft_ids)
    config = DraftConfig.sized_for(model.config.to_dict(), **(settings | changes))
    torch.manual_seed(seed)
    kind = drafter(config.speculator_type)
    out = kind.network(config, DecodingTarget(model, config.target_layer_ids).frozen, draft_ids)
    with torch.no_grad():
        for _, parameter in out.trained():
            if parameter.ndim == 2:
                parameter.normal_(std=0.15)
    return out.float().eval()


def states(model: Any, ids: list[int], layers: tuple[int, ...] = LAYERS) -> Tensor:
    """Aux states [S, L, H] of ``ids`` in one forward without a cache, from
    ``output_hidden_states``.
    """
    with torch.inference_mode():
        hidden = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    return torch.stack([hidden[i + 1][0] for i in layers], dim=1)


def agree(model: Any, draft_model: DraftModel, answers: list[list[int]], steps: int = 120) -> None:
    """Train ``draft_model`` in place to repeat ``answers`` of ``model`` (prompt and answer as ids),
    so that some drafts are accepted.

    Plain CE of every block of every sequence, through the trainer's forward: the few lines a test
    can check by eye.
    """
    import numpy as np

    from dspark.train.data.batch import Batch

    size = draft_model.config.block_size
    batches = []
    for ids in answers:
        count = len(ids)
        batches.append(
            Batch.build(
                input_ids=np.array(ids, dtype=np.int64),
                loss_mask=np.ones(count, dtype=bool),
                doc=np.zeros(count, dtype=np.int32),
                aux=states(model, ids, draft_model.config.target_layer_ids).clone(),
                last=torch.zeros(count - 1, HIDDEN),
                anchors=np.arange(1, count - 1),
                block_size=size,
            )
        )
    parameters = [p for _, p in draft_model.trained()]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.0)
    head = draft_model.frozen_head
    for _ in range(steps):
        loss = torch.zeros(())
        for batch in batches:
            out = draft_model(batch, draft_model.plan(batch))
            logits = out.h @ head.draft_head.T
            if out.z is not None and out.w2 is not None:
                logits = logits + out.z @ out.w2.T
            labels = batch.label_ids if head.to_draft is None else head.to_draft[batch.label_ids]
            use = batch.counted & (labels >= 0)
            loss = loss + torch.nn.functional.cross_entropy(logits[use], labels[use])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
