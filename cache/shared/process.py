"""The device of a process: which one it may use, which GPU is its current one, which attention
kernels suit it, and how arrays get there.

torch is imported only where it is needed, so that flags can be checked without it.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.cache.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch

DEVICE_WORDS = "auto, cpu, cuda or cuda:N"
DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
# One of them exists if a driver of NVIDIA, AMD or WSL is running.
GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def device_type(device: str, flag: str = "--device") -> str:
    """Return ``cpu`` or ``cuda``, as ``choose_device`` would; torch, which takes seconds to import,
    is consulted only if there may be a GPU.
    """
    if device == "cpu" or (device == "auto" and "torch" not in sys.modules and not _may_have_gpu()):
        return "cpu"
    return choose_device(device, flag).type


def _may_have_gpu() -> bool:
    if not sys.platform.startswith("linux"):
        return True
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return False
    return any(Path(f).exists() for f in GPU_FILES)


def choose_device(device: str, flag: str = "--device") -> torch.device:
    """Return the device that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` means here; ``auto``: cuda
    if there is a GPU.

    Raises UsageError for any other word, and for a GPU that torch does not see.
    """
    import torch

    if not DEVICE.fullmatch(device):
        raise UsageError(f"{flag} {device}: expected {DEVICE_WORDS}")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(
                f"{flag} {device}: torch sees no CUDA device (torch {torch.__version__}); use "
                f"{flag} cpu"
            )
        if chosen.index is not None and chosen.index >= torch.cuda.device_count():
            raise UsageError(
                f"{flag} {device}: torch sees {torch.cuda.device_count()} CUDA devices, counted "
                "from 0"
            )
    return chosen


def make_current(device: torch.device | str) -> None:
    """Make ``device`` the process's current one, if it is a GPU by number.

    torch's own operations follow their tensors. Triton's kernels and
    ``torch.cuda.current_stream()`` follow the current device, which is GPU 0 until changed: a
    kernel would be started there on another GPU's memory, and a stream would wait for nothing.
    """
    import torch

    chosen = torch.device(device)
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)


def by_number(device: torch.device | str) -> torch.device:
    """Return ``device``, a GPU by its number: ``cuda`` alone is this thread's current GPU, which in
    a new thread is the first one until ``make_current``.
    """
    import torch

    chosen = torch.device(device)
    if chosen.type == "cuda" and chosen.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


def no_plan_a_shape() -> None:
    """Keep cuDNN out of ``scaled_dot_product_attention`` in this process.

    torch prefers it on Hopper. cuDNN builds a plan for every new shape, which costs the launching
    thread tens of milliseconds, and a dump's batches, a score's groups of anchors and a decoder's
    steps have a new shape nearly every time: a dump was launch-bound at 240 k tokens/s on an H100
    whose warm shapes ran at 540 k (docs/log/2026-11-22-speed-before-kernels.md). The flash kernel
    needs no plan.
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)


def quiet_transformers() -> None:
    """Keep transformers' own progress bars and notes off the screen: a command prints its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def send(array: np.ndarray[tuple[int, ...], np.dtype[Any]], device: torch.device) -> torch.Tensor:
    """Send a numpy array to ``device``, without waiting for work queued there."""
    import torch

    out = torch.from_numpy(array)
    if device.type == "cuda":  # from other memory the copy would wait
        return out.pin_memory().to(device, non_blocking=True)
    return out.to(device)
