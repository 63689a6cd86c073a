"""Draft one block: cached keys and values of the context, the backbone's slots, the Markov chain.

Legend: n new context tokens, a context length = position of the anchor, L aux layers, H hidden
size, B slots, Hq/Hkv heads, D head size, V/Vd target and draft vocabulary.

When the anchor x[a] is known, the target has run on tokens 0..a-1 only, so exactly their states are
context; slot 0 embeds the anchor itself and predicts x[a+1]. Slot k's Markov token is the one
drafted at k-1; slot 0's is the anchor. vLLM serves ``method: dspark`` the same way
(``DSparkSpeculator``); tests compare the two.

``recomputed_states`` is the training forward pass over the whole context, and the reference for
``slot_states``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.train.draft.attention import dense_mask
from dspark.train.draft.layers import Attention, Layer
from dspark.train.draft.model import DraftModel
from dspark.train.draft.sight import Sight
from dspark.train.ops.rope import Rope, rope_tables


@dataclass(frozen=True, slots=True)
class Drafted:
    """A block: target ids int64[B] and, if sampled, the distributions they were drawn from, fp32
    [B, V].
    """

    tokens: Tensor
    probs: Tensor | None


class Decoder(Protocol):
    """What decoding needs from a draft of any type: the context so far, and the next block."""

    @property
    def length(self) -> int:
        """The number of context tokens, which is the position of the next anchor."""

    def extend(self, aux: Tensor, ids: Tensor) -> None:
        """Add the next n accepted tokens ``ids`` int64[n] with the target's states ``aux`` [n, L,
        H].
        """

    def draft(
        self, anchor_id: int, *, temperature: float = 0.0, generator: torch.Generator | None = None
    ) -> Drafted:
        """Draft the tokens after ``anchor_id``, the token that follows the context."""


class DraftContext:
    """Keys and values of the context in every draft layer; grows as the target's states arrive,
    only with accepted tokens. A sliding layer keeps those that the next block can see: at most W-1.
    """

    def __init__(self, draft: DraftModel) -> None:
        self.draft = draft
        self.length = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    @torch.inference_mode()
    def extend(self, aux: Tensor) -> None:
        """Add the states ``aux`` [n, L, H] of the next n tokens."""
        draft = self.draft
        ctx = draft.context(aux.to(draft.fc.weight.device))
        position = torch.arange(self.length, self.length + aux.shape[0], device=ctx.device)
        tables = rope_tables(position, draft.config.turning, ctx.dtype)
        nothing = tables[0][:0], tables[1][:0]
        for i, (layer, sight) in enumerate(zip(_layers(draft), draft.config.sights, strict=True)):
            _, keys, values = layer.self_attn.queries_keys_values(ctx[:0], ctx, nothing, tables)
            if self.length == 0:
                self._keys.append(keys)
                self._values.append(values)
            else:
                self._keys[i] = torch.cat([self._keys[i], keys])
                self._values[i] = torch.cat([self._values[i], values])
            if sight.window is not None:
                unseen = max(0, self._keys[i].shape[0] - sight.window + 1)
                self._keys[i], self._values[i] = self._keys[i][unseen:], self._values[i][unseen:]
        self.length += aux.shape[0]

    def layer(self, i: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values [n, Hkv, D] of draft layer ``i`` for the last n tokens of the
        context: all, or those in the layer's window.
        """
        return self._keys[i], self._values[i]


class BlockDecoder:
    """The decoder of block drafts: the backbone over the cached context, then the Markov chain. It
    needs no ids of the context.
    """

    def __init__(self, draft: DraftModel) -> None:
        self.model, self.context = draft, DraftContext(draft)

    @property
    def length(self) -> int:
        return self.context.length

    def extend(self, aux: Tensor, ids: Tensor) -> None:
        self.context.extend(aux)

    def draft(
        self, anchor_id: int, *, temperature: float = 0.0, generator: torch.Generator | None = None
    ) -> Drafted:
        h = slot_states(self.model, self.context, anchor_id)
        return chain(self.model, h, anchor_id, temperature=temperature, generator=generator)


