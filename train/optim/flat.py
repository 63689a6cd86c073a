"""Optimizers on float32 master weights, whatever dtype the model computes in: AdamW here, Muon in train/optim/muon.py; warm-up and cosine;
clipping by the global norm.

Everything lies flat: the parameters of the model are views into a few buckets, and masters, gradients and moments have the buckets'
shape. So a step is a handful of kernels however many tensors the draft has, nothing of it waits for the GPU, and the gradients of
several ranks are summed a bucket at a time, as the backward pass of the step's last row hands them over (compiled whole, it does so at
its end).

Where the model is float32 its parameters are the masters. Where it is bfloat16 each gradient is added to the float32 buffer as soon as
backward has made it: rows of a step accumulate in float32 and the bfloat16 gradient is freed at once.
Bytes a trained parameter, bfloat16: 2 + 4 (master) + 4 (gradient) + 8 (moments); float32: 4 + 4 + 8.

``shared``: each of several ranks has the master and the moments of its part of every bucket alone (ZeRO's scheme). The sums it needs are
scattered rather than given to all, it updates its part, and the new values are gathered: less to send than whole sums, a part of the
update's time, 2 + 4 + 12 / ranks bytes. Forward and backward are those of one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dspark.cache.errors import TrainError
from dspark.train.distributed import World
from dspark.train.ops.joined import side_by_side

BUCKET = 1 << 26  # elements of a bucket, at least one parameter: 256 MB of gradients in one all-reduce
ALIGN = (
    64  # elements; every parameter starts at a multiple, as the GPU's matrix units and vector loads like it
)
LINE = 4096  # elements; a rank's part of a bucket is whole lines, whose norms are taken first: a GPU reads them at its memory's speed
MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(step: int, total: int, peak: float, warmup_ratio: float, min_ratio: float) -> float:
    """Rate of optimizer step ``step`` (0-based) of ``total``: linear warm-up, then cosine to ``min_ratio * peak``."""
    warm = max(1, round(total * warmup_ratio)) if warmup_ratio else 0
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / max(1, total - warm)
    return peak * (min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done))))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Masters and moments, name -> whole float32 tensor, the same for any strategy and number of ranks; ``updates``: steps taken.

    An optimizer has each kind of moment for some of its parameters or for all.
    """

    masters: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Tensor]]
    updates: int

    def non_finite(self) -> str | None:
        """Which of the tensors has a NaN or an infinity, in words; None if none has. One pass over each."""
        for what, tensors in {"weight": self.masters, **self.moments}.items():
            for name, tensor in tensors.items():
                if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
                    return f"{what} {name}"
        return None

    def check(self, parameters: Mapping[str, Tensor], moments: Mapping[str, Collection[str]]) -> None:
        """Raise TrainError unless these are tensors for exactly ``parameters``, and moments for those that ``moments`` names."""
        for what in sorted({"masters", *self.moments, *moments}):
            tensors = self.masters if what == "masters" else self.moments.get(what, {})
            names = parameters if what == "masters" else moments.get(what, ())
            there = {n: list(t.shape) for n, t in tensors.items()}
            here = {n: list(parameters[n].shape) for n in names}
            if there != here:
                differ = sorted(n for n in there.keys() | here.keys() if there.get(n) != here.get(n))
                raise TrainError(
                    f"the checkpoint's {what} are not this draft's: {', '.join(f'{n} {there.get(n)} there, {here.get(n)} here' for n in differ[:3])}"
                )


class Optimizer(Protocol):
    """What the loop asks of an optimizer, sharded or not."""

    def last_row(self) -> None:
        """The next backward is this rank's last of the step: gradients may be summed over ranks as they appear."""

    def step(self, lr: float) -> Tensor:
        """One update at rate ``lr`` from the sum of all ranks' gradients; returns its norm before clipping (0-dim, on the device)."""

    def snapshot(self) -> Snapshot:
        """Copies on the CPU for a checkpoint, whole on rank 0 (a collective call; empty elsewhere)."""

    def load(self, snapshot: Snapshot) -> None:
        """Restore what ``snapshot`` gave, and the model's parameters with it."""


