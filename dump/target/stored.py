"""Read a matrix of a checkpoint as numbers, whatever form it is stored in: 16 or 32 bits, fp8,
packed int, NVFP4, GPTQ.

Legend: V rows, H columns, G groups of a row. Quantised forms come back in bfloat16, the precision
they are served in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dspark.cache.errors import TargetError
from dspark.dump.target.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

FP8 = ("F8_E4M3", "F8_E5M2", "FLOAT8_E4M3FN", "FLOAT8_E5M2")
PLAIN = ("BF16", "F16", "F32", "F64")
BLOCK = (128, 128)  # DeepSeek's fp8 blocks, where the config does not say


def form_of(checkpoint: Checkpoint, module: str) -> str:
    """Describe the form of a module's matrix, from the headers alone. Raises TargetError for an
    unsupported form.
    """
    names = checkpoint.tensors
    weight = names.get(f"{module}.weight")
    if weight is not None and (weight.dtype is None or weight.dtype in PLAIN):
        return weight.dtype or "not known before it is read"
    if weight is not None and weight.dtype in FP8:
        scale = next(
            (s for s in ("weight_scale_inv", "weight_scale", "scale") if f"{module}.{s}" in names),
            None,
        )
        if scale is not None:
            return f"fp8 with {scale}"
    if weight is not None and weight.dtype == "U8" and f"{module}.weight_scale_2" in names:
        return "NVFP4"
    packed = names.get(f"{module}.weight_packed")
    if packed is not None and packed.dtype == "U8" and f"{module}.weight_global_scale" in names:
        return "NVFP4"
    if packed is not None and packed.dtype == "I32" and f"{module}.weight_scale" in names:
        return "packed int"
    if {f"{module}.{n}" for n in ("qweight", "qzeros", "scales")} <= set(names) and names[
        f"{module}.qweight"
    ].dtype == "I32":
        return "GPTQ" if f"{module}.g_idx" in names else "AWQ"
    stored = {n: names[n].dtype for n in sorted(names) if n.rpartition(".")[0] == module}
    raise TargetError(
        f"{checkpoint.model}: {module} is stored as {stored}, which is not supported here. Use a "
        "checkpoint of the same model whose embedding and "
        "head have 16 bits."
    )


def read_matrix(
    checkpoint: Checkpoint, module: str, rows: int, columns: int, quantization: Mapping[str, Any]
) -> torch.Tensor:
    """Read the matrix [V, H] of ``module`` without padded rows beyond V. ``quantization``: the
    config's ``quantization_config``.
    """
    import torch

    form = form_of(checkpoint, module)
    if form == "AWQ":
        raise TargetError(
            f"{checkpoint.model}: {module} is packed in the AWQ format, which is not supported "
            "here. Use a checkpoint with a 16-bit head."
        )
    parts = {
        n.rpartition(".")[2]: checkpoint.read(n)
        for n in checkpoint.tensors
        if n.rpartition(".")[0] == module
    }
    try:
        if form.startswith("fp8"):
            tensor = _fp8(parts, quantization)
        elif form == "NVFP4":
            tensor = _nvfp4(parts, columns)
        elif form == "packed int":
            tensor = _packed_int(parts, columns)
        elif form == "GPTQ":
            tensor = _gptq(parts, quantization)
        else:
            tensor = parts["weight"]
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        sizes = {n: list(t.shape) for n, t in parts.items()}
        raise TargetError(
            f"{checkpoint.model}: {module} ({form}) cannot be read from {sizes}: {error}"
        ) from error
    if tensor.ndim != 2 or tensor.shape[0] < rows or tensor.shape[1] != columns:
        raise TargetError(
            f"{checkpoint.model}: {module} has shape {list(tensor.shape)}, expected [{rows}, "
            f"{columns}] (more rows are padding)."
        )
    if tensor.dtype == torch.float64:
        tensor = tensor.float()
    return tensor[:rows].contiguous()


def _fp8(parts: Mapping[str, torch.Tensor], quantization: Mapping[str, Any]) -> torch.Tensor:
    """Read fp8 with one scale, one per row, or one per block (``weight_scale_inv`` is a factor of
    the stored value, too).
    """
    import torch

    weight = parts["weight"].float()
    scale = next(
        parts[n] for n in ("weight_scale_inv", "weight_scale", "scale") if n in parts
    ).float()
    if scale.ndim == 1 and scale.numel() == weight.shape[0]:
        scale = scale[:, None]
    if scale.ndim == 2 and scale.shape[1] > 1:
        block = quantization.get("weight_block_size") or BLOCK
        if [-(-n // b) for n, b in zip(weight.shape, block, strict=True)] != list(scale.shape):
            raise ValueError(f"scales {list(scale.shape)} do not fit blocks of {list(block)}")
        scale = scale.repeat_interleave(block[0], 0)[: weight.shape[0]]
        scale = scale.repeat_interleave(block[1], 1)[:, : weight.shape[1]]
    elif scale.numel() not in (1, weight.shape[0]):
        raise ValueError(f"scales {list(scale.shape)} are neither one, nor one per row or block")
    return (weight * scale).to(torch.bfloat16)


def _packed_int(parts: Mapping[str, torch.Tensor], columns: int) -> torch.Tensor:
    """Read compressed-tensors' ``pack-quantized``: signed ints of b bits along a row, scales [V,
    G].
    """
    import torch

    unpack = _library("pack_quantized").unpack_from_int32
    packed, scale = parts["weight_packed"], parts["weight_scale"].float()
    bits = packed.shape[1] * 32 // columns
    values: torch.Tensor = unpack(packed, bits, torch.Size((packed.shape[0], columns))).float()
    if "weight_zero_point" in parts:
        zero = parts["weight_zero_point"]
        if zero.dtype == torch.int32 and zero.shape != scale.shape:
            zero = unpack(zero, bits, torch.Size(scale.shape), packed_dim=0)
        values -= _widened(zero.float(), columns)
    return (values * _widened(scale, columns)).to(torch.bfloat16)


def _nvfp4(parts: Mapping[str, torch.Tensor], columns: int) -> torch.Tensor:
    """Read NVFP4: two fp4 values per byte, an fp8 scale per 16 of them, and one global scale: a
    divisor in compressed-tensors, a factor in ModelOpt.
    """
    import torch

    unpack = _library("nvfp4").unpack_fp4_from_uint8
    packed = parts["weight_packed"] if "weight_packed" in parts else parts["weight"]
    values: torch.Tensor = unpack(packed, packed.shape[0], columns, torch.float32)
    whole = (
        1 / parts["weight_global_scale"].float()
        if "weight_global_scale" in parts
        else parts["weight_scale_2"].float()
    )
    scale = _widened(parts["weight_scale"].float() * whole, columns)
    return (values * scale).to(torch.bfloat16)


def _gptq(parts: Mapping[str, torch.Tensor], quantization: Mapping[str, Any]) -> torch.Tensor:
    """``qweight`` packed along the input, scales and zeros [G, V], ``g_idx`` [H]: the group of an
    input channel.
    """
    import torch

    qweight, scales, group = parts["qweight"], parts["scales"].float(), parts["g_idx"].long()
    bits = qweight.shape[0] * 32 // group.numel()
    shifts = torch.arange(0, 32, bits)
    mask = (1 << bits) - 1
    values = ((qweight[:, None, :] >> shifts[None, :, None]) & mask).flatten(0, 1)
    zeros = ((parts["qzeros"][:, :, None] >> shifts) & mask).flatten(1)[:, : scales.shape[1]]
    if quantization.get("checkpoint_format") != "gptq_v2":
        zeros = zeros + 1  # the first format stores one less
    out = (values - zeros[group]).float() * scales[group]
    return out.T.to(torch.bfloat16)


def _widened(scale: torch.Tensor, columns: int) -> torch.Tensor:
    """Scales [V, G] or [V, 1] -> [V, H]."""
    if scale.shape[1] == 1 or scale.shape[1] == columns:
        return scale
    return scale.repeat_interleave(-(-columns // scale.shape[1]), 1)[:, :columns]


def _library(name: str) -> Any:
    """Import compressed-tensors, which knows the layout of its packed forms."""
    import importlib

    try:
        return importlib.import_module(f"compressed_tensors.compressors.{name}")
    except ImportError as error:
        raise TargetError(
            "the output head or embedding is packed by compressed-tensors, which is not "
            "installed: pip install compressed-tensors"
        ) from error
