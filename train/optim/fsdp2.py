"""FSDP2: each rank keeps its share of the float32 masters, moments and summed gradients. Weights
are gathered once per step, in the forward of its first row, and gradients are summed once, in the
backward pass of its last, however many rows a step has.

The sharded parameters are the masters; layers compute in the dtype of the run (``param_dtype``). In
between a rank has all weights in that dtype and the sum of its rows' gradients, which FSDP2 keeps
in float32 (``reduce_dtype``), as the plain optimizer does. So a trained parameter costs 16 bytes /
ranks, and 2 + 4 more during a step of several rows; a layer's weights that share a product cost 2
more, for the copy in which they are adjacent. The target's frozen matrices are kept whole on every
rank: the objective multiplies by them chunk by chunk.

A rank's first pass gathers and its last sums, and all ranks must do both: a rank without a row
passes padding once (``train/step.py`` ensures it). Otherwise ranks may differ in the number of
passes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dspark.train.data.batch import Batch
from dspark.train.distributed import World
from dspark.train.draft.layers import Attention, ForwardPlan, Mlp
from dspark.train.draft.model import DraftModel
from dspark.train.objective.states import SlotStates
from dspark.train.optim.adamw import Adam
from dspark.train.optim.base import (
    AdamSettings,
    Empty,
    Rule,
    Snapshot,
    all_finite,
    copied,
    squares,
    start_copy,
)
from dspark.train.optim.muon import is_matrix
from dspark.train.optim.muon_rows import RowsMuon

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(model: DraftModel, world: World, dtype: torch.dtype) -> JointCopies:
    """Turn the trained parameters of ``model`` into float32 shards, in place; its forward computes
    in ``dtype``.
    """
    mesh: DeviceMesh = init_device_mesh(model.device.type, (world.size,))
    for _, p in model.trained():
        p.data = p.data.float()
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False, output_dtype=None
    )
    frozen = {p for p in model.parameters() if not p.requires_grad}
    _wrap_forward(model, dtype)
    copies = JointCopies(model, dtype)
    # One group per layer: its weights are gathered while the layer before computes, and its
    # gradients summed during the backward pass of the layer before.
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(
        model, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=frozen
    )
    # It warns about every slot state: a view that is never written to.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for module in _groups(model):
        # Sums, not means: the loss of a step is already divided by the weights of all ranks. (Plain
        # sums, which gloo has too.)
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
    _sum_in_next_backward(model, False)
    copies.follow()
    return copies


class JointCopies:
    """A copy of a layer's weights that share a product (``joined.py``) in which they are adjacent,
    since FSDP2 gathers each into its own memory. Made in the first forward pass after they changed,
    so once per step, for all its rows.
    """

    def __init__(self, model: DraftModel, dtype: torch.dtype) -> None:
        self._parts = {
            layer: [m for m in layer.modules() if isinstance(m, Attention | Mlp)]
            for layer in model.layers
        }
        for module in (module for parts in self._parts.values() for module in parts):
            rows, columns = sum(w.shape[0] for w in module.joined), module.joined[0].shape[1]
            module.joint = torch.empty(rows, columns, dtype=dtype, device=module.joined[0].device)
        self._old = set[nn.Module]()

    def follow(self) -> None:
        """Install the hooks; FSDP2's own hooks, which gather, exist already and run first."""
        for layer in self._parts:
            layer.register_forward_pre_hook(self._renew)
        self.outdated()

    def outdated(self) -> None:
        """Note that the weights have changed."""
        self._old = set(self._parts)

    @torch.no_grad()
    def _renew(self, layer: nn.Module, inputs: object) -> None:
        if layer not in self._old:
            return
        self._old.discard(layer)
        for module in self._parts[layer]:
            torch.cat(module.joined, out=module.joint)


def _groups(model: DraftModel) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def _sum_in_next_backward(model: DraftModel, last: bool) -> None:
    """Set whether the next backward pass sums gradients over ranks and frees the gathered weights,
    or accumulates locally.
    """
    for module in _groups(model):
        module.set_requires_gradient_sync(last, recurse=False)
        module.set_reshard_after_backward(last, recurse=False)


def _wrap_forward(model: DraftModel, dtype: torch.dtype) -> None:
    """Handle two peculiarities of a sharded model's forward pass. Its parameters are float32 until
    they are gathered, so the plan's tables are too and are cast here. And FSDP2 puts a hook on
    every tensor that a forward pass returns: on W2, a parameter, they would accumulate from pass to
    pass, so a copy is returned.
    """
    inner = model.forward

    def forward(batch: Batch, plan: ForwardPlan) -> SlotStates:
        block, context = (
            (cos.to(dtype), sin.to(dtype)) for cos, sin in (plan.block_rope, plan.context_rope)
        )
        states = inner(batch, replace(plan, block_rope=block, context_rope=context))
        return states if states.w2 is None else replace(states, w2=states.w2.clone())

    model.forward = forward  # type: ignore[method-assign]