class Rule(Protocol):
    """How some ``masters`` change in a step. ``moments`` names the tensors that it keeps, of each master's shape."""

    masters: list[nn.Parameter]
    moments: tuple[str, ...]
    updates: int

    def update(self, lr: float, norm: Tensor) -> None:
        """One step with the gradients in ``.grad``, which have global norm ``norm`` over all rules' masters; it may overwrite them."""

    def moment(self, name: str, master: nn.Parameter) -> Tensor:
        """The tensor itself, not a copy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamSettings:
    """What stays the same over a run; ``clip``: the global norm that gradients are clipped to. Muon has its decay and clipping from here too."""

    betas: tuple[float, float]
    weight_decay: float
    clip: float


class Adam:
    """AdamW and clipping over given float32 ``masters``, whose ``.grad`` the caller sets."""

    moments: tuple[str, ...] = MOMENTS

    def __init__(self, masters: list[nn.Parameter], settings: AdamSettings) -> None:
        self.clip, self.masters = settings.clip, masters
        # One multi-tensor kernel, on CPU and CUDA; eager AdamW is a dozen passes over the same memory.
        self._adam = torch.optim.AdamW(
            masters, lr=0.0, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
        )
        for p in masters:
            moments = {name: torch.zeros_like(p, requires_grad=False) for name in MOMENTS}
            self._adam.state[p] = {"step": torch.zeros((), device=p.device), **moments}

    def update(self, lr: float, norm: Tensor) -> None:
        """One step with gradients of global norm ``norm``. The kernel itself divides by the clipping factor, so nothing is read back."""
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.grad_scale = excess(norm, self.clip)  # type: ignore[attr-defined]
        self._adam.step()

    def moment(self, name: str, master: nn.Parameter) -> Tensor:
        found: Tensor = self._adam.state[master][name]
        return found

    @property
    def updates(self) -> int:
        return int(self._adam.state[self.masters[0]]["step"]) if self.masters else 0

    @updates.setter
    def updates(self, value: int) -> None:
        for p in self.masters:
            self._adam.state[p]["step"].fill_(value)


def excess(norm: Tensor, clip: float) -> Tensor:
    """What gradients of global norm ``norm`` are divided by to clip them, 0-dim float32."""
    return ((norm + 1e-6) / clip).clamp(min=1.0).float()


@dataclass(slots=True, eq=False)
class _Bucket:
    """``values``: what the model computes with, flat [n]; ``gradients`` float32[n]. ``master`` is float32, all of the bucket or this rank's
    part, its ``grad`` a view of ``gradients``; where the model is float32 it lies in ``values`` itself.
    """

    master: nn.Parameter
    values: Tensor
    gradients: Tensor
    at: dict[str, int] = field(default_factory=dict)
    awaited: int = 0  # gradients that the last backward has yet to make
    sum: Any = None  # the collective under way


class FlatOptimizer:
    """Masters of ``named`` parameters, whole on every rank of ``world`` or ``shared`` out; their storage moves into flat buckets, which rules
    update.

    ``apart`` says of a parameter whether it lies in buckets of its own kind, for a rule of its own; a subclass sets ``_rules``.
    """

    _rules: Sequence[Rule]

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        world: World | None,
        apart: Callable[[str, nn.Parameter], bool] = lambda name, p: False,
        *,
        shared: bool = False,
    ) -> None:
        self.parameters = {n: p for n, p in named if p.requires_grad}
        self.world = world or World()
        self._holders = self.world if shared else World()  # of a master's parts
        # In the order in which backward makes gradients, last layer first, so that the first bucket is complete early. Parameters apart come
        # behind the others, and buckets are sent in this order, so theirs wait for the others' last gradient.
        backward = list(self.parameters.items())[::-1]
        kinds = [[(n, p) for n, p in backward if apart(n, p) is kind] for kind in (False, True)]
        self._buckets = [_adopt(group, self._holders) for kind in kinds for group in _groups(kind)]
        self._of = {name: bucket for bucket in self._buckets for name in bucket.at}
        self._summing, self._sent = False, 0
        for name, p in self.parameters.items():
            view = self._view(self._of[name].gradients, name)
            if p.dtype == torch.float32:
                p.grad = view  # autograd adds to it in place
            p.register_post_accumulate_grad_hook(self._hook(self._of[name], view))  # type: ignore[no-untyped-call]

    @property
    def masters(self) -> dict[str, Tensor]:
        """Name -> float32 master, a view; of an optimizer that is not shared."""
        assert self._holders.size == 1
        return {n: self._view(self._of[n].master.detach(), n) for n in self.parameters}

    def _view(self, flat: Tensor, name: str) -> Tensor:
        p, start = self.parameters[name], self._of[name].at[name]
        return flat[start : start + p.numel()].view(p.shape)

    def _hook(self, bucket: _Bucket, view: Tensor) -> Any:
        def arrived(p: Tensor) -> None:
            if p.dtype != torch.float32:
                assert p.grad is not None
                view.add_(p.grad)
                p.grad = None
            if self._summing:
                bucket.awaited -= 1
                while self._sent < len(self._buckets) and self._buckets[self._sent].awaited == 0:
                    self._send()

        return arrived

    def _send(self) -> None:
        """Start the sum of the next bucket. Always in one order, whichever gradients a rank has: collectives must match."""
        bucket = self._buckets[self._sent]
        start = self.world.start_sum_of_part if self._holders.size > 1 else self.world.start_sum
        bucket.sum = start(bucket.gradients)
        self._sent += 1

    def last_row(self) -> None:
        self._summing, self._sent = self.world.size > 1, 0
        for bucket in self._buckets:
            bucket.awaited = len(bucket.at)

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        """As ``Optimizer.step``."""
        if self.world.size > 1:
            while self._sent < len(self._buckets):  # all of them where this rank had no row
                self._send()
            for bucket in self._buckets:
                bucket.sum.wait()
        self._summing, self._sent = False, 0
        own = [self._holders.part(b.gradients).view(-1, LINE) for b in self._buckets]
        norm = self._holders.sum_(squares(own)).sqrt()
        for rule in self._rules:
            rule.update(lr, norm)
        for bucket in self._buckets:
            bucket.gradients.zero_()
        self._refresh()
        return norm

    @torch.no_grad()
    def _refresh(self) -> None:
        """What the model computes with follows the masters."""
        for bucket in self._buckets:
            if bucket.values.dtype != torch.float32:
                self._holders.part(bucket.values).copy_(bucket.master)
            self._holders.gather_(bucket.values)

    def _whole(self, part: Tensor) -> Tensor:
        """On the CPU of the first rank, of the ``part`` of a bucket that each holder has (a collective call); elsewhere empty."""
        if self._holders.size == 1:
            return part.detach().cpu()
        whole = part.new_empty(self._holders.size * part.numel(), requires_grad=False)
        self._holders.part(whole).copy_(part.detach())
        self._holders.gather_(whole)
        return whole.cpu() if self.world.first else whole.new_empty(0)

    def snapshot(self) -> Snapshot:
        if self.world.rank and self._holders.size == 1:
            return Snapshot({}, {}, 0)

        def whole(flat: Mapping[int, Tensor]) -> dict[str, Tensor]:
            copies = {key: self._whole(tensor) for key, tensor in flat.items()}
            if self.world.rank:
                return {}
            held = ((n, copies.get(id(self._of[n].master))) for n in self.parameters)
            return {n: self._view(copy, n).clone() for n, copy in held if copy is not None}

        moments = {m: whole(flat) for m, flat in self._moments().items()}
        return Snapshot(
            whole({id(b.master): b.master for b in self._buckets}), moments, self._rules[0].updates
        )

    def _moments(self) -> dict[str, dict[int, Tensor]]:
        """Kind of moment -> id of a bucket's master -> its tensor."""
        return {
            m: {id(p): rule.moment(m, p) for p in rule.masters} for rule in self._rules for m in rule.moments
        }

    @torch.no_grad()
    def load(self, snapshot: Snapshot) -> None:
        moments = self._moments()
        holds = {m: [n for n, b in self._of.items() if id(b.master) in flat] for m, flat in moments.items()}
        snapshot.check(self.parameters, holds)
        # Nothing is gathered, so a rank that cannot read the checkpoint leaves no other waiting for it.
        for bucket in self._buckets:
            masters = self._flat(bucket, snapshot.masters)
            bucket.master.copy_(self._holders.part(masters))
            bucket.values.copy_(masters)
            for moment, flat in moments.items():
                if id(bucket.master) in flat:
                    whole = self._flat(bucket, snapshot.moments[moment])
                    flat[id(bucket.master)].copy_(self._holders.part(whole))
        for rule in self._rules:
            rule.updates = snapshot.updates

    def _flat(self, bucket: _Bucket, tensors: Mapping[str, Tensor]) -> Tensor:
        """Those of ``bucket``'s parameters as they lie in it, on the CPU."""
        whole = torch.zeros(bucket.values.numel())
        for name in bucket.at:
            self._view(whole, name).copy_(tensors[name])
        return whole


