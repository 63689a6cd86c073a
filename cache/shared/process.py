"""Which GPU a process works on."""

from __future__ import annotations

import torch


def make_current(device: torch.device | str) -> None:
    """Make ``device`` the process's current one, if it is a GPU by number.

    torch's own operations follow their tensors. Triton's kernels and ``torch.cuda.current_stream()`` follow the current device, which
    is GPU 0 until somebody says otherwise: a kernel would be started there on another GPU's memory, and a stream wait for nothing.
    """
    chosen = torch.device(device)
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)
