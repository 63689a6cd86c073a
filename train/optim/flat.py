"""Float32 master weights, whatever dtype the model computes in, in flat buffers for the rules that
update them: AdamW in adamw.py, Muon in muon.py.

Everything is flat: the parameters of the model are views into a few buckets, and masters, gradients
and moments have the buckets' shape. So a step is a handful of kernels however many tensors the
draft has, it never waits for the GPU, and the gradients of several ranks are summed one bucket at a
time, as the backward pass of the step's last row produces them (if compiled as a whole, at its
end). If the model is float32, its parameters are the masters. If it is bfloat16, each gradient is
added to the float32 buffer as soon as the backward pass has computed it (the step's first replaces
what is there): rows of a step accumulate in float32 and the bfloat16 gradient is freed at once.
Bytes per trained parameter, bfloat16: 2 + 4 (master) + 4 (gradient) + 8 (moments); float32: 4 + 4
+ 8.

``shared``: each of several ranks holds only the master and the moments of its part of every bucket
(ZeRO's scheme). Sums are scattered rather than replicated, each rank updates its part, and the new
values are gathered: less to send than whole sums, a fraction of the update's time, 2 + 4 + 12 /
ranks bytes. Forward and backward are those of one process; the values that a forward pass reads
last may still be on their way when it begins (``follow``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dspark.train.distributed import World
from dspark.train.ops.joined import side_by_side
from dspark.train.ops.summed import add_to
from dspark.train.optim.base import Empty, Rule, Snapshot, all_finite, copied, squares, start_copy

# elements per bucket, at least one parameter: 256 MB of gradients in one all-reduce
BUCKET = 1 << 26
ALIGN = (
    # elements; every parameter starts at a multiple, as the GPU's matrix units and vector loads
    # like it
    64
)
# elements; a rank's part of a bucket is whole lines, whose norms are taken first: a GPU reads them
# at its memory's speed
LINE = 4096


@dataclass(slots=True, eq=False)
class _Bucket:
    """``values``: what the model computes with, flat [n]; ``gradients`` float32[n]. ``master`` is
    float32, all of the bucket or this rank's part, its ``grad`` a view of ``gradients``; where the
    model is float32 it lies in ``values`` itself. ``old``: parameters whose gradient is still that
    of an earlier step, until a row of this one brings it (a float32 model's are zero instead).
    """

    master: nn.Parameter
    values: Tensor
    gradients: Tensor
    at: dict[str, int] = field(default_factory=dict)
    awaited: int = 0  # gradients that the last backward pass has still to compute
    sum: Any = None  # the collective in progress
    gathering: Any = None  # the one that brings the other ranks' ``values``
    old: set[str] = field(default_factory=set)
    gaps: list[slice] = field(default_factory=list)  # between the parameters


class FlatOptimizer:
    """Masters of ``named`` parameters, whole on every rank of ``world`` or ``shared`` out; their
    storage moves into flat buckets, which rules update.

    ``apart`` says of a parameter whether it lies in buckets of its own kind, for a rule of its own;
    a subclass sets ``_rules``.
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
        # In the order in which backward makes gradients, last layer first, so that the first bucket
        # is complete early. Parameters apart come behind the others, and buckets are sent in this
        # order, so theirs wait for the others' last gradient.
        backward = list(self.parameters.items())[::-1]
        kinds = [[(n, p) for n, p in backward if apart(n, p) is kind] for kind in (False, True)]
        self._buckets = [_adopt(group, self._holders) for kind in kinds for group in _groups(kind)]
        self._of = {name: bucket for bucket in self._buckets for name in bucket.at}
        self._summing, self._sent = False, 0
        self._gathered_late = list[_Bucket]()  # all of ``follow``, in the order of their use
        for name, p in self.parameters.items():
            if p.dtype == torch.float32:
                p.grad = self._view(self._of[name].gradients, name)  # autograd adds in place
            p.register_post_accumulate_grad_hook(self._hook(self._of[name], name))  # type: ignore[no-untyped-call]

    @property
    def masters(self) -> dict[str, Tensor]:
        """Return name -> float32 master, as views; for an optimizer that is not shared."""
        assert self._holders.size == 1
        return {n: self._view(self._of[n].master.detach(), n) for n in self.parameters}

    def _view(self, flat: Tensor, name: str) -> Tensor:
        p, start = self.parameters[name], self._of[name].at[name]
        return flat[start : start + p.numel()].view(p.shape)

    def follow(self, parts: Iterable[tuple[nn.Module, Collection[str]]]) -> None:
        """Let ``step`` return while new values of shared masters are still being gathered: each of
        ``parts``, modules in the order of their use, waits before its forward pass for the
        parameters of these names. Whoever reads values otherwise calls ``ready`` first. Hooks are
        installed, so a module must not be compiled together with its hooks (``Module.compile``).
        """
        if self._holders.size == 1:
            return
        for module, names in parts:
            buckets = list(dict.fromkeys(self._of[n] for n in names if n in self._of))
            self._gathered_late += [b for b in buckets if b not in self._gathered_late]
            module.register_forward_pre_hook(lambda _, inputs, own=buckets: _arrive(own))
        assert len(self._gathered_late) == len(self._buckets), "a parameter is no part's"

    def ready(self) -> None:
        """As ``Optimizer.ready``."""
        _arrive(self._buckets)

    def _hook(self, bucket: _Bucket, name: str) -> Any:
        view = self._view(bucket.gradients, name)

        def arrived(p: Tensor) -> None:
            if p.dtype != torch.float32:
                assert p.grad is not None
                add_to(view, p.grad, first=name in bucket.old)
                bucket.old.discard(name)
                p.grad = None
            if self._summing:
                bucket.awaited -= 1
                while self._sent < len(self._buckets) and self._buckets[self._sent].awaited == 0:
                    self._send()

        return arrived

    def _send(self) -> None:
        """Start the sum of the next bucket. Always in the same order, whichever gradients a rank
        has: collectives must match.
        """
        bucket = self._buckets[self._sent]
        self._complete(bucket)
        start = self.world.start_sum_of_part if self._holders.size > 1 else self.world.start_sum
        bucket.sum = start(bucket.gradients)
        self._sent += 1

    def _complete(self, bucket: _Bucket) -> None:
        """Zero the gradients that no row of this step has brought."""
        for name in bucket.old:
            self._view(bucket.gradients, name).zero_()
        bucket.old.clear()

    def last_row(self) -> None:
        self._summing, self._sent = self.world.size > 1, 0
        for bucket in self._buckets:
            bucket.awaited = len(bucket.at)

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        """As ``Optimizer.step``."""
        self.ready()  # a rank without a row has not waited
        if self.world.size > 1:
            while self._sent < len(self._buckets):  # all of them where this rank had no row
                self._send()
            for bucket in self._buckets:
                bucket.sum.wait()
        else:
            for bucket in self._buckets:
                self._complete(bucket)
        self._summing, self._sent = False, 0
        own = [self._holders.part(b.gradients).view(-1, LINE) for b in self._buckets]
        norm = self._holders.sum_(squares(own)).sqrt()
        for rule in self._rules:
            rule.update(lr, norm)
        self._refresh()
        for bucket in self._buckets:
            _forget(bucket)
        return norm

    @torch.no_grad()
    def _refresh(self) -> None:
        """Update the model's parameters from the masters."""
        for bucket in self._gathered_late or self._buckets:
            if bucket.values.dtype != torch.float32:
                self._holders.part(bucket.values).copy_(bucket.master)
            bucket.gathering = self._holders.start_gather(bucket.values)
        if not self._gathered_late:
            self.ready()

    def finite(self) -> bool:
        """As ``Optimizer.finite``."""
        return all_finite(self._rules)

    def snapshot_bytes(self) -> int:
        """As ``Optimizer.snapshot_bytes``."""
        held = {id(b.master): sum(map(self._numel, b.at)) for b in self._buckets}
        kinds = [list(held), *map(list, self._moments().values())]
        return 4 * sum(held[key] for keys in kinds for key in keys)

    def _numel(self, name: str) -> int:
        return self.parameters[name].numel()

    def _whole(self, part: Tensor) -> Tensor:
        """Join the ``part`` of a bucket that each holder has, on the device (a collective
        call).
        """
        if self._holders.size == 1:
            return part.detach()
        whole = part.new_empty(self._holders.size * part.numel(), requires_grad=False)
        self._holders.part(whole).copy_(part.detach())
        return self._holders.gather_(whole)

    def snapshot(self, empty: Empty = torch.empty) -> Snapshot:
        self.ready()
        if self.world.rank and self._holders.size == 1:
            return Snapshot({}, {}, 0)

        def copies(flat: Mapping[int, Tensor]) -> dict[str, Tensor]:
            out = dict[str, Tensor]()
            for bucket in self._buckets:
                if id(bucket.master) in flat:
                    whole = self._whole(flat[id(bucket.master)])
                    if self.world.first:
                        out |= {n: start_copy(self._view(whole, n), empty) for n in bucket.at}
            return {n: out[n] for n in self.parameters if n in out}

        moments = {m: copies(flat) for m, flat in self._moments().items()}
        masters = copies({id(b.master): b.master for b in self._buckets})
        copied(self._buckets[0].values.device)
        return Snapshot(masters, moments, self._rules[0].updates)

    def _moments(self) -> dict[str, dict[int, Tensor]]:
        """Return kind of moment -> id of a bucket's master -> its tensor."""
        return {
            m: {id(p): rule.moment(m, p) for p in rule.masters}
            for rule in self._rules
            for m in rule.moments
        }

    @torch.no_grad()
    def load(self, snapshot: Snapshot) -> None:
        moments = self._moments()
        holds = {
            m: [n for n, b in self._of.items() if id(b.master) in flat]
            for m, flat in moments.items()
        }
        snapshot.check(self.parameters, holds)
        self.ready()
        # Nothing is gathered, so no rank waits for one that cannot read the checkpoint.
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
        """Return ``bucket``'s parameters in their order there, on the CPU."""
        whole = torch.zeros(bucket.values.numel())
        for name in bucket.at:
            self._view(whole, name).copy_(tensors[name])
        return whole


def _arrive(buckets: Iterable[_Bucket]) -> None:
    """Wait for the values of ``buckets`` that are being gathered."""
    for bucket in buckets:
        if bucket.gathering is not None:
            bucket.gathering.wait()
            bucket.gathering = None


def _forget(bucket: _Bucket) -> None:
    """Prepare ``gradients`` for the next step. A sum over ranks may have left anything in them."""
    if bucket.values.dtype == torch.float32:
        bucket.gradients.zero_()
        return
    bucket.old.update(bucket.at)
    for gap in bucket.gaps:
        bucket.gradients[gap].zero_()


def _groups(named: list[tuple[str, nn.Parameter]]) -> list[list[tuple[str, nn.Parameter]]]:
    """Group neighbours of one dtype and device, at most ``BUCKET`` elements unless an indivisible
    group has more.
    """
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
    """Group matrices that are adjacent for a product that they share: they stay adjacent if no
    bucket ends between them and they need no padding (``ALIGN``). Other parameters are alone.
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
    """Make a bucket with the values of ``named``; the parameters become views of it. Its master is
    this rank's part among its ``holders``.
    """
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
    bucket = _Bucket(master, values, gradients, at, gaps=_gaps(named, at, end))
    _forget(bucket)
    return bucket


def _gaps(named: list[tuple[str, nn.Parameter]], at: Mapping[str, int], end: int) -> list[slice]:
    """Return where a bucket of ``end`` elements has padding, behind a parameter or at its end."""
    stops = [at[name] + p.numel() for name, p in named]
    starts = [*(at[name] for name, _ in named[1:]), end]
    return [slice(a, b) for a, b in zip(stops, starts, strict=True) if a < b]
