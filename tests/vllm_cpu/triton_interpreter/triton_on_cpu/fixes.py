"""vLLM plugin: two things the interpreter lacks for the kernels that vLLM samples with (temperature > 0).

Masks: its C++ part takes only bool ("mask has unsupported dtype" otherwise), and a mask computed with
integers, or from a 0/1 argument, is an integer there. ``log1p``: the functions of Triton's device library
have no body outside a compiler and return None.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import wraps
from typing import Any


def _with_bool_mask(method: Callable[..., Any], handle: type) -> Callable[..., Any]:
    signature = inspect.signature(method)

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        mask = bound.arguments["mask"]
        bound.arguments["mask"] = handle(mask.data.astype(bool), mask.dtype)
        return method(*bound.args, **bound.kwargs)

    return call


def apply() -> None:
    """Entry point ``vllm.general_plugins``; vLLM may call it more than once in a process."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton import language as tl
    from triton.language.extra import libdevice
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    for name in ("create_masked_load", "create_masked_store"):
        method = getattr(builder, name)
        if not hasattr(method, "__wrapped__"):
            setattr(builder, name, _with_bool_mask(method, interpreter.TensorHandle))
    libdevice.log1p = lambda x: tl.log(1.0 + x)
