"""The draft's layers: Qwen3's, over blocks that also read the target's states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dspark.train.draft.attention import AttentionPlan, block_attention
from dspark.train.draft.config import DraftConfig
from dspark.train.ops.gated import gated
from dspark.train.ops.joined import joined_product
from dspark.train.ops.qk_norm_rope import Inputs, qk_norm_rope
from dspark.train.ops.rope import Rope


class RMSNorm(nn.Module):
    """``weight * x / rms(x)``, the mean square in fp32 (Qwen3)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


@dataclass(frozen=True, slots=True)
class ForwardPlan:
    """What a forward pass needs besides a batch's data, none of it learned: what attends to what,
    for each of ``DraftModel.sights``, and cos and sin of the blocks' and the context's positions
    (``rope_tables``). Made once per batch, outside the compiled part: a compiler would recompute
    the tables in every layer's kernels.
    """

    attention: tuple[AttentionPlan, ...]
    block_rope: Rope
    context_rope: Rope


class Attention(nn.Module):
    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        c = config
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.joint: Tensor | None = None

    @property
    def joined(self) -> tuple[Tensor, ...]:
        """Return the weights of one product: all for the blocks' tokens, all but the last for the
        context's. ``joint``: an adjacent copy of them, if they cannot be adjacent themselves.
        """
        return self.v_proj.weight, self.k_proj.weight, self.q_proj.weight

    def queries_keys_values(
        self, x: Tensor, ctx: Tensor, block_rope: Rope, context_rope: Rope
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [Q, Hq, D] of ``x`` [Q, H], keys and values [S+Q, Hkv, D] of ``ctx`` [S,
        H] and ``x``; with normed and rotated queries and keys. S or Q may be 0.
        """
        context = joined_product(ctx, self.joined[:2], self.joint)
        blocks = joined_product(x, self.joined, self.joint)
        q_weight, k_weight, eps = self.q_norm.weight, self.k_norm.weight, self.k_norm.eps
        return qk_norm_rope(
            Inputs(context, blocks, q_weight, k_weight, eps, context_rope, block_rope)
        )

    def forward(
        self,
        x: Tensor,
        ctx: Tensor,
        plan: ForwardPlan,
        sight: int,
    ) -> Tensor:
        q, keys, values = self.queries_keys_values(x, ctx, plan.block_rope, plan.context_rope)
        seen = block_attention(q, keys, values, plan.attention[sight])
        out: Tensor = self.o_proj(seen.reshape(x.shape[0], -1))
        return out


class Mlp(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.joint: Tensor | None = None

    @property
    def joined(self) -> tuple[Tensor, ...]:
        """Return the weights of one product. ``joint``: as in attention."""
        return self.up_proj.weight, self.gate_proj.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(gated(joined_product(x, self.joined, self.joint)))
        return out


class Layer(nn.Module):
    """One pre-norm Qwen3 layer over the blocks; ``ctx`` only provides keys and values."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        ctx: Tensor,
        plan: ForwardPlan,
        sight: int = 0,
    ) -> Tensor:
        """``sight``: which of the plan's attentions this layer uses."""
        return self.around(x, lambda normed: self.self_attn(normed, ctx, plan, sight))

    def around(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """Run the layer with ``attend`` in place of its attention: normed [n, H] -> [n, H]."""
        x = x + attend(self.input_layernorm(x))
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out
