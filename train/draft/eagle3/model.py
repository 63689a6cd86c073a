"""The network of EAGLE-3 and P-EAGLE (``drafter.py``), unrolled from anchors.

Legend: S tokens of the row, A anchors, B steps, H hidden size, Hq/Hkv heads, D head size, V/Vd
target and draft vocabulary.

``fused = fc(concat of 3 states)``. A row of hidden h and token id is ``[input_layernorm(emb(id)) |
hidden_norm(h)]`` [2 H]; attention (no norm of queries and keys) is added to h, the MLP to that, and
``norm`` of the sum goes to the output matrix. Step 0 of anchor a is the row of position a - 1: h is
fused there, the token x[a]. Step k has the token x[a + k] and the sum of step k - 1 as h (P-EAGLE:
the mask token and fc of a learned state), at position a - 1 + k. It attends to the rows of
positions before a - 1, which are made as step 0's, and to the anchor's own steps up to k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.train.data.batch import Batch
from dspark.train.draft.attention import Backend
from dspark.train.draft.config import DraftConfig
from dspark.train.draft.model import DraftModel, Mlp, RMSNorm, TargetWeights, check_target
from dspark.train.draft.spd.head import attended
from dspark.train.objective.states import SlotStates
from dspark.train.ops.joined import lay_side_by_side
from dspark.train.ops.rope import Rope, rope_tables, rotate


@dataclass(frozen=True, slots=True)
class Eagle3Plan:
    """The plan of one row: ``far`` bool[A, S] which positions before its own row an anchor sees,
    ``first`` bool[A] whether it has one (not the first token of a document), cos and sin of the
    row's positions and of each step's.
    """

    far: Tensor
    first: Tensor
    row_rope: Rope
    step_ropes: tuple[Rope, ...]


class Projections(nn.Module):
    """Llama's attention weights on rows of 2 H."""

    def __init__(self, c: DraftConfig) -> None:
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(2 * c.hidden_size, c.num_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(2 * c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(2 * c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=False)

    def queries(self, rows: Tensor, rope: Rope) -> Tensor:
        return rotate(self.q_proj(rows).unflatten(-1, (-1, self.head_dim)), rope)

    def keys_values(self, rows: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """[n, Hkv, D] each, of rows [n, 2 H]."""
        keys = rotate(self.k_proj(rows).unflatten(-1, (-1, self.head_dim)), rope)
        return keys, self.v_proj(rows).unflatten(-1, (-1, self.head_dim))


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

    def plan(self, batch: Batch, backend: Backend = "sdpa") -> Eagle3Plan:  # type: ignore[override]
        a = batch.anchors
        at = torch.arange(batch.doc.shape[0], device=a.device)
        far = (batch.doc[None] == batch.doc[a][:, None]) & (at[None] < a[:, None] - 1)
        where = batch.position[a]
        steps = tuple(
            self.ropes((where - 1 + k).clamp(min=0)) for k in range(self.config.block_size)
        )
        return Eagle3Plan(far, where > 0, self.ropes(batch.position), steps)

    def forward(self, batch: Batch, plan: Eagle3Plan) -> SlotStates:  # type: ignore[override]
        """Return h [A, B, H] after the norm, with every step on the data's tokens."""
        layer, fused = self.midlayer, self.fused(batch.aux)
        following = torch.cat([batch.input_ids[1:], batch.input_ids[:1]])
        rows = layer.rows(self.embedded(following), fused)
        context = layer.self_attn.keys_values(rows, plan.row_rope)
        before = fused[(batch.anchors - 1).clamp(min=0)]
        # nothing comes before a document's first token
        hidden = torch.where(plan.first[:, None], before, 0)
        ids = batch.prev_ids

        def attend(q: Tensor, own: list[tuple[Tensor, Tensor]]) -> Tensor:
            k, v = (
                torch.cat([c, torch.stack(s[:-1], 1).flatten(0, 1) if len(s) > 1 else c[:0], s[-1]])
                for c, s in zip(context, zip(*own, strict=True), strict=True)
            )
            exists = plan.far.new_ones(q.shape[0], len(own) - 1)
            return attended(q, k, v, plan.far, exists)

        return SlotStates(
            self.unrolled(hidden, lambda k, _: ids[:, k], plan.step_ropes, attend), None, None, None
        )

    def unrolled(
        self,
        hidden: Tensor,
        token: Callable[[int, Tensor | None], Tensor],
        ropes: tuple[Rope, ...],
        attend: Callable[[Tensor, list[tuple[Tensor, Tensor]]], Tensor],
    ) -> Tensor:
        """Return h [A, B, H] after the norm, from step 0's ``hidden`` [A, H]. ``token(k, h)``: ids
        int64[A] of step k, h [A, H] the previous step's result; ``attend(q, own)``: [A, Hq, D] over
        the context and keys and values of the steps so far.
        """
        layer, out, own = self.midlayer, list[Tensor](), list[tuple[Tensor, Tensor]]()
        for k, rope in enumerate(ropes):
            ids = token(k, out[-1] if out else None)
            if k and self.mask_hidden is not None:
                ids = torch.full_like(ids, self.config.mask_token_id)
                hidden = self.fc(self.mask_hidden).expand(ids.shape[0], -1)
            rows = layer.rows(self.embedded(ids), hidden)
            own.append(layer.self_attn.keys_values(rows, rope))
            hidden = layer.after(hidden, attend(layer.self_attn.queries(rows, rope), own))
            out.append(self.norm(hidden))
        return torch.stack(out, 1)
