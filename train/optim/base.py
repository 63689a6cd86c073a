"""What every optimizer shares: the learning rate, the snapshot of a checkpoint, and the interfaces
of optimizers and rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from dspark.cache.errors import TrainError

MOMENTS = ("exp_avg", "exp_avg_sq")
# Returns a float32 tensor of a shape on the host, with any values.
Empty = Callable[[torch.Size], Tensor]


WSD_DECAY = 0.2  # share of the steps in which ``wsd`` falls


def learning_rate(
    step: int,
    total: int,
    peak: float,
    warmup_ratio: float,
    min_ratio: float,
    schedule: str = "cosine",
) -> float:
    """Return the learning rate of step ``step`` (0-based) of ``total``: linear warm-up to ``peak``,
    then as ``schedule`` says.

    ``cosine`` and ``linear`` fall to ``min_ratio * peak`` from there, ``wsd`` linearly over the
    last ``WSD_DECAY`` of the steps, and ``constant`` stays.
    """
    warm = max(1, round(total * warmup_ratio)) if warmup_ratio else 0
    if step < warm:
        return peak * (step + 1) / warm
    done = min(1.0, (step - warm) / max(1, total - warm))
    if schedule == "constant":
        return peak
    if schedule == "wsd":
        start = max(warm, total - max(1, round(total * WSD_DECAY)))
        done = max(0.0, (step - start) / max(1, total - start))
    left = 0.5 * (1.0 + math.cos(math.pi * done)) if schedule == "cosine" else 1.0 - done
    return peak * (min_ratio + (1.0 - min_ratio) * left)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Masters and moments, name -> whole float32 tensor, the same for any strategy and number of
    ranks; ``updates``: steps taken.

    An optimizer has each kind of moment for some or all of its parameters.
    """

    masters: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Tensor]]
    updates: int

    def non_finite(self) -> str | None:
        """Say which of the tensors has a NaN or an infinity; None if none has. One pass over
        each.
        """
        for what, tensors in {"weight": self.masters, **self.moments}.items():
            for name, tensor in tensors.items():
                if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
                    return f"{what} {name}"
        return None

    def check(
        self, parameters: Mapping[str, Tensor], moments: Mapping[str, Collection[str]]
    ) -> None:
        """Raise TrainError unless these are tensors for exactly ``parameters``, and moments for
        those that ``moments`` names.
        """
        for what in sorted({"masters", *self.moments, *moments}):
            tensors = self.masters if what == "masters" else self.moments.get(what, {})
            names = parameters if what == "masters" else moments.get(what, ())
            there = {n: list(t.shape) for n, t in tensors.items()}
            here = {n: list(parameters[n].shape) for n in names}
            if there != here:
                differ = sorted(
                    n for n in there.keys() | here.keys() if there.get(n) != here.get(n)
                )
                shown = (f"{n} {there.get(n)} there, {here.get(n)} here" for n in differ[:3])
                raise TrainError(
                    f"the checkpoint's {what} are not this draft's: {', '.join(shown)}"
                )


class Optimizer(Protocol):
    """What the loop needs from an optimizer, sharded or not."""

    def last_row(self) -> None:
        """Note that the next backward pass is this rank's last of the step: gradients may be summed
        over ranks as they appear.
        """

    def step(self, lr: float) -> Tensor:
        """Do one update at rate ``lr`` from the sum of all ranks' gradients; returns its norm
        before clipping (0-dim, on the device).
        """

    def ready(self) -> None:
        """Wait for the model's new parameters, which only a forward pass of the whole model waits
        for by itself. No collective call.
        """

    def finite(self) -> bool:
        """Tell whether all values that this rank holds of a snapshot are finite: one pass on the
        device.
        """

    def snapshot_bytes(self) -> int:
        """Return the size of a snapshot on rank 0."""

    def snapshot(self, empty: Empty = torch.empty) -> Snapshot:
        """Return copies on the CPU for a checkpoint, complete on rank 0 (a collective call; empty
        elsewhere). Their memory comes from ``empty``; no later step changes it.
        """

    def load(self, snapshot: Snapshot) -> None:
        """Restore what ``snapshot`` returned, and the model's parameters with it."""


class Rule(Protocol):
    """How some ``masters`` change in a step. ``moments`` names the tensors it keeps per master,
    with the master's shape.
    """

    masters: list[nn.Parameter]
    moments: tuple[str, ...]
    updates: int

    def update(self, lr: float, norm: Tensor) -> None:
        """One step with the gradients in ``.grad``, which have global norm ``norm`` over all rules'
        masters; it may overwrite them.
        """

    def moment(self, name: str, master: nn.Parameter) -> Tensor:
        """The tensor itself, not a copy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamSettings:
    """What stays the same over a run; ``clip``: the global norm that gradients are clipped to. Muon
    uses its decay and clipping too.
    """

    betas: tuple[float, float]
    weight_decay: float
    clip: float


def excess(norm: Tensor, clip: float) -> Tensor:
    """Return what gradients of global norm ``norm`` are divided by to clip them, 0-dim float32."""
    return ((norm + 1e-6) / clip).clamp(min=1.0).float()


@torch.no_grad()
def all_finite(rules: Iterable[Rule]) -> bool:
    """As ``Optimizer.finite``, for masters and moments of ``rules``."""
    held = [
        t
        for rule in rules
        for p in rule.masters
        for t in (p, *(rule.moment(m, p) for m in rule.moments))
    ]
    ends = [end for t in held if t.numel() for end in torch.aminmax(t)]
    return not ends or bool(torch.stack(ends).isfinite().all())


def start_copy(tensor: Tensor, empty: Empty) -> Tensor:
    """Start copying ``tensor`` to the host; the copy is complete after ``copied``."""
    return empty(tensor.shape).copy_(tensor.detach(), non_blocking=True)


def copied(device: torch.device) -> None:
    """Wait until the copies from ``device`` that were started are complete."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def squares(tensors: list[Tensor]) -> Tensor:
    """Return the sum of all squares, float64 0-dim. Rows first, then in float64: a CPU sums a long
    float32 vector to only five digits.
    """
    rows = torch.cat([torch.linalg.vector_norm(t, dim=-1).flatten() for t in tensors])
    return rows.double().square().sum()
