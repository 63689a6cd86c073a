"""Which attention kernels torch may choose where every call has another shape."""

from __future__ import annotations


def no_plan_a_shape() -> None:
    """Keep cuDNN out of ``scaled_dot_product_attention`` in this process.

    torch prefers it on Hopper. cuDNN builds a plan for every new shape, which costs the launching thread tens of milliseconds, and a dump's
    batches, a score's groups of anchors and a decoder's steps have a new shape nearly every time: a dump was launch-bound at 240 k tokens/s on an
    H100 whose warm shapes ran at 540 k (docs/log/2026-11-22-speed-before-kernels.md). The flash kernel needs no plan.
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)
