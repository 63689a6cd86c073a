"""AdamW on float32 master weights, whatever dtype the model computes in; warm-up and cosine; clipping by the global norm.

Where the model is float32 its parameters are the masters. Where it is bfloat16 each parameter has a float32 master, and gradients are
added to the master's as soon as backward makes them: rows of a step accumulate in float32 and the bfloat16 gradient is freed at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dspark.cache.errors import TrainError


def learning_rate(step: int, total: int, peak: float, warmup_ratio: float, min_ratio: float) -> float:
    """Rate of optimizer step ``step`` (0-based) of ``total``: linear warm-up, then cosine to ``min_ratio * peak``."""
    warm = max(1, round(total * warmup_ratio)) if warmup_ratio else 0
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / max(1, total - warm)
    return peak * (min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done))))


class MasterAdamW:
    """AdamW over ``named`` parameters. ``masters``: name -> float32 tensor, what a checkpoint stores."""

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float],
        weight_decay: float,
        clip: float,
    ) -> None:
        self.parameters = {n: p for n, p in named if p.requires_grad}
        self.clip = clip
        self.masters: dict[str, nn.Parameter] = {}
        for name, p in self.parameters.items():
            if p.dtype == torch.float32:
                self.masters[name] = p
                continue
            master = nn.Parameter(p.detach().float().clone())
            self.masters[name] = master
            p.register_post_accumulate_grad_hook(_moves_gradient_to(master))  # type: ignore[no-untyped-call]
        cuda = any(p.is_cuda for p in self.masters.values())
        self.adam = torch.optim.AdamW(
            self.masters.values(),
            lr=0.0,
            betas=betas,
            weight_decay=weight_decay,
            fused=cuda,
            foreach=False if not cuda else None,
        )

    def step(self, lr: float) -> Tensor:
        """One update at rate ``lr``; returns the gradient's global norm before clipping (0-dim, on the device)."""
        for group in self.adam.param_groups:
            group["lr"] = lr
        norm = nn.utils.clip_grad_norm_(list(self.masters.values()), self.clip)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, p in self.parameters.items():
                if self.masters[name] is not p:
                    p.copy_(self.masters[name])
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {"adam": self.adam.state_dict(), "names": list(self.masters)}

    def load(self, masters: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Restore masters, model parameters and moments from a checkpoint."""
        if state["names"] != list(self.masters) or set(masters) != set(self.masters):
            raise TrainError(f"the checkpoint holds {sorted(masters)}, this draft has {sorted(self.masters)}")
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(masters[name])
                self.parameters[name].copy_(master)
        self.adam.load_state_dict(state["adam"])


def _moves_gradient_to(master: nn.Parameter) -> Any:
    def hook(p: Tensor) -> None:
        assert p.grad is not None
        if master.grad is None:
            master.grad = p.grad.float()
        else:
            master.grad += p.grad
        p.grad = None

    return hook
