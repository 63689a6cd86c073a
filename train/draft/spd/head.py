"""The network of an SPD head (``drafter.py``): one query per token, keys and values of tokens at
the depths that the pipeline has brought them to.

Legend: n stages, T taps, S tokens of the row, A anchors, H hidden size, Hq/Hkv heads, D head size,
Vd draft vocabulary, k distance from the query's token, "depth" stages that a token has passed.

Features of a token: ``g_0 = g0_proj(emb)``, ``g_k = stage_projs[n - k]([emb, taps up to the end of
stage k])``. The query of anchor t is g_0 of x_t; its keys are g_0 of t itself, g_k of t - k for k =
1..n-1, and g_n of everything at t - n and before. With ``fill`` tokens in flight, fewer than n
after a start or a rejection, tokens at distance ``fill`` or more are complete and use g_n. Tokens
before the document's start do not exist. In every layer, memory rows pass through a map for their
distance (cumulatively); nothing else changes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.train.data.batch import Batch
from dspark.train.draft.attention import Backend
from dspark.train.draft.config import DraftConfig
from dspark.train.draft.layers import Layer, RMSNorm
from dspark.train.draft.model import DraftModel, TargetWeights, check_target
from dspark.train.draft.spd.drafter import taps_at
from dspark.train.objective.states import FrozenHead, SlotStates
from dspark.train.ops.rope import Rope, rope_tables

QUERIES_AT_ONCE = 256  # maximum rows of a mask; more only costs memory


@dataclass(frozen=True, slots=True)
class SpdPlan:
    """The plan of one row: ``near`` int64[A, n-1] the tokens at distances 1..n-1, ``exists``
    bool[A, n-1] whether they do, ``complete`` bool[n-1] whether they have passed all stages,
    ``far`` bool[A, S] the tokens at distance n and more; cos and sin of queries and memory rows.
    """

    near: Tensor
    exists: Tensor
    complete: Tensor
    far: Tensor
    query_rope: Rope
    memory_rope: Rope


class SpdHead(DraftModel):
    """A head for ``target``, whose final norm it also uses. ``head`` is its own output matrix,
    which starts as the target's rows.
    """

    def __init__(
        self,
        config: DraftConfig,
        target: TargetWeights,
        draft_ids: Tensor | None = None,
        *,
        frozen_dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.config = config
        check_target(config, target, draft_ids)
        self.stages = len(config.stage_ends)
        size, far = config.hidden_size, self.stages
        self.stage_projs = nn.ModuleList(
            nn.Linear((1 + taps_at(config, depth)) * size, size, bias=False)
            for depth in range(far, 0, -1)
        )
        self.g0_proj = nn.Linear(size, size, bias=False)
        self.fixed_stage_per_layer_projs = nn.ModuleList(
            nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(far))
            for _ in range(config.num_layers)
        )
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.markov_head = self.confidence_head = None
        self._start()
        self._adopt(target, draft_ids, frozen_dtype)
        self.norm = RMSNorm(size, config.rms_norm_eps)
        self.norm.weight = nn.Parameter(target.norm.detach().clone(), requires_grad=False)
        own = self.lm_head.weight
        assert isinstance(own, Tensor)
        self.head = nn.Module()
        self.head.weight = nn.Parameter(own.detach().to(self.g0_proj.weight.dtype, copy=True))
        self.join()

    def _start(self) -> None:
        """Initialise: normal weights for layers and g0_proj, identity for the maps; stage_projs
        keep torch's defaults.
        """
        for module in (self.g0_proj, *self.layers.modules()):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
        for module in self.fixed_stage_per_layer_projs.modules():
            if isinstance(module, nn.Linear):
                nn.init.eye_(module.weight)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.named_parameters():
            if not name.startswith(("embed_tokens.", "lm_head.", "target_output.", "norm.")):
                yield name, parameter

    @property
    def frozen_head(self) -> FrozenHead:
        """Return, for the objective, the target's matrix and none of the draft's own columns, which
        come with the states as W2.
        """
        theirs, own = self.target_output_weight, self.head.weight
        assert isinstance(own, Tensor)
        none = own.detach()[:, :0]
        if not self.config.reduced_vocab:
            return FrozenHead(theirs, none, logits=self.target_logits)
        ids, inverse = self.draft_ids, self.to_draft
        assert isinstance(ids, Tensor)
        assert isinstance(inverse, Tensor)
        return FrozenHead(theirs, none, ids, inverse, self.target_logits)

    @property
    def target_output_weight(self) -> Tensor:
        module = self.target_output if self.config.reduced_vocab else self.lm_head
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight

    # Features

    def embedded(self, ids: Tensor) -> Tensor:
        """Return the target's embeddings [..., H] of int64[...], in the head's dtype."""
        weight = self.embed_tokens.weight
        assert isinstance(weight, Tensor)
        return F.embedding(ids, weight).to(self.g0_proj.weight.dtype)

    def feature(self, depth: int, embedded: Tensor, aux: Tensor) -> Tensor:
        """Return g of tokens at ``depth`` 0..n, [..., H], from embeddings [..., H] and taps [...,
        T, H], of which only the ones already passed are read.
        """
        out: Tensor
        if depth == 0:
            out = self.g0_proj(embedded)
            return out
        taps = aux[..., : taps_at(self.config, depth), :].to(embedded.dtype)
        out = self.stage_projs[self.stages - depth](
            torch.cat([embedded[..., None, :], taps], -2).flatten(-2)
        )
        return out

    def mapped(self, layer: int, distance: int, rows: Tensor) -> Tensor:
        """Return memory rows [..., H] at ``distance`` 1..n before layer ``layer``."""
        maps = self.fixed_stage_per_layer_projs[layer]
        assert isinstance(maps, nn.ModuleList)
        out: Tensor = maps[self.stages - distance](rows)
        return out

    # Training

    @property
    def mask_tables(self) -> None:
        """Nothing: ``plan`` is its own."""

    def plan(self, batch: Batch, backend: Backend = "sdpa", *, fill: int | None = None) -> SpdPlan:  # type: ignore[override]
        """Return the plan of a batch; ``fill`` None = drawn with the row's number: n with
        probability 1/2, else uniformly from 1..n-1.
        """
        n, device, t = self.stages, batch.anchors.device, batch.anchors
        distance = torch.arange(1, n, device=device)
        if fill is None:
            drawn = torch.where(batch.draw % 2 == 0, n, 1 + batch.draw // 2 % (n - 1))
        else:
            drawn = torch.full_like(batch.draw, fill)
        near = (t[:, None] - distance).clamp(min=0)
        at = torch.arange(batch.doc.shape[0], device=device)
        far = (batch.doc[None] == batch.doc[t][:, None]) & (at[None] <= t[:, None] - n)
        where = batch.position[t]
        # A token that does not exist is masked: its position only has to be a number.
        memory = torch.cat([batch.position, (where[:, None] - distance).clamp(min=0).flatten()])
        c, dtype = self.config, self.g0_proj.weight.dtype
        query_rope, memory_rope = (rope_tables(p, c.turning, dtype) for p in (where, memory))
        return SpdPlan(
            near, where[:, None] >= distance, distance >= drawn, far, query_rope, memory_rope
        )

    def forward(self, batch: Batch, plan: SpdPlan) -> SlotStates:  # type: ignore[override]
        """Run every anchor of one row: z [A, 1, H] after the final norm, w2 the head's output
        matrix, h without columns.
        """
        embedded = self.embedded(batch.input_ids)
        deep = self.feature(self.stages, embedded, batch.aux)
        rows = []
        for k in range(1, self.stages):
            at = plan.near[:, k - 1]
            shallow = self.feature(k, embedded[at], batch.aux[at])
            rows.append(torch.where(plan.complete[k - 1], deep[at], shallow))
        near = torch.stack(rows, 1)  # [A, n-1, H]
        x = self.feature(0, embedded[batch.anchors], batch.aux)
        for i, layer in enumerate(self.layers):
            deep = self.mapped(i, self.stages, deep)
            near = torch.stack(
                [self.mapped(i, k + 1, near[:, k]) for k in range(self.stages - 1)], 1
            )
            x = self._layer(layer, x, torch.cat([deep, near.flatten(0, 1)]), plan)
        z = self.normed(x)
        own = self.head.weight
        assert isinstance(own, Tensor)
        return SlotStates(z.new_zeros(z.shape[0], 1, 0), z[:, None], own, None)

    def _layer(self, layer: nn.Module, x: Tensor, memory: Tensor, plan: SpdPlan) -> Tensor:
        assert isinstance(layer, Layer)

        def attend(normed: Tensor) -> Tensor:
            rows = layer.input_layernorm(memory)
            q, keys, values = layer.self_attn.queries_keys_values(
                normed, rows, plan.query_rope, plan.memory_rope
            )
            out: Tensor = layer.self_attn.o_proj(
                attended(q, keys, values, plan.far, plan.exists).flatten(1)
            )
            return out

        return layer.around(x, attend)

    def normed(self, x: Tensor) -> Tensor:
        """Apply the target's final norm to ``x`` [..., H]."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.norm.eps)
        return self.norm.weight.to(x.dtype) * wide.to(x.dtype)

    def slot_logits(self, h: Tensor) -> Tensor:
        weight = self.head.weight
        assert isinstance(weight, Tensor)
        return F.linear(h.to(weight.dtype), weight).float()


