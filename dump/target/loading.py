"""Load a target in transformers: on one device, or with its layers spread over several
(accelerate's ``device_map``).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from dspark.cache.errors import DsparkError, EngineError, first_line
from dspark.dump.target.checkpoint import open_checkpoint
from dspark.dump.target.weights import model_class, quantization_of

log = logging.getLogger("dspark.dump")

# Share of a GPU's free memory that weights may take; the rest is for activations and captured
# states.
WEIGHTS_SHARE = 0.8


def load_model(
    model: str,
    *,
    device: str,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    device_map: Any = None,
    offload: Path | None = None,
) -> Any:
    """Load a model id or folder as a transformers model in eval mode. ``dtype``: a torch dtype's
    name, or ``auto`` for the checkpoint's.

    ``device_map``: as in accelerate; None = only ``device``, or all GPUs if it is ``cuda`` and the
    weights are too large for one. ``offload``: folder for what a map puts on disk. A quantised
    checkpoint is loaded as it is, if transformers supports it. Raises EngineError.
    """
    import torch
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        spread = device_map if device_map is not None else choose_map(model, device)
        quantised = bool(quantization_of(config))
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        options["dtype"] = dtype if dtype == "auto" else getattr(torch, dtype)
        if spread is not None or quantised:  # a quantised model cannot be moved after it is loaded
            options["device_map"] = spread if spread is not None else {"": device}
        if offload is not None:
            options["offload_folder"] = str(offload)
        loaded = model_class(config).from_pretrained(model, **options)
        return (loaded if "device_map" in options else loaded.to(device)).eval()
    except DsparkError:
        raise
    except Exception as error:  # transformers, accelerate and quantisers raise errors of any type
        raise EngineError(
            f"transformers could not load {model} ({dtype}, {device}): {type(error).__name__}: "
            f"{error}"
        ) from error


def choose_map(model: str, device: str) -> str | None:
    """Choose ``auto`` if the weights need more than the free memory of one GPU and there are
    others; None for one device.
    """
    import torch

    if not device.startswith("cuda") or torch.cuda.device_count() < 2:
        return None
    size = weight_bytes(model)
    free = torch.cuda.mem_get_info()[0]
    if size is None or size <= WEIGHTS_SHARE * free:
        return None
    log.info("%s: %d bytes of weights over %d GPUs", model, size, torch.cuda.device_count())
    return "auto"


def weight_bytes(model: str) -> int | None:
    """Return the bytes of a checkpoint's weights, from its index or its file; None if neither
    says.
    """
    try:
        checkpoint = open_checkpoint(model)
    except DsparkError as error:
        log.debug("size of %s unknown: %s", model, first_line(error))
        return None
    if checkpoint.total_bytes is not None:
        return checkpoint.total_bytes
    files = {Path(model) / stored.file for stored in checkpoint.tensors.values()}
    sizes = [f.stat().st_size for f in files if f.is_file()]
    return sum(sizes) if sizes else None
