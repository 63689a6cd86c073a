"""The type of flags that name layers."""

from __future__ import annotations

from typing import Any

import click

from dspark.cache.errors import DsparkError
from dspark.cache.target.taps import parse_ids


class LayerIds(click.ParamType):  # type: ignore[type-arg]  # no generic before click 8.4
    """Commas or one quoted list."""

    name = "IDS"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        flag = param.opts[0] if param else "layers"
        try:
            return parse_ids(value, flag)
        except DsparkError as error:
            self.fail(str(error), param, ctx)
