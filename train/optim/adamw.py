"""AdamW: the rule over float32 masters, and the optimizer of a whole draft."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dspark.train.distributed import World
from dspark.train.optim.base import MOMENTS, AdamSettings, excess
from dspark.train.optim.flat import FlatOptimizer


class Adam:
    """AdamW and clipping over given float32 ``masters``, whose ``.grad`` the caller sets."""

    moments: tuple[str, ...] = MOMENTS

    def __init__(self, masters: list[nn.Parameter], settings: AdamSettings) -> None:
        self.clip, self.masters = settings.clip, masters
        # One multi-tensor kernel, on CPU and CUDA; eager AdamW is a dozen passes over the same
        # memory.
        self._adam = torch.optim.AdamW(
            masters, lr=0.0, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
        )
        for p in masters:
            moments = {name: torch.zeros_like(p, requires_grad=False) for name in MOMENTS}
            self._adam.state[p] = {"step": torch.zeros((), device=p.device), **moments}

    def update(self, lr: float, norm: Tensor) -> None:
        """One step with gradients of global norm ``norm``. The kernel itself divides by the
        clipping factor, so nothing is read back.
        """
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
