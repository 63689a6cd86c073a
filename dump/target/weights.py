"""The target's frozen weights and final norm straight from its checkpoint, for engines that do not hand them out.

The module tree is built without memory (meta device) and its parts are found by structure; only their few tensors are read.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.cache.errors import EngineError
from dspark.cache.target.frozen import FrozenTarget
from dspark.dump.target.config import find_parts
from dspark.dump.target.layers import Shapes

if TYPE_CHECKING:
    import torch
    from torch import nn

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def read_frozen(model: str, shapes: Shapes) -> tuple[FrozenTarget, nn.Module]:
    """Frozen weights as the checkpoint has them, and the final norm as a module that runs on the CPU."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    parts = find_parts(empty, shapes)
    names = {
        id(p): name for name, p in empty.named_parameters()
    }  # a tied weight under its first name, the embedding's
    files = weight_files(model)

    def read(module: Any) -> torch.Tensor:
        return read_tensor(files, names[id(module.weight)], tuple(module.weight.shape), model)

    embed, norm_weight = read(parts.embed), read(parts.norm)
    tied = parts.head.weight is parts.embed.weight
    norm = copy.deepcopy(parts.norm).to_empty(device="cpu")
    norm.load_state_dict({"weight": norm_weight})
    return FrozenTarget(embed, norm_weight, embed if tied else read(parts.head), tied), norm


def weight_files(model: str) -> dict[str, Path]:
    """Tensor name -> safetensors file, of a folder or of a model id (downloaded where needed)."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    index = cached_file(model, INDEX, _raise_exceptions_for_missing_entries=False)
    if index is not None:
        names = json.loads(Path(index).read_text())["weight_map"]
        # Only the files of tensors outside the decoder layers are ever fetched.
        wanted = {f for n, f in names.items() if not any(part.isdigit() for part in n.split("."))}
        paths = {f: Path(cached_file(model, f)) for f in wanted}
        return {n: paths[f] for n, f in names.items() if f in paths}
    single = cached_file(model, SINGLE, _raise_exceptions_for_missing_entries=False)
    if single is None:
        raise EngineError(
            f"{model}: looked for {INDEX} and {SINGLE}, found neither; the frozen weights cannot be read."
        )
    with safe_open(single, framework="pt") as file:
        return {name: Path(single) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping


def read_tensor(files: dict[str, Path], name: str, shape: tuple[int, ...], model: str) -> torch.Tensor:
    """Tensor ``name``; a checkpoint may carry another prefix, so the one tensor outside the layers that ends alike will do."""
    from safetensors import safe_open

    tail = ".".join(name.split(".")[-2:])
    alike = (
        [name]
        if name in files
        else [
            n
            for n in files
            if (n == tail or n.endswith("." + tail)) and not any(part.isdigit() for part in n.split("."))
        ]
    )
    found = []
    for candidate in alike:
        with safe_open(files[candidate], framework="pt") as file:
            if tuple(file.get_slice(candidate).get_shape()) == shape:
                found.append((candidate, file.get_tensor(candidate)))
    if len(found) != 1:
        raise EngineError(
            f"{model}: looked for one tensor {name} of shape {shape}, found {[n for n, _ in found] or alike}."
        )
    tensor: torch.Tensor = found[0][1]
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise EngineError(f"{model}: {found[0][0]} is stored as {tensor.dtype}; expected 16 or 32 bits.")
    return tensor
