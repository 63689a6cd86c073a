"""vLLM plugin: what the interpreter and vLLM's CPU build get wrong for a served draft (vLLM 0.32,
Triton 3.9).

Masks: the interpreter's C++ part takes only bool ("mask has unsupported dtype" otherwise), and a
mask computed with integers, or from a 0/1 argument, is an integer there. ``log1p``: functions of
Triton's device library have no body outside a compiler and return None. Both only matter for
temperature > 0.

``k_norm``: vLLM norms the context's keys of all draft layers in one ``rms_norm`` call with a weight
[layers, D]; the CPU kernel reads row 0 for every layer. With unit norms nothing is wrong; a trained
draft is off by some per cent in every layer but the first, and loses accepted tokens without any
error (vLLM #56431 is the same mistake on XPU).
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
    _norm_keys_layer_by_layer()


def _norm_keys_layer_by_layer() -> None:
    import torch
    from vllm import _custom_ops as ops
    from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model

    def normalise(self: Any, keys: torch.Tensor) -> torch.Tensor:
        """``keys`` [layers, n, heads, D], each layer with its own weight."""
        out = torch.empty_like(keys)
        for i, weight in enumerate(self._k_norm_weights):
            ops.rms_norm(out[i], keys[i], weight, self._rms_norm_eps)
        return out

    DFlashQwen3Model._normalize_context_k = normalise
