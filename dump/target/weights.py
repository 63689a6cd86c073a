"""The target's frozen weights: from a loaded model by structure, from a checkpoint by tensor names.

A model's decoder is the module that holds as many layers as the config says, the final norm is the
one norm beside them, and the model itself names its embedding and head. A checkpoint is read
without its layers: the module tree is built without memory (meta device) for the final norm's
arithmetic, and three tensors are read.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dspark.cache.errors import EngineError, TargetError, first_line
from dspark.cache.target.frozen import FrozenTarget
from dspark.dump.target.checkpoint import Checkpoint, open_checkpoint
from dspark.dump.target.frozen_names import FrozenNames, locate
from dspark.dump.target.identify import language_model_class
from dspark.dump.target.layers import Shapes
from dspark.dump.target.stored import form_of, read_matrix

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, slots=True)
class Parts:
    """A loaded model's parts. ``decoder``: its output is after ``norm``; ``layers``: its decoder
    layers, in order.
    """

    decoder: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    embed: nn.Module
    head: nn.Module
    vocab_size: int


def find_parts(model: Any, shapes: Shapes) -> Parts:
    """Find the parts of a transformers causal LM (or of the text model it wraps)."""
    from torch import nn

    stacks = [
        (name, parent, child)
        for name, parent in model.named_modules()
        for child in parent.children()
        if isinstance(child, nn.ModuleList)
        and len(child) == shapes.num_layers
        and not _in_list(name)
    ]
    # A wrapper may hold other stacks of the same depth (a vision tower): only a text decoder has a
    # norm of its hidden size beside it.
    found = [
        (parent, layers, norms)
        for _, parent, layers in stacks
        if len(norms := _norms(parent, layers, shapes.hidden_size)) == 1
    ]
    if len(found) != 1:
        raise EngineError(
            f"{type(model).__name__}: looked for one stack of {shapes.num_layers} layers "
            f"with one norm of width {shapes.hidden_size} beside it, found {len(found)} "
            f"(stacks of that depth: {[name for name, _, _ in stacks]}). This structure "
            "is not supported."
        )
    decoder, layers, norms = found[0]
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    for what, module in (("embedding", embed), ("output head", head)):
        if module is None:
            raise EngineError(
                f"{type(model).__name__}: it has no {what}; expected a causal language model."
            )
    if getattr(head, "bias", None) is not None:
        raise EngineError(
            f"{type(model).__name__}: its output head has a bias, which a draft's frozen "
            "head cannot hold."
        )
    return Parts(decoder, layers, norms[0], embed, head, shapes.vocab_size)


def _in_list(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _norms(parent: nn.Module, layers: nn.ModuleList, hidden: int) -> list[nn.Module]:
    """Return the children of ``parent`` with a weight of shape [H] and no other parameter but a
    bias.
    """
    out = []
    for child in parent.children():
        weight = getattr(child, "weight", None)
        if child is not layers and weight is not None and tuple(weight.shape) == (hidden,):
            out.append(child)
    return out


def are_plain(parts: Parts) -> bool:
    """Tell whether embedding, head and norm are in memory in 16 or 32 bits: not packed, and not
    left on disk by a device map.
    """
    for module in (parts.embed, parts.head):
        weight: Any = getattr(module, "weight", None)
        if weight is None or weight.ndim != 2 or weight.device.type == "meta":
            return False
        if not weight.is_floating_point() or weight.element_size() < 2:
            return False
    norm: Any = parts.norm.weight
    return bool(norm.device.type != "meta")


def frozen_target(parts: Parts) -> FrozenTarget:
    """Return the weights that training needs, as they are in the model (no copy; without rows that
    pad the vocabulary). Raises EngineError if a matrix is smaller than the vocabulary, or quantised
    (``read_frozen`` reads those).
    """
    embed: Any = parts.embed.weight if are_plain(parts) else None
    head: Any = parts.head.weight if are_plain(parts) else None
    norm: Any = parts.norm.weight
    if embed is None:
        raise EngineError(
            "the model's embedding or output head is quantised here; read them from its checkpoint."
        )
    shape = (parts.vocab_size, norm.shape[0])
    for what, weight in (("embedding", embed), ("output head", head)):
        if weight.shape[0] < shape[0] or weight.shape[1] != shape[1]:
            raise EngineError(
                f"looked for an {what} of shape {shape}, found {tuple(weight.shape)}."
            )
    tied = head.data_ptr() == embed.data_ptr()
    rows = embed.detach()[: shape[0]]
    return FrozenTarget(rows, norm.detach(), rows if tied else head.detach()[: shape[0]], tied)


def compact(frozen: FrozenTarget) -> FrozenTarget:
    """Return the weights in bfloat16 if that loses nothing (a bfloat16 checkpoint that ran in
    float32), so that engines agree on the bytes.
    """
    import torch

    tensors = (frozen.embed_tokens, frozen.norm, frozen.lm_head)
    if any(not torch.equal(t.to(torch.bfloat16).to(t.dtype), t) for t in tensors):
        return frozen
    embed = frozen.embed_tokens.to(torch.bfloat16)
    head = embed if frozen.tied else frozen.lm_head.to(torch.bfloat16)
    return FrozenTarget(embed, frozen.norm.to(torch.bfloat16), head, frozen.tied)


@dataclass(frozen=True, slots=True)
class Found:
    """Where the frozen weights are in a checkpoint, from its headers."""

    checkpoint: Checkpoint
    names: FrozenNames
    forms: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.names} ({', '.join(dict.fromkeys(self.forms))})"

    def size(self, shapes: Shapes, dtype: str) -> int:
        """Return the bytes of embedding and head in a store; ``dtype``: that the target runs in."""
        values = shapes.vocab_size * shapes.hidden_size
        return sum(values * (4 if f == "F32" and dtype == "float32" else 2) for f in self.forms)


def find_frozen(model: str, shapes: Shapes, config: Any) -> Found:
    """Look for the frozen weights in the headers of ``model``; no weight is read. ``config``: the
    whole transformers config.
    """
    checkpoint = open_checkpoint(model)
    names = locate(checkpoint, shapes, is_tied(config))
    matrices = [names.embed] if names.head is None else [names.embed, names.head]
    return Found(checkpoint, names, tuple(form_of(checkpoint, m) for m in matrices))


def is_tied(config: Any) -> bool:
    """Tell whether the config makes the embedding the output head; a wrapper's own setting comes
    before its text config's.
    """
    for part in (config, config.get_text_config()):
        said = getattr(part, "tie_word_embeddings", None)
        if said is not None:
            return bool(said)
    return False


def quantization_of(config: Any) -> Mapping[str, Any]:
    """Return the ``quantization_config`` of a checkpoint; empty if it is not quantised."""
    said = getattr(config, "quantization_config", None) or {}
    return said if isinstance(said, Mapping) else said.to_dict()


def read_frozen(
    model: str, shapes: Shapes, trust_remote_code: bool = False
) -> tuple[FrozenTarget, nn.Module]:
    """Read the frozen weights from the checkpoint, and the final norm as a module that runs on the
    CPU. Raises TargetError if a part is missing or stored in an unsupported form.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    found = find_frozen(model, shapes, config)
    names, checkpoint = found.names, found.checkpoint
    weight = checkpoint.read(f"{names.norm}.weight")
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise TargetError(
            f"{model}: {names.norm} is stored as {weight.dtype}; expected 16 or 32 bits."
        )

    def read(module: str) -> torch.Tensor:
        return read_matrix(
            checkpoint, module, shapes.vocab_size, shapes.hidden_size, quantization_of(config)
        )

    embed = read(names.embed)
    head = embed if names.head is None else read(names.head)
    norm = copy.deepcopy(find_parts(empty_model(config, trust_remote_code), shapes).norm).to_empty(
        device="cpu"
    )
    norm.load_state_dict({"weight": weight}, strict=False)
    return FrozenTarget(embed, weight, head, names.head is None), norm


def empty_model(config: Any, trust_remote_code: bool = False) -> Any:
    """Build the module tree of a target on the meta device: no weights, no memory."""
    import torch

    try:
        with torch.device("meta"):
            return model_class(config).from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, ImportError, RuntimeError, AttributeError, TypeError, KeyError) as error:
        raise TargetError(
            f"transformers could not build a {type(config).__name__}: {first_line(error)}"
        ) from error


def model_class(config: Any) -> Any:
    """Return the transformers class that holds this config's language model: a causal LM, or the
    wrapper of one (images, audio).
    """
    import transformers

    # AutoModelForCausalLM says what it does not know, and takes remote code
    return language_model_class(config) or transformers.AutoModelForCausalLM
