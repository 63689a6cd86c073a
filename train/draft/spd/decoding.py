"""One token at a time from an SPD head, while up to n tokens are in flight through the target's
stages.

Complete tokens (all stages passed, so verified) are in a cache of keys and values of the deepest
feature, layer by layer; the n - 1 rows nearest to the query are recomputed at every step, each at
the depth, and with the map, of its current distance. So a row is renewed as it moves back, also
after a rejection, and drafts equal those of the training forward pass at every position.

Legend: n stages, T taps, H hidden size, f tokens in flight (1..n), Hkv/D heads, V target
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.train.draft.decoding import Drafted
from dspark.train.draft.layers import Layer
from dspark.train.draft.spd.head import SpdHead
from dspark.train.ops.rope import rope_tables


class SpdDecoder:
    """The decoder of one sequence. ``draft`` returns a block of one token; ``behind`` is what a
    pipeline calls.
    """

    def __init__(self, head: SpdHead) -> None:
        self.head = head
        self.length = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        # g_n of the last n - 1 complete tokens
        self._deep = torch.empty(0, head.config.hidden_size)

    @torch.inference_mode()
    def extend(self, aux: Tensor, ids: Tensor) -> None:
        """Add complete tokens ``ids`` int64[m] with the target's states ``aux`` [m, T, H] of
        them.
        """
        head, new = self.head, ids.shape[0]
        aux, ids = aux.to(head.device), ids.to(head.device)
        deep = head.feature(head.stages, head.embedded(ids), aux)
        self._deep = torch.cat([self._deep.to(deep), deep])[-(head.stages - 1) :]
        at = torch.arange(self.length, self.length + new, device=head.device)
        for i, layer in enumerate(head.layers):
            deep = head.mapped(i, head.stages, deep)
            keys, values = _keys_values(head, layer, deep, at)
            if self.length:
                keys = torch.cat([self._keys[i], keys])
                values = torch.cat([self._values[i], values])
                self._keys[i], self._values[i] = keys, values
            else:
                self._keys.append(keys)
                self._values.append(values)
        self.length += new

    def draft(
        self, anchor_id: int, *, temperature: float = 0.0, generator: torch.Generator | None = None
    ) -> Drafted:
        aux = torch.zeros(1, len(self.head.config.target_layer_ids), self.head.config.hidden_size)
        return self.behind([anchor_id], aux, temperature=temperature, generator=generator)

    @torch.inference_mode()
    def behind(
        self,
        flight: Sequence[int],
        aux: Tensor,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Drafted:
        """Draft the token after the newest of ``flight`` (f ids, oldest first, at depths f-1..0),
        one token. ``aux`` [f, T, H]: their states, of which only those that their depths allow are
        read.
        """
        logits = self.logits(flight, aux)
        ids = self.head.frozen_head.draft_ids
        if temperature == 0:
            return Drafted(self.head.target_ids(logits.argmax(-1, keepdim=True)), None)
        p = torch.softmax(logits / temperature, -1)
        row = torch.multinomial(p, 1, generator=generator)
        spread = p if ids is None else p.new_zeros(self.head.config.vocab_size).scatter(0, ids, p)
        return Drafted(self.head.target_ids(row), spread[None])

    @torch.inference_mode()
    def logits(self, flight: Sequence[int], aux: Tensor) -> Tensor:
        """Return the logits, fp32 [Vd], of the token after the newest in flight."""
        head, f, n = self.head, len(flight), self.head.stages
        assert 1 <= f <= n, f"{f} tokens in flight of {n} stages"
        device = head.device
        embedded, aux = head.embedded(torch.tensor(flight, device=device)), aux.to(device)
        newest = self.length + f - 1
        nearest = min(n - 1, newest)  # tokens before the start do not exist
        rows = [
            head.feature(k, embedded[-1 - k], aux[-1 - k]) if k < f else self._deep[f - 1 - k]
            for k in range(1, nearest + 1)
        ]
        near = torch.stack(rows) if rows else embedded[:0]
        at = newest - torch.arange(1, nearest + 1, device=device)
        x = head.feature(0, embedded[-1:], aux[-1:])
        complete = max(newest - n + 1, 0)
        for i, layer in enumerate(head.layers):
            assert isinstance(layer, Layer)
            if rows:
                near = torch.stack([head.mapped(i, k + 1, near[k]) for k in range(nearest)])
            past = self._keys[i][:complete], self._values[i][:complete]
            x = _layer(head, layer, x, near, at, past, newest)
        return head.slot_logits(head.normed(x))[0]


def _keys_values(head: SpdHead, layer: object, rows: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [m, Hkv, D] of memory rows [m, H] at positions int64[m]."""
    assert isinstance(layer, Layer)
    c = head.config
    tables = rope_tables(at, c.turning, rows.dtype)
    nothing = tables[0][:0], tables[1][:0]
    normed = layer.input_layernorm(rows)
    _, keys, values = layer.self_attn.queries_keys_values(normed[:0], normed, nothing, tables)
    return keys, values


def _layer(
    head: SpdHead,
    layer: Layer,
    x: Tensor,
    near: Tensor,
    at: Tensor,
    past: tuple[Tensor, Tensor],
    position: int,
) -> Tensor:
    """One layer for the query ``x`` [1, H] at ``position``, over cached keys and values, the near
    rows and itself.
    """
    c = head.config
    memory_rope = rope_tables(at, c.turning, x.dtype)
    query_rope = rope_tables(torch.tensor([position], device=x.device), c.turning, x.dtype)

    def attend(normed: Tensor) -> Tensor:
        q, keys, values = layer.self_attn.queries_keys_values(
            normed, layer.input_layernorm(near), query_rope, memory_rope
        )
        k, v = (
            torch.cat(pair).transpose(0, 1)[None] for pair in zip(past, (keys, values), strict=True)
        )
        seen = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k, v, enable_gqa=q.shape[1] != keys.shape[1]
        )
        out: Tensor = layer.self_attn.o_proj(seen[0].transpose(0, 1).flatten(1))
        return out

    return layer.around(x, attend)
