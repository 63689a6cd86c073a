"""The draft: a few Qwen3 layers whose blocks read the target's hidden states as extra keys and
values.

Legend: S tokens of the row, L aux layers, Ht = H hidden size, A anchors, B slots, Q = A*B, Hq/Hkv
heads, D head size, V/Vd target and draft vocabulary, r Markov rank.

``ctx = hidden_norm(fc(concat_L(aux)))`` is computed once; every layer applies its own k_proj,
v_proj and k_norm to it, but not its input_layernorm, and never updates it (as vLLM's
``Qwen3DSparkModel`` serves it). Parameter names are the names of the served checkpoint; still, q, k
and v are computed as one product, and so are gate and up (``joined.py``), and the norms of queries
and keys are part of one operation (``qk_norm_rope.py``). embed_tokens and lm_head are the target's
and frozen; if the target ties them, they share one tensor. The final ``norm`` starts at ones, like
every norm of the draft, and is trained with the rest: the checkpoint contains the draft's own
``norm.weight``, which vLLM uses. A copy of the target's, whose scale fits the target's states and
not a random layer's, costs AdamW a tenth of tau after 1,200 steps
(docs/log/2026-11-22-final-norm.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.cache.errors import MismatchError
from dspark.cache.target.logits import Logits
from dspark.train.data.batch import Batch
from dspark.train.draft.attention import (
    AttentionPlan,
    Backend,
    MaskTables,
    Tables,
)
from dspark.train.draft.config import DraftConfig
from dspark.train.draft.heads import ConfidenceHead, MarkovHead, build_markov_head
from dspark.train.draft.layers import Attention, ForwardPlan, Layer, Mlp, RMSNorm
from dspark.train.objective.states import FrozenHead, SlotStates
from dspark.train.ops.joined import lay_side_by_side
from dspark.train.ops.rope import rope_tables


class TargetWeights(Protocol):
    """What ``cache.target`` provides: ``embed_tokens`` [V, H], ``lm_head`` [V, H], tied ones
    sharing memory; the final ``norm`` [H]; ``logits``.
    """

    @property
    def embed_tokens(self) -> Tensor: ...
    @property
    def lm_head(self) -> Tensor: ...
    @property
    def norm(self) -> Tensor: ...
    @property
    def logits(self) -> Logits: ...


class DraftModel(nn.Module):
    """A draft for ``target``. ``draft_ids`` int64[Vd], rising, are the target ids it can draft;
    given if and only if Vd < V.

    The target's tensors are used as they are (no copy, same dtype), so ``frozen_dtype`` decides the
    dtype in which logits are multiplied, without touching the trained parameters. If the output
    matrix has to be copied (another dtype or device, rows of a reduced vocabulary), the copy has
    room for W2 beside it (``make_room``).
    """

    compiled_whole = False
    """Whether torch compiled all of it as one (``setup.compile_draft``)."""

    def __init__(
        self,
        config: DraftConfig,
        target: TargetWeights,
        draft_ids: Tensor | None = None,
        *,
        frozen_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        check_target(config, target, draft_ids)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.fc = nn.Linear(len(config.target_layer_ids) * size, size, bias=False)
        self.hidden_norm = RMSNorm(size, eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.look()
        self.norm = RMSNorm(size, eps)
        self.markov_head: MarkovHead | None = None
        self.confidence_head: ConfidenceHead | None = None
        if config.markov_rank:
            self.markov_head = build_markov_head(
                config.markov_head_type,
                vocab_size=config.vocab_size,
                draft_vocab_size=config.draft_vocab_size,
                rank=config.markov_rank,
                hidden_size=size,
            )
        if config.enable_confidence_head:
            with_markov = config.confidence_head_with_markov
            self.confidence_head = ConfidenceHead(size, config.markov_rank if with_markov else 0)
        self._initialise()
        self._adopt(target, draft_ids, frozen_dtype)
        self.join()

    def _initialise(self) -> None:
        """Initialise: normal weights with the config's std, zero biases, unit norms (as in Qwen3
        and DeepSpec).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def _adopt(
        self, target: TargetWeights, draft_ids: Tensor | None, dtype: torch.dtype | None
    ) -> None:
        """Take the target's tensors; as one ``Parameter`` object if they are tied, so that ``.to``
        keeps them tied.
        """
        self._wide: Tensor | None = None
        embed, head = target.embed_tokens.detach(), target.lm_head.detach()
        self.target_logits = target.logits
        tied = embed.data_ptr() == head.data_ptr() and embed.shape == head.shape
        embed = embed if dtype is None else embed.to(dtype)
        head = embed if tied else head if dtype is None else head.to(dtype)
        self.embed_tokens = nn.Module()
        self.embed_tokens.weight = nn.Parameter(embed, requires_grad=False)
        self.lm_head = nn.Module()
        if draft_ids is None:
            shared = self.embed_tokens.weight if tied else nn.Parameter(head, requires_grad=False)
            self.lm_head.weight = shared
            if shared.data_ptr() != target.lm_head.data_ptr():
                self.make_room()
            return
        inverse = torch.full((self.config.vocab_size,), -1, dtype=torch.int64)
        inverse[draft_ids] = torch.arange(draft_ids.shape[0])
        self.lm_head.weight = nn.Parameter(head[draft_ids].clone(), requires_grad=False)
        # Named so that no checkpoint name but lm_head.weight itself contains "lm_head" (vLLM
        # matches substrings).
        full = self.embed_tokens.weight if tied else nn.Parameter(head, requires_grad=False)
        self.target_output = nn.Module()
        self.target_output.weight = full
        self.register_buffer("draft_ids", draft_ids.to(torch.int64).clone(), persistent=False)
        self.register_buffer("to_draft", inverse, persistent=False)
        self.make_room()

    def look(self) -> None:
        """Note which layers share a sight, according to the current config: no weight depends on
        it, so the config may be replaced.
        """
        self.sights = tuple(dict.fromkeys(self.config.sights))
        self._sight_of = [self.sights.index(sight) for sight in self.config.sights]

    def join(self) -> None:
        """Make the weights of each layer that share a product adjacent in memory
        (``joined_product``). The last projection comes first, as in the optimizer's buckets.
        """
        for module in self.layers.modules():
            if isinstance(module, Attention | Mlp):
                lay_side_by_side(module.joined)

    def make_room(self) -> None:
        """Copy the output matrix (and the embedding tied to it) to the first H columns of [Vd, H +
        r], whose other columns hold W2 in the objective: ``FrozenHead.wide``. Only for a model with
        a Markov head; before ``compile``, which remembers strides.
        """
        weight = self.lm_head.weight
        assert isinstance(weight, nn.Parameter)
        if self.markov_head is None or self._has_room(weight):
            return
        rows, size = weight.shape
        self._wide = None  # the memory it had before it moved
        self._wide = weight.new_zeros(rows, size + self.markov_head.rank)
        self._wide[:, :size] = weight
        weight.data = self._wide[:, :size]

    def _has_room(self, weight: Tensor) -> bool:
        """Tell whether ``weight`` is still part of the wide matrix: moving or copying the module
        separates them.
        """
        wide = self._wide
        return (
            wide is not None
            and wide.data_ptr() == weight.data_ptr()
            and wide.stride() == weight.stride()
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Do what ``.to`` and similar calls need. They copy tensor by tensor: an output matrix that
        moved gets new room, and weights that share a product are made adjacent again.
        """
        weight = self.lm_head.weight
        assert isinstance(weight, Tensor)
        before = weight.data_ptr()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if weight.data_ptr() != before:
            self.make_room()
        self.join()
        return self

    @property
    def device(self) -> torch.device:
        """The draft's device."""
        weight = self.embed_tokens.weight
        assert isinstance(weight, Tensor)
        return weight.device

    @property
    def frozen_head(self) -> FrozenHead:
        """Return the output matrices for the objective (they follow ``.to``)."""
        own = self.lm_head.weight
        assert isinstance(own, Tensor)
        wide = self._wide if self._has_room(own) else None
        if not self.config.reduced_vocab:
            return FrozenHead(own, own, logits=self.target_logits, wide=wide)
        full, ids, inverse = self.target_output.weight, self.draft_ids, self.to_draft
        assert isinstance(full, Tensor)
        assert isinstance(ids, Tensor)
        assert isinstance(inverse, Tensor)
        return FrozenHead(full, own, ids, inverse, self.target_logits, wide)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield names and parameters that are trained, in a fixed order."""
        for name, parameter in self.named_parameters():
            if not name.startswith(("embed_tokens.", "lm_head.", "target_output.")):
                yield name, parameter

    def parts(self) -> Iterator[tuple[nn.Module, list[str]]]:
        """Yield modules and the names of trained parameters that a forward pass first reads in
        them: the draft itself with all outside of its layers, then each layer.
        """
        names = [name for name, _ in self.trained()]
        of_layer = [
            [name for name in names if name.startswith(f"layers.{i}.")]
            for i in range(len(self.layers))
        ]
        inside = {name for of_one in of_layer for name in of_one}
        yield self, [name for name in names if name not in inside]
        yield from zip(self.layers, of_layer, strict=True)

    def context(self, aux: Tensor) -> Tensor:
        """``aux`` [S, L, H] -> ctx [S, H]."""
        out: Tensor = self.hidden_norm(self.fc(aux.flatten(1).to(self.fc.weight.dtype)))
        return out

    def plan(self, batch: Batch, backend: Backend = "sdpa") -> ForwardPlan:
        """Return the plan of a batch on the draft's device."""
        position = batch.block_position
        if self.config.bonus_anchor:
            position = torch.cat([position, position[:, -1:] + 1], 1)
        attention = self.attention_plans(
            batch.doc, batch.anchors, batch.anchor_valid, backend, batch.tables
        )
        return self.plan_of(attention, position.flatten(), batch.position)

    def attention_plans(
        self,
        doc: Tensor,
        anchors: Tensor,
        anchor_valid: Tensor,
        backend: Backend = "sdpa",
        tables: Sequence[Tables] = (),
    ) -> tuple[AttentionPlan, ...]:
        """Return ``AttentionPlan.build`` for each of ``sights``."""
        size = self.config.slots
        made: Sequence[Tables | None] = tables or [None] * len(self.sights)
        return tuple(
            AttentionPlan.build(doc, anchors, anchor_valid, size, backend, sight, tables=known)
            for sight, known in zip(self.sights, made, strict=True)
        )

    @property
    def mask_tables(self) -> MaskTables | None:
        """What readers make of a row for ``plan`` on a GPU; None if it would not use them."""
        return MaskTables(self.config.slots, self.sights)

    def plan_of(
        self, attention: tuple[AttentionPlan, ...], block_position: Tensor, context_position: Tensor
    ) -> ForwardPlan:
        """Make the plan from positions int64[Q] of the blocks' tokens and int64[S] of the
        context's, each within its document.
        """
        c, dtype = self.config, self.fc.weight.dtype
        block, context = (
            rope_tables(p, c.turning, dtype) for p in (block_position, context_position)
        )
        return ForwardPlan(attention, block, context)

    def forward(self, batch: Batch, plan: ForwardPlan) -> SlotStates:
        """Run every slot of every block of one row; without the anchor's own slot if it predicts
        nothing.
        """
        anchors, size = batch.anchors.shape[0], self.config.slots
        ctx = self.context(batch.aux)
        x = (
            self.block_input(batch.input_ids[batch.anchors], batch.anchor_valid)
            .to(ctx.dtype)
            .flatten(0, 1)
        )
        h = self.backbone(x, ctx, plan)
        return self.heads(
            h.view(anchors, size, -1)[:, size - self.config.block_size :], batch.prev_ids
        )

    def block_input(self, anchor_ids: Tensor, anchor_valid: Tensor) -> Tensor:
        """Return [A, slots, H]: slot 0 holds the anchor's embedding, the others the mask token's (a
        padding block has only mask tokens).
        """
        ids = anchor_ids.new_full(
            (anchor_ids.shape[0], self.config.slots), self.config.mask_token_id
        )
        ids[:, 0] = torch.where(anchor_valid, anchor_ids, self.config.mask_token_id)
        weight = self.embed_tokens.weight
        assert isinstance(weight, Tensor)
        return F.embedding(ids, weight)

    def backbone(self, x: Tensor, ctx: Tensor, plan: ForwardPlan) -> Tensor:
        """``x`` [Q, H], ``ctx`` [S, H] -> h [Q, H] after the final norm."""
        for layer, sight in zip(self.layers, self._sight_of, strict=True):
            x = layer(x, ctx, plan, sight)
        out: Tensor = self.norm(x)
        return out

    def heads(self, h: Tensor, prev_ids: Tensor) -> SlotStates:
        """Return the teacher-forced Markov latent and confidence of ``h`` [A, B, H] with previous
        tokens int64[A, B].
        """
        z = w2 = confidence = embedded = None
        if self.markov_head is not None:
            embedded = self.markov_head.embed(prev_ids)
            z, w2 = self.markov_head.latent(h, embedded), self.markov_head.markov_w2.weight
        if self.confidence_head is not None:
            confidence = self.confidence_head(h, embedded)
        return SlotStates(h, z, w2, confidence)

    def slot_logits(self, h: Tensor) -> Tensor:
        """``h`` [..., H] -> logits [..., Vd] without the Markov bias, fp32."""
        head = self.frozen_head.draft_head
        return F.linear(h.to(head.dtype), head).float()

    def markov_logits(self, z: Tensor) -> Tensor:
        """Return the Markov bias [..., Vd] of the latent ``z`` [..., r], fp32; only with a Markov
        head.
        """
        assert self.markov_head is not None
        out: Tensor = self.markov_head.markov_w2(z).float()
        return out

    def target_ids(self, rows: Tensor) -> Tensor:
        """Map rows of the draft's vocabulary to target ids."""
        ids = self.frozen_head.draft_ids
        return rows if ids is None else ids[rows]


def check_target(config: DraftConfig, target: TargetWeights, draft_ids: Tensor | None) -> None:
    """Raise MismatchError unless ``config`` describes a draft of this target with these ids."""
    expected = (config.vocab_size, config.hidden_size)
    for name, tensor, shape in (
        ("embed_tokens", target.embed_tokens, expected),
        ("lm_head", target.lm_head, expected),
    ):
        if tuple(tensor.shape) != shape:
            found = list(tensor.shape)
            raise MismatchError(
                f"the target's {name} is {found}, but the draft's config expects {list(shape)}"
            )
    if (draft_ids is not None) != config.reduced_vocab:
        raise MismatchError(
            f"draft_vocab_size {config.draft_vocab_size} of {config.vocab_size}: "
            f"draft token ids {'are needed' if config.reduced_vocab else 'do not apply'}"
        )
    if draft_ids is None:
        return
    rises = bool((draft_ids[1:] > draft_ids[:-1]).all())
    inside = (
        bool(draft_ids.numel())
        and int(draft_ids[0]) >= 0
        and int(draft_ids[-1]) < config.vocab_size
    )
    if draft_ids.shape != (config.draft_vocab_size,) or not rises or not inside:
        raise MismatchError(
            f"draft token ids must be {config.draft_vocab_size} ascending ids below "
            f"{config.vocab_size}; got {list(draft_ids.shape)}"
        )
