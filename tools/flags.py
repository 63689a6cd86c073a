"""Flag types: an unusable value is refused by flag name, with exit code 2, before anything is
opened or loaded.
"""

from __future__ import annotations

import math
from typing import Any

import click

from dspark.cache.shared import process


class Finite(click.FloatRange):
    """A range of numbers without nan and inf, which compare with no bound or pass a missing one."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class Temperature(Finite):
    """0 (greedy), or a temperature that both engines sample at. vLLM silently raises anything
    smaller to 0.01; float32 logits divided by much less overflow.
    """

    LEAST = 0.01

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = super().convert(value, param, ctx)
        if 0 < number < self.LEAST:
            self.fail(f"{value} is neither 0 (greedy) nor {self.LEAST} or more.", param, ctx)
        return number


class Device(click.ParamType):  # type: ignore[type-arg]  # no generic before click 8.4
    """auto, cpu, cuda or cuda:N. torch checks whether this machine has it when it is used."""

    name = "DEVICE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not process.DEVICE.fullmatch(value):
            self.fail(f"{value!r} is not {process.DEVICE_WORDS}.", param, ctx)
        return str(value)


SHARE = Finite(min=0, max=1)
COUNT = click.IntRange(min=1)
COUNT_OR_ALL = click.IntRange(min=0)  # 0: every one
TOKEN_ID = click.IntRange(min=0)
SEED = click.IntRange(min=0, max=2**32 - 1)  # vLLM seeds numpy too, which takes no more
DEVICE = Device()