@torch.inference_mode()
def slot_states(draft: DraftModel, context: DraftContext, anchor_id: int) -> Tensor:
    """Return h [B, H] after the final norm, using the context's cached keys and values."""
    config = draft.config
    device = draft.fc.weight.device
    position = torch.arange(context.length, context.length + config.slots, device=device)
    anchor, valid = torch.tensor([anchor_id], device=device), torch.tensor([True], device=device)
    x = draft.block_input(anchor, valid)[0].to(draft.fc.weight.dtype)
    tables = rope_tables(position, config.turning, x.dtype)
    for i, (layer, sight) in enumerate(zip(_layers(draft), config.sights, strict=True)):
        attend = partial(
            _attend, layer.self_attn, rope=tables, context=context.layer(i), sight=sight
        )
        x = layer.around(x, attend)
    out: Tensor = draft.norm(x)[config.slots - config.block_size :]
    return out


@torch.inference_mode()
def recomputed_states(draft: DraftModel, aux: Tensor, anchor_id: int) -> Tensor:
    """Return the same h [B, H] from all the context's states ``aux`` [a, L, H] through the
    trainer's forward.
    """
    device = draft.fc.weight.device
    a = aux.shape[0]
    # The anchor's own row must exist for the trainer's indexing but must not be seen: NaN reveals
    # it if it is.
    row = torch.cat([aux, torch.full_like(aux[:1], torch.nan)]).to(device)
    anchors, valid = torch.tensor([a], device=device), torch.tensor([True], device=device)
    doc = torch.zeros(a + 1, dtype=torch.int32, device=device)
    attention = draft.attention_plans(doc, anchors, valid)
    ctx = draft.context(row)
    x = (
        draft.block_input(torch.tensor([anchor_id], device=device), valid)
        .to(ctx.dtype)
        .flatten(0, 1)
    )
    position = torch.arange(a + draft.config.slots, device=device)
    h = draft.backbone(x, ctx, draft.plan_of(attention, position[a:], position[: a + 1]))
    return h[draft.config.bonus_anchor :]


@torch.inference_mode()
def chain(
    draft: DraftModel,
    h: Tensor,
    anchor_id: int,
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Drafted:
    """Draft left to right through ``h`` [B, H]: each slot's logits plus the Markov bias of the
    token before it, one token at a time.
    """
    head, probs = draft.frozen_head, list[Tensor]()

    def pick(logits: Tensor) -> Tensor:
        if temperature == 0:
            return logits.argmax(-1)
        p = torch.softmax(logits / temperature, dim=-1)
        row = torch.multinomial(p, 1, generator=generator)[0]
        whole = draft.config.vocab_size
        probs.append(
            p if head.draft_ids is None else p.new_zeros(whole).scatter(0, head.draft_ids, p)
        )
        return row

    tokens = chained(draft, h, torch.tensor(anchor_id, device=h.device), pick)
    return Drafted(tokens, torch.stack(probs) if probs else None)


def chained(
    draft: DraftModel, h: Tensor, anchor_ids: Tensor, pick: Callable[[Tensor], Tensor]
) -> Tensor:
    """Draft blocks on their own tokens: target ids int64[..., B] from ``h`` [..., B, H] and
    ``anchor_ids`` int64[...].

    ``pick`` chooses a row of the draft's vocabulary int64[...] by the logits [..., Vd] of a slot.
    """
    base, markov = draft.slot_logits(h), draft.markov_head
    state = None if markov is None else markov.initial_state(h[..., 0, :])
    prev, tokens = anchor_ids, list[Tensor]()
    for k in range(h.shape[-2]):
        logits = base[..., k, :]
        if markov is not None:
            z, state = markov.step(h[..., k, :], markov.embed(prev), state)
            logits = logits + draft.markov_logits(z)
        prev = draft.target_ids(pick(logits))
        tokens.append(prev)
    return torch.stack(tokens, -1)


def _layers(draft: DraftModel) -> list[Layer]:
    return [layer for layer in draft.layers if isinstance(layer, Layer)]


def _attend(
    attention: Attention, x: Tensor, *, context: tuple[Tensor, Tensor], rope: Rope, sight: Sight
) -> Tensor:
    """Attention output [B, H] of a block ``x`` [B, H] over the ``context`` and itself. Seeing the
    whole context, and itself in both directions, needs no mask.
    """
    q, *own = attention.queries_keys_values(x, x[:0], rope, (rope[0][:0], rope[1][:0]))
    k, v = (torch.cat(pair).transpose(0, 1)[None] for pair in zip(context, own, strict=True))
    mask = None
    if sight != Sight():
        n = torch.tensor([context[0].shape[0]], device=x.device)
        mask = dense_mask(torch.zeros_like(n), n, int(n), x.shape[0], sight)
    seen = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]
    )
    out: Tensor = attention.o_proj(seen[0].transpose(0, 1).reshape(x.shape[0], -1))
    return out
