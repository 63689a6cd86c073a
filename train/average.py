"""An exponential moving average of the masters: what is validated and served, while training goes on from the masters themselves.

``average = k average + (1 - k) master`` after each step, with ``k = min(decay, (1 + t) / (10 + t))`` at step t, so that the average of a
short run does not remember the initial weights. Costs 4 bytes a trained parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

AVERAGE = "average"


class Average:
    """A rule (train/optim.py) that comes after those that change ``masters``."""

    moments: tuple[str, ...] = (AVERAGE,)

    def __init__(self, masters: list[nn.Parameter], decay: float) -> None:
        self.masters, self.decay, self.updates = masters, decay, 0
        self._average = {id(p): p.detach().clone() for p in masters}

    def moment(self, name: str, master: nn.Parameter) -> Tensor:
        return self._average[id(master)]

    @torch.no_grad()
    def update(self, lr: float, norm: Tensor) -> None:
        """As ``Rule.update``."""
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(list(self._average.values()), [p.detach() for p in self.masters], 1.0 - keep)

    @torch.no_grad()
    def exchange(self) -> None:
        """Masters and average change places; twice is as before."""
        for p in self.masters:
            master = p.detach().clone()
            p.copy_(self._average[id(p)])
            self._average[id(p)].copy_(master)


@contextmanager
def in_place(rules: Sequence[object], changed: Callable[[], None]) -> Iterator[None]:
    """Within it the masters hold their average, if a rule keeps one; ``changed`` is called when they have changed."""
    averages = [rule for rule in rules if isinstance(rule, Average)]

    def exchange() -> None:
        for average in averages:
            average.exchange()
        if averages:
            changed()

    exchange()
    try:
        yield
    finally:
        exchange()
