"""The network of EAGLE-3 and P-EAGLE (``drafter.py``), unrolled from anchors.

Legend: S tokens of the row, A anchors, B steps, H hidden size, Hq/Hkv heads, D head size, V/Vd
target and draft vocabulary.

``fused = fc(concat of 3 states)``. A row of hidden h and token id is ``[input_layernorm(emb(id)) |
hidden_norm(h)]`` [2 H]; attention (no norm of queries and keys) is added to h, the MLP to that, and
``norm`` of the sum goes to the output matrix. Step 0 of anchor a is the row of position a - 1: h is
fused there, the token x[a]. Step k has the token x[a + k] and the sum of step k - 1 as h (P-EAGLE:
the mask token and fc of a learned state), at position a - 1 + k. It attends to the rows of
positions before a - 1, which are made as step 0's, and to the anchor's own steps up to k.

EAGLE-3's steps follow one another. P-EAGLE's do not depend on each other's outputs: they are one
block of B tokens that sees itself causally, and its later rows, alike but for their positions, are
projected once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.train.data.batch import Batch
from dspark.train.draft.attention import (
    GROUP_TOKENS,
    AttentionPlan,
    Backend,
    block_attention,
)
from dspark.train.draft.config import DraftConfig
from dspark.train.draft.eagle3.attention import ANCHORS_AT_ONCE, Pair, StepAttention
from dspark.train.draft.layers import Mlp, RMSNorm
from dspark.train.draft.model import DraftModel, TargetWeights, check_target
from dspark.train.draft.sight import Sight
from dspark.train.objective.states import SlotStates
from dspark.train.ops.joined import lay_side_by_side
from dspark.train.ops.rope import Rope, rope_tables, rotate


@dataclass(frozen=True, slots=True)
class Eagle3Plan:
    """The plan of one row: who sees whom, ``first`` bool[A] whether an anchor has a row of its own
    (is not the first token of a document), cos and sin of the row's positions and of each step's;
    those of P-EAGLE's steps are one table for all [A B].
    """

    attention: AttentionPlan
    first: Tensor
    row_rope: Rope
    step_ropes: tuple[Rope, ...]


# Of queries [n, Hq, D], with keys and values [n, Hkv, D] of their own: what they see, [n, Hq, D].
Attend = Callable[[Tensor, Sequence[Pair]], Tensor]


class Projections(nn.Module):
    """Llama's attention weights on rows of 2 H."""

    def __init__(self, c: DraftConfig) -> None:
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(2 * c.hidden_size, c.num_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(2 * c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(2 * c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """[n, heads D] -> [n, heads, D]."""
        return x.reshape(x.shape[0], x.shape[1] // self.head_dim, self.head_dim)

    def projected(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [n, heads D] of rows [n, 2 H], not rotated."""
        return self.q_proj(rows), self.k_proj(rows), self.v_proj(rows)

    def queries(self, rows: Tensor, rope: Rope) -> Tensor:
        """[n, Hq, D] of rows [n, 2 H]."""
        return rotate(self.heads(self.q_proj(rows)), rope)

    def keys_values(self, rows: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """[n, Hkv, D] each, of rows [n, 2 H]."""
        return rotate(self.heads(self.k_proj(rows)), rope), self.heads(self.v_proj(rows))


class MidLayer(nn.Module):
    def __init__(self, c: DraftConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.hidden_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Projections(c)
        self.mlp = Mlp(c.hidden_size, c.intermediate_size)

    def rows(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """Return rows [n, 2 H] of embeddings and hidden states [n, H]."""
        return torch.cat([self.input_layernorm(embedded), self.hidden_norm(hidden)], -1)

    def after(self, hidden: Tensor, seen: Tensor) -> Tensor:
        """Return the layer's output [n, H] from the attention output [n, Hq, D]."""
        x = hidden + self.self_attn.o_proj(seen.flatten(1))
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Eagle3Model(DraftModel):
    """A draft for ``target``; parameter names are those of the served checkpoint. ``parallel``:
    P-EAGLE.
    """

    def __init__(
        self,
        config: DraftConfig,
        target: TargetWeights,
        draft_ids: Tensor | None = None,
        *,
        frozen_dtype: torch.dtype | None = None,
        parallel: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.config = config
        check_target(config, target, draft_ids)
        size = config.hidden_size
        self.fc = nn.Linear(len(config.target_layer_ids) * size, size, bias=False)
        self.midlayer = MidLayer(config)
        self.norm = RMSNorm(size, config.rms_norm_eps)
        # what joins or checkpoints the layers of other types finds none
        self.layers = nn.ModuleList()
        self.markov_head = self.confidence_head = None
        self.mask_hidden = nn.Parameter(torch.zeros(1, self.fc.in_features)) if parallel else None
        self._initialise()
        if self.mask_hidden is not None:
            nn.init.normal_(self.mask_hidden, std=config.initializer_range)
        self._adopt(target, draft_ids, frozen_dtype)
        self.join()

    def join(self) -> None:
        lay_side_by_side(self.midlayer.mlp.joined)

    def embedded(self, ids: Tensor) -> Tensor:
        weight = self.embed_tokens.weight
        assert isinstance(weight, Tensor)
        return F.embedding(ids, weight).to(self.fc.weight.dtype)

    def fused(self, aux: Tensor) -> Tensor:
        """Fuse the target's states [n, 3, H] to [n, H]."""
        out: Tensor = self.fc(aux.flatten(1).to(self.fc.weight.dtype))
        return out

    def ropes(self, position: Tensor) -> Rope:
        return rope_tables(position, self.config.turning, self.fc.weight.dtype)

    @property
    def parallel(self) -> bool:
        """Whether all steps are made at once: P-EAGLE."""
        return self.mask_hidden is not None

    @property
    def mask_tables(self) -> None:
        """Nothing: ``plan`` is its own."""

    def plan(self, batch: Batch, backend: Backend = "sdpa") -> Eagle3Plan:  # type: ignore[override]
        steps = self.config.block_size
        size, tokens = (steps, GROUP_TOKENS) if self.parallel else (1, ANCHORS_AT_ONCE)
        attention = AttentionPlan.build(
            batch.doc,
            batch.anchors,
            batch.anchor_valid,
            size,
            backend,
            Sight(causal=self.parallel),
            before=1,  # the row before an anchor is the anchor's own first
            group_tokens=tokens,
        )
        where = batch.position[batch.anchors]
        later = torch.arange(steps, device=where.device)
        if self.parallel:
            tables = [self.ropes((where[:, None] - 1 + later).clamp(min=0).flatten())]
        else:
            cos, sin = self.ropes((where - 1 + later[:, None]).clamp(min=0).flatten())
            tables = list(zip(cos.chunk(steps), sin.chunk(steps), strict=True))
        return Eagle3Plan(attention, where > 0, self.ropes(batch.position), tuple(tables))

    def forward(self, batch: Batch, plan: Eagle3Plan) -> SlotStates:  # type: ignore[override]
        """Return h [A, B, H] after the norm, with every step on the data's tokens."""
        layer, fused = self.midlayer, self.fused(batch.aux)
        following = torch.cat([batch.input_ids[1:], batch.input_ids[:1]])
        rows = layer.rows(self.embedded(following), fused)
        context = layer.self_attn.keys_values(rows, plan.row_rope)
        before = fused[(batch.anchors - 1).clamp(min=0)]
        # nothing comes before a document's first token
        hidden = torch.where(plan.first[:, None], before, 0)
        if self.parallel:

            def attend_all(q: Tensor, own: Sequence[Pair]) -> Tensor:
                keys, values = (torch.cat(pair) for pair in zip(context, own[0], strict=True))
                return block_attention(q, keys, values, plan.attention)

            first = batch.input_ids[batch.anchors]
            h = self.at_once(hidden, first, plan.step_ropes[0], attend_all)
        else:
            ids, attend = batch.prev_ids, StepAttention(context, plan.attention)
            h = self.unrolled(hidden, lambda k, _: ids[:, k], plan.step_ropes, attend)
        return SlotStates(h, None, None, None)

    def at_once(self, hidden: Tensor, first: Tensor, rope: Rope, attend: Attend) -> Tensor:
        """P-EAGLE's h [A, B, H] after the norm, of anchors with ``hidden`` [A, H] and tokens
        ``first`` int64[A]; ``rope`` of all [A B] rows.
        """
        assert self.mask_hidden is not None
        layer, later = self.midlayer, self.config.block_size - 1
        masked = self.fc(self.mask_hidden)  # [1, H]
        ids = torch.cat([first, first.new_full((1,), self.config.mask_token_id)])
        rows = layer.rows(self.embedded(ids), torch.cat([hidden, masked]))

        def spread(x: Tensor) -> Tensor:
            """[A + 1, n] -> [A B, n]: each anchor's own row, then the last one again and again."""
            alike = x[-1:, None].expand(x.shape[0] - 1, later, -1)
            return torch.cat([x[:-1, None], alike], 1).flatten(0, 1)

        q, keys, values = layer.self_attn.projected(rows)
        q, keys, values = (layer.self_attn.heads(spread(x)) for x in (q, keys, values))
        seen = attend(rotate(q, rope), [(rotate(keys, rope), values)])
        out = layer.after(spread(torch.cat([hidden, masked])), seen)
        normed: Tensor = self.norm(out).unflatten(0, (-1, later + 1))
        return normed

    def unrolled(
        self,
        hidden: Tensor,
        token: Callable[[int, Tensor | None], Tensor],
        ropes: tuple[Rope, ...],
        attend: Attend,
    ) -> Tensor:
        """Return EAGLE-3's h [A, B, H] after the norm, from step 0's ``hidden`` [A, H].
        ``token(k, h)``: ids int64[A] of step k, h [A, H] the previous step's result. ``attend``
        gets the keys and values of the steps so far, in their order.
        """
        layer = self.midlayer
        out: list[Tensor] = []
        own: list[Pair] = []
        for k, rope in enumerate(ropes):
            rows = layer.rows(self.embedded(token(k, out[-1] if out else None)), hidden)
            own.append(layer.self_attn.keys_values(rows, rope))
            hidden = layer.after(hidden, attend(layer.self_attn.queries(rows, rope), own))
            out.append(self.norm(hidden))
        return torch.stack(out, 1)
