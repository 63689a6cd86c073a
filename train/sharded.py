"""FSDP2: each rank keeps its share of the float32 parameters, gradients and moments, and gathers one layer's weights when it needs them.

The sharded parameters are the masters; layers compute in the dtype of the run (``param_dtype``), gradients are summed over ranks in
float32 after every row. So a trained parameter costs 16 bytes / ranks, and a layer at a time 2 more. The target's frozen matrices are
kept whole on every rank: the objective multiplies by them chunk by chunk.

Every forward gathers and every backward sums, so all ranks must make the same number of passes (``train/step.py`` sees to it).
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dspark.train.batch import Batch
from dspark.train.distributed import World
from dspark.train.draft import DraftModel, Plan, SlotStates
from dspark.train.optim import MOMENTS, Adam, AdamSettings, Snapshot, squares

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(model: DraftModel, world: World, dtype: torch.dtype) -> None:
    """Turn the trained parameters of ``model`` into float32 shards, in place; its forward computes in ``dtype``."""
    mesh: DeviceMesh = init_device_mesh(model.fc.weight.device.type, (world.size,))
    for _, p in model.trained():
        p.data = p.data.float()
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False, output_dtype=None
    )
    frozen = {p for p in model.parameters() if not p.requires_grad}
    _wrap_forward(model, dtype)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # The root's weights stay gathered until backward: the objective multiplies by W2 after the forward has ended.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=frozen)
    # It says so of every slot state: a view, which nobody writes to.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Sums, not means: the loss of a step is already divided by the weights of all ranks. (Plain sums, which gloo has too.)
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def _wrap_forward(model: DraftModel, dtype: torch.dtype) -> None:
    """Two things that hold only of a sharded model, around its own forward.

    Its parameters are float32 until they are gathered, so the plan's tables are too and are cast here. And FSDP2 hangs a hook on every
    tensor that a forward returns: on W2 itself, a parameter, they would pile up from pass to pass, so a copy goes out.
    """
    inner = model.forward

    def forward(batch: Batch, plan: Plan) -> SlotStates:
        block, context = ((cos.to(dtype), sin.to(dtype)) for cos, sin in (plan.block_rope, plan.context_rope))
        states = inner(batch, replace(plan, block_rope=block, context_rope=context))
        return states if states.w2 is None else replace(states, w2=states.w2.clone())

    model.forward = forward  # type: ignore[method-assign]


class ShardedAdamW:
    """AdamW over the shards of a model that ``shard`` has cut."""

    def __init__(self, model: DraftModel, settings: AdamSettings, world: World) -> None:
        self.parameters: dict[str, DTensor] = {}
        for name, p in model.trained():
            if p.requires_grad:
                assert isinstance(p, DTensor), f"{name} is not sharded"
                self.parameters[name] = p
        self.world = world
        # Plain tensors that share the shards' memory: the optimizer needs no notion of a mesh.
        self._shards = {n: nn.Parameter(_local(p)) for n, p in self.parameters.items()}
        # A rank has nothing of a tensor with fewer rows than there are ranks.
        held = [s for s in self._shards.values() if s.numel()]
        self._adam = Adam(held, settings)

    def last_row(self) -> None:
        """Nothing to do: sums are made row by row."""

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        """As ``Optimizer.step``."""
        for name, p in self.parameters.items():
            own = self._shards[name]
            assert _local(p).data_ptr() == own.data_ptr(), f"{name} has moved"
            assert isinstance(p.grad, DTensor), f"{name} has no gradient"
            own.grad = _local(p.grad)
        gradients = [s.grad for s in self._adam.masters if s.grad is not None]
        norm = self.world.sum_(squares(gradients)).sqrt()
        self._adam.update(lr, norm)
        for name, p in self.parameters.items():
            self._shards[name].grad = p.grad = None
        return norm

    def snapshot(self) -> Snapshot:
        masters = {n: self._whole(p, _local(p)) for n, p in self.parameters.items()}
        moments = {
            m: {n: self._whole(p, self._moment(m, n)) for n, p in self.parameters.items()} for m in MOMENTS
        }
        if self.world.rank:
            return Snapshot({}, {}, 0)
        return Snapshot(masters, moments, self._adam.updates)

    def _moment(self, moment: str, name: str) -> Tensor:
        own = self._shards[name]
        return self._adam.moment(moment, own) if own.numel() else own.detach()

    def _whole(self, like: DTensor, local: Tensor) -> Tensor:
        """All shards joined, on the CPU of rank 0 (elsewhere an empty tensor): one tensor at a time is whole on a GPU."""
        shards = DTensor.from_local(
            local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        full = shards.full_tensor()
        return full.detach().cpu() if self.world.first else local.new_empty(0)

    @torch.no_grad()
    def load(self, snapshot: Snapshot) -> None:
        """Every rank reads the whole and keeps its share, so a checkpoint serves any number of ranks."""
        snapshot.check(self.parameters, dict.fromkeys(MOMENTS, self.parameters))
        for name, p in self.parameters.items():
            _local(p).copy_(_share(p, snapshot.masters[name]))
            for moment in MOMENTS:
                self._moment(moment, name).copy_(_share(p, snapshot.moments[moment][name]))
        self._adam.updates = snapshot.updates


def _local(p: DTensor) -> Tensor:
    with torch.no_grad():
        local: Tensor = p.to_local()
    return local


def _share(p: DTensor, whole: Tensor) -> Tensor:
    """This rank's rows of ``whole``."""
    part = distribute_tensor(
        whole.to(p.device_mesh.device_type), p.device_mesh, p.placements, src_data_rank=None
    )
    return part.to_local()