class MasterAdamW(FlatOptimizer):
    """AdamW over all parameters."""

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        settings: AdamSettings,
        world: World | None = None,
        *,
        shared: bool = False,
    ) -> None:
        super().__init__(named, world, shared=shared)
        self._rules = [Adam([b.master for b in self._buckets], settings)]


def squares(tensors: list[Tensor]) -> Tensor:
    """Sum of all squares, float64 0-dim. Rows first and then in float64: a CPU adds up a long float32 vector to five digits only."""
    rows = torch.cat([torch.linalg.vector_norm(t, dim=-1).flatten() for t in tensors])
    return rows.double().square().sum()


def _groups(named: list[tuple[str, nn.Parameter]]) -> list[list[tuple[str, nn.Parameter]]]:
    """Neighbours of one dtype and device, ``BUCKET`` elements at most unless what must not be parted has more."""
    out: list[list[tuple[str, nn.Parameter]]] = []
    size = 0
    for chain in _chains(named):
        first, more = chain[0][1], sum(p.numel() for _, p in chain)
        same = out and (out[-1][-1][1].dtype, out[-1][-1][1].device) == (first.dtype, first.device)
        if not same or size + more > BUCKET:
            out.append([])
            size = 0
        out[-1].extend(chain)
        size += more
    return out


