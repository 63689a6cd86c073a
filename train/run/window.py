"""The metrics of a logged step, read once the device has them. Reading a value waits for the
device, and a device with nothing queued then idles until the next step's first kernels arrive,
longer on a slow host. So a logged step only starts the copies (``Logged.begin``), and the loop
reads them (``Logged.row``) when it has queued the step that follows. Ranks add up their numbers
then, on the host: a sum on the devices would wait for the weights that are still being gathered.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dspark.train.distributed import World
from dspark.train.objective.metrics import SlotMetrics
from dspark.train.run.checkpoint import Position
from dspark.train.run.setup import Run


class Moment:
    """The end of what is currently queued on ``device``, on the device's own clock; on a CPU, the
    present time.
    """

    def __init__(self, device: torch.device) -> None:
        self._event: Any = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))
        self._now = time.perf_counter()

    def wait(self) -> None:
        """Wait until the device has reached it."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_after(self, earlier: Moment) -> float:
        """Return the seconds between two past moments (``wait``) of one device."""
        if self._event is None:
            return self._now - earlier._now
        return 1e-3 * float(earlier._event.elapsed_time(self._event))


@dataclass(slots=True)
class Window:
    """The steps between two logged rows: when they began, how many there were, the tokens of all
    ranks; ``waited`` is the feed's count at its start, in seconds.
    """

    started: Moment
    waited: float = 0.0
    tokens: int = 0
    done: list[Position] = field(default_factory=list)  # after each of its steps
    states: list[Tensor] = field(default_factory=list)  # the largest of each


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """A logged step in flight: ``row`` returns its metrics over all ranks; what is here is this
    rank's own. ``states``: of each step of the window the largest state.
    """

    world: World
    window: Window
    position: Position
    epoch: float
    lr: float
    waited: float
    peak: float
    metrics: SlotMetrics
    norm_and_loss: Tensor
    states: Tensor
    ended: Moment

    @classmethod
    def begin(
        cls,
        run: Run,
        position: Position,
        metrics: SlotMetrics,
        norm_and_loss: Tensor,
        lr: float,
        window: Window,
        waited: float,
    ) -> Logged:
        """Start the copies for the step just queued, with ``metrics`` of this rank's rows and
        ``norm_and_loss`` float32[3] from ``step``; ``waited`` is the feed's current count. Nothing
        here waits for the device or another rank.
        """
        device = run.compute.device
        sums, values, states = (
            metrics.to_host(),
            norm_and_loss.to("cpu", non_blocking=True),
            torch.stack(window.states).to("cpu", non_blocking=True),
        )
        epoch = position.epoch + position.epoch_step / max(1, run.stream.steps(position.epoch))
        return cls(
            world=run.world,
            window=window,
            position=position,
            epoch=round(epoch, 4),
            lr=lr,
            waited=waited - window.waited,
            peak=_peak(device),
            metrics=sums,
            norm_and_loss=values,
            states=states,
            ended=Moment(device),  # behind the copies
        )

    def row(self) -> dict[str, Any]:
        """Return the row of metrics.jsonl: losses of the step, speed of its window. Waits until the
        device has done the step. A collective call, on the host.
        """
        self.ended.wait()
        grad_norm, loss, _ = self.norm_and_loss.tolist()
        loss, *sums = self.world.sum([loss, *self.metrics.sums.tolist()])
        self.metrics.sums.copy_(torch.tensor(sums, dtype=torch.float64))
        waited, peak = self.world.max([self.waited, self.peak])
        seconds = self.ended.seconds_after(self.window.started)
        values = self.metrics.result()
        return {
            "step": self.position.step,
            "epoch": self.epoch,
            "loss": loss,
            **{
                k: values[k]
                for k in (
                    "ce_loss",
                    "l1_loss",
                    "kl_loss",
                    "confidence_loss",
                    "accept_rate",
                    "mean_accepted_length",
                )
                if k in values
            },
            "lr": self.lr,
            "grad_norm": grad_norm,
            "tokens": self.position.tokens,
            "tokens_per_second": self.window.tokens / seconds,
            "step_ms": 1000.0 * seconds / max(1, len(self.window.done)),
            # The host waits by its own clock, ahead of the device's by up to a step, which may
            # exceed a window of one step.
            "data_wait_fraction": min(1.0, waited / seconds),
            **({"peak_gb": peak} if peak else {}),
        }


def _peak(device: torch.device) -> float:
    """Return the peak GB that tensors have taken on this rank's GPU so far; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
