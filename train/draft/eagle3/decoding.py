"""Decode with EAGLE-3 and P-EAGLE: cached keys and values of the context's rows, then the steps on
the draft's own tokens.

The row of a position needs the token after it, so the newest complete token's row waits for the
next one: with the anchor it is step 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.train.draft.attention import heads_first
from dspark.train.draft.decoding import Drafted
from dspark.train.draft.eagle3.attention import Pair
from dspark.train.draft.eagle3.model import Eagle3Model


class Eagle3Decoder:
    """The decoder of one sequence (``decoding.Decoder``)."""

    def __init__(self, model: Eagle3Model) -> None:
        self.model, self.length = model, 0
        self._keys: Tensor | None = None  # [length - 1, Hkv, D]
        self._values: Tensor | None = None
        self._newest: Tensor | None = None  # fused [1, H] of position length - 1

    @torch.inference_mode()
    def extend(self, aux: Tensor, ids: Tensor) -> None:
        model = self.model
        fused, ids = model.fused(aux.to(model.device)), ids.to(model.device)
        if self._newest is None:
            hidden, following, start = fused[:-1], ids[1:], 0
        else:
            hidden, following, start = torch.cat([self._newest, fused[:-1]]), ids, self.length - 1
        rows = model.midlayer.rows(model.embedded(following), hidden)
        position = torch.arange(start, start + rows.shape[0], device=model.device)
        keys, values = model.midlayer.self_attn.keys_values(rows, model.ropes(position))
        if self._keys is not None and self._values is not None:
            keys, values = torch.cat([self._keys, keys]), torch.cat([self._values, values])
        self._keys, self._values, self._newest = keys, values, fused[-1:]
        self.length += ids.shape[0]

    @torch.inference_mode()
    def draft(
        self, anchor_id: int, *, temperature: float = 0.0, generator: torch.Generator | None = None
    ) -> Drafted:
        model, probs, tokens = self.model, list[Tensor](), list[Tensor]()
        newest = self._newest
        assert newest is not None
        ids = model.frozen_head.draft_ids

        def pick(h: Tensor) -> Tensor:
            logits = model.slot_logits(h)
            if temperature == 0:
                return logits.argmax(-1)
            p = torch.softmax(logits / temperature, -1)
            spread = (
                p if ids is None else p.new_zeros(1, model.config.vocab_size).index_copy(1, ids, p)
            )
            probs.append(spread[0])
            return torch.multinomial(p, 1, generator=generator)[:, 0]

        def token(step: int, before: Tensor | None) -> Tensor:
            if before is None:
                return torch.tensor([anchor_id], device=model.device)
            tokens.append(model.target_ids(pick(before)))
            return tokens[-1]

        at = torch.arange(model.config.block_size, device=model.device) + self.length - 1
        if model.parallel:
            first = torch.tensor([anchor_id], device=model.device)
            h = model.at_once(newest, first, model.ropes(at), self._over)
            for step in range(h.shape[1]):
                tokens.append(model.target_ids(pick(h[:, step])))
        else:
            ropes = tuple(model.ropes(p[None]) for p in at)
            h = model.unrolled(newest, token, ropes, self._over)
            tokens.append(model.target_ids(pick(h[:, -1])))
        return Drafted(torch.cat(tokens), torch.stack(probs) if probs else None)

    def _over(self, q: Tensor, own: Sequence[Pair]) -> Tensor:
        """Attention over the context and ``own`` keys: of the newest query, or of all, causally."""
        assert self._keys is not None
        assert self._values is not None
        keys = torch.cat([self._keys, *(pair[0] for pair in own)])
        values = torch.cat([self._values, *(pair[1] for pair in own)])
        sees = torch.ones(len(q), len(keys), dtype=torch.bool, device=q.device)
        sees = sees.tril(len(keys) - len(q))
        query, k, v = (heads_first(x) for x in (q, keys, values))
        gqa = query.shape[1] != k.shape[1]
        seen = F.scaled_dot_product_attention(query, k, v, attn_mask=sees, enable_gqa=gqa)
        return seen[0].transpose(0, 1)