def _chains(named: list[tuple[str, nn.Parameter]]) -> list[list[tuple[str, nn.Parameter]]]:
    """Cut into matrices that lie side by side, for a product that they share: they go on doing so if no bucket ends between them and
    they need no padding (``ALIGN``). Others are alone.
    """
    out: list[list[tuple[str, nn.Parameter]]] = []
    for name, p in named:
        if out and p.ndim == 2 and side_by_side([out[-1][-1][1], p]) is not None:
            out[-1].append((name, p))
        else:
            out.append([(name, p)])
    return out


@torch.no_grad()
def _adopt(named: list[tuple[str, nn.Parameter]], holders: World) -> _Bucket:
    """A bucket that holds the values of ``named``; the parameters become views of it. Its master is the part of this of its ``holders``."""
    at, end = {}, 0
    for name, p in named:
        at[name] = end
        end += -(-p.numel() // ALIGN) * ALIGN
    end = -(-end // (LINE * holders.size)) * LINE * holders.size
    first = named[0][1]
    values = torch.zeros(end, dtype=first.dtype, device=first.device)
    for name, p in named:
        view = values[at[name] : at[name] + p.numel()].view(p.shape)
        view.copy_(p)
        p.data = view
    master = nn.Parameter(holders.part(values).float())  # the memory itself if it is float32
    gradients = torch.zeros(end, dtype=torch.float32, device=first.device)
    master.grad = holders.part(gradients)
    return _Bucket(master, values, gradients, at)