class ShardedOptimizer:
    """AdamW, or with ``muon`` Muon for the matrices and AdamW for the rest, over the shards of the
    trained parameters of ``model``, whose forward pass then computes in ``dtype``.
    """

    def __init__(
        self,
        model: DraftModel,
        settings: AdamSettings,
        world: World,
        dtype: torch.dtype,
        *,
        muon: bool = False,
    ) -> None:
        self._copies = shard(model, world, dtype)
        self.parameters: dict[str, DTensor] = {}
        for name, p in model.trained():
            if p.requires_grad:
                assert isinstance(p, DTensor), f"{name} is not sharded"
                self.parameters[name] = p
        self.model, self.world = model, world
        # Plain tensors that share the shards' memory: the optimizer needs no notion of a mesh.
        self._shards = {n: nn.Parameter(_local(p)) for n, p in self.parameters.items()}
        matrices = [n for n, p in self.parameters.items() if muon and is_matrix(n, p)]
        others = [n for n in self.parameters if n not in matrices]
        self._rule_of: dict[str, Rule] = {}
        if others:
            # A rank may hold nothing of a tensor with fewer rows than ranks.
            held = [self._shards[n] for n in others if self._shards[n].numel()]
            self._rule_of |= dict.fromkeys(others, Adam(held, settings))
        if matrices:
            shapes = [self.parameters[n].shape for n in matrices]
            rule = RowsMuon([self._shards[n] for n in matrices], shapes, settings, world)
            self._rule_of |= dict.fromkeys(matrices, rule)
        self._rules = list(dict.fromkeys(self._rule_of.values()))
        # kind of moment -> the parameters that have it
        self._moments = {
            m: [n for n, rule in self._rule_of.items() if m in rule.moments]
            for m in sorted({m for rule in self._rules for m in rule.moments})
        }

    def last_row(self) -> None:
        """As ``Optimizer.last_row``; another backward pass, of a row or of padding, must follow
        before ``step``.
        """
        _sum_in_next_backward(self.model, True)

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        """As ``Optimizer.step``."""
        for name, p in self.parameters.items():
            own = self._shards[name]
            assert _local(p).data_ptr() == own.data_ptr(), f"{name} has moved"
            assert isinstance(p.grad, DTensor), f"{name} has no gradient"
            own.grad = _local(p.grad)
        gradients = [s.grad for s in self._shards.values() if s.grad is not None and s.numel()]
        norm = self.world.sum_(squares(gradients)).sqrt()
        for rule in self._rules:
            rule.update(lr, norm)
        for name, p in self.parameters.items():
            self._shards[name].grad = p.grad = None
        _sum_in_next_backward(self.model, False)
        self._copies.outdated()
        return norm

    def ready(self) -> None:
        """As ``Optimizer.ready``: a forward pass gathers."""

    def finite(self) -> bool:
        """As ``Optimizer.finite``."""
        return all_finite(self._rules)

    def snapshot_bytes(self) -> int:
        """As ``Optimizer.snapshot_bytes``."""
        names = [*self.parameters, *(n for names in self._moments.values() for n in names)]
        return 4 * sum(self.parameters[n].numel() for n in names)

    def snapshot(self, empty: Empty = torch.empty) -> Snapshot:
        masters = {n: self._whole(p, _local(p), empty) for n, p in self.parameters.items()}
        moments = {
            m: {n: self._whole(self.parameters[n], self._moment(m, n), empty) for n in names}
            for m, names in self._moments.items()
        }
        copied(self.model.device)
        if self.world.rank:
            return Snapshot({}, {}, 0)
        return Snapshot(masters, moments, self._rules[0].updates)

    def _moment(self, moment: str, name: str) -> Tensor:
        own = self._shards[name]
        return self._rule_of[name].moment(moment, own) if own.numel() else own.detach()

    def _whole(self, like: DTensor, local: Tensor, empty: Empty) -> Tensor:
        """Join all shards, and start their copy to the CPU of rank 0 (elsewhere an empty tensor):
        one tensor at a time is complete on a GPU.
        """
        shards = DTensor.from_local(
            local,
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )
        full = shards.full_tensor()
        return start_copy(full, empty) if self.world.first else local.new_empty(0)

    @torch.no_grad()
    def load(self, snapshot: Snapshot) -> None:
        """Load a snapshot: every rank reads all of it and keeps its share, so a checkpoint works
        with any number of ranks.
        """
        snapshot.check(self.parameters, self._moments)
        for name, p in self.parameters.items():
            _local(p).copy_(_share(p, snapshot.masters[name]))
        for moment, names in self._moments.items():
            for name in names:
                whole = snapshot.moments[moment][name]
                self._moment(moment, name).copy_(_share(self.parameters[name], whole))
        for rule in self._rules:
            rule.updates = snapshot.updates
        # what a validation may have gathered before is of other masters
        for module in _groups(self.model):
            module.reshard()
        self._copies.outdated()


def _local(p: DTensor) -> Tensor:
    with torch.no_grad():
        local: Tensor = p.to_local()
    return local


def _share(p: DTensor, whole: Tensor) -> Tensor:
    """Return this rank's rows of ``whole``."""
    part = distribute_tensor(
        whole.to(p.device_mesh.device_type), p.device_mesh, p.placements, src_data_rank=None
    )
    return part.to_local()