def attended(q: Tensor, keys: Tensor, values: Tensor, far: Tensor, exists: Tensor) -> Tensor:
    """[A, Hq, D]: of queries [A, Hq, D] over keys and values [S + A m + A, Hkv, D]: the row's where
    ``far`` bool[A, S], each query's m own where they exist, bool[A, m], and the query's own.
    """
    anchors, length = far.shape
    out = []
    for start in range(0, anchors, QUERIES_AT_ONCE):
        part = slice(start, min(start + QUERIES_AT_ONCE, anchors))
        count, near = part.stop - part.start, exists.shape[1]
        own = torch.eye(count, dtype=torch.bool, device=q.device)
        close = (own[:, :, None] & exists[part]).flatten(1)
        mask = torch.cat([far[part], close, own], 1)
        of_near = slice(length + part.start * near, length + part.stop * near)
        k, v = (
            torch.cat([x[:length], x[of_near], x[length + anchors * near :][part]])
            for x in (keys, values)
        )
        query, k, v = (x.transpose(0, 1)[None] for x in (q[part], k, v))
        gqa = q.shape[1] != keys.shape[1]
        seen = F.scaled_dot_product_attention(query, k, v, attn_mask=mask, enable_gqa=gqa)
        out.append(seen[0].transpose(0, 1))
    return torch.cat(out) if out else q
