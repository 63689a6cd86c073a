"""The target beside its weights: config, shapes, tokenizer files, mask token; and, of a loaded model, its parts by structure.

Nothing here goes by a family's names: the decoder is the module that holds as many layers as the config says, the final norm is the
one norm beside them, embedding and head are what the model itself says they are.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.cache.errors import EngineError, UsageError
from dspark.cache.manifest import Json, TargetInfo, TokenizerInfo
from dspark.cache.target.frozen import FrozenTarget
from dspark.dump.target.layers import Shapes

if TYPE_CHECKING:
    from torch import nn

    from dspark.dump.target.presets import Preset

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
VOLATILE_CONFIG = (
    "_name_or_path",
    "transformers_version",
)  # say how a config was read, not what the model is


@dataclass(frozen=True, slots=True)
class Target:
    """What is known of a target before its weights are read. ``config``: of its text model. ``tokenizer`` None: it has none."""

    id: str
    revision: str | None
    config: Json
    shapes: Shapes
    eos_token_ids: list[int]
    tokenizer: Any
    files: Mapping[str, bytes]


def load_target(model: str) -> Target:
    """Read config and tokenizer of a model id or folder; no weights."""
    from transformers import AutoConfig

    try:
        whole = AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"--model {model}: no config could be read ({_first_line(error)}). Expected a model id that can be reached, or a folder with config.json."
        ) from error
    text = whole.get_text_config()
    config = {
        k: v for k, v in json.loads(text.to_json_string(use_diff=False)).items() if k not in VOLATILE_CONFIG
    }
    tokenizer = load_tokenizer(model)
    return Target(
        id=model,
        revision=getattr(whole, "_commit_hash", None),
        config=config,
        shapes=shapes_of(config, model),
        eos_token_ids=_eos_ids(model, config, tokenizer),
        tokenizer=tokenizer,
        files=_tokenizer_files(model, tokenizer),
    )


def shapes_of(config: Mapping[str, Any], model: str) -> Shapes:
    """H, V and number of layers, which every decoder's config states."""
    missing = [
        k for k in ("hidden_size", "vocab_size", "num_hidden_layers") if not isinstance(config.get(k), int)
    ]
    if missing:
        raise UsageError(
            f"--model {model}: its text config lacks {', '.join(missing)}; expected a decoder-only language model."
        )
    return Shapes(
        hidden_size=config["hidden_size"],
        vocab_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        max_positions=config.get("max_position_embeddings"),
    )


def load_tokenizer(model: str) -> Any:
    """The tokenizer, or None where the target has none (rows must then be tokens)."""
    from transformers import AutoTokenizer

    folder = Path(model)
    if folder.is_dir() and not any(
        (folder / n).is_file() for n in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    ):
        return None
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UsageError(
            f"--model {model}: its tokenizer could not be loaded: {_first_line(error)}"
        ) from error


def _eos_ids(model: str, config: Mapping[str, Any], tokenizer: Any) -> list[int]:
    from transformers import GenerationConfig

    found: set[int] = set()
    try:
        given = [GenerationConfig.from_pretrained(model).eos_token_id]
    except OSError:
        given = []  # a target without generation_config.json: config and tokenizer say it
    for value in [*given, config.get("eos_token_id"), getattr(tokenizer, "eos_token_id", None)]:
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return sorted(found)


def _tokenizer_files(model: str, tokenizer: Any) -> dict[str, bytes]:
    """The tokenizer's files as they are; as transformers would save them where the target has none of the fast format."""
    from transformers.utils import cached_file

    if tokenizer is None:
        return {}
    out = {}
    for name in TOKENIZER_FILES:
        path = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            out[name] = Path(path).read_bytes()
    if "tokenizer.json" in out:
        return out
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if p.is_file()}


def tokenizer_info(target: Target, tokenised: bool) -> TokenizerInfo:
    """Hashes that tell one tokenizer or template from another."""
    data = target.files.get("tokenizer.json")
    sha = None if data is None else hashlib.sha256(data).hexdigest()
    if tokenised or target.tokenizer is None:
        return TokenizerInfo(sha256=sha, chat_template_sha256=None)
    from dspark.dump.corpus.masks import chat_template

    return TokenizerInfo(
        sha256=sha, chat_template_sha256=hashlib.sha256(chat_template(target.tokenizer).encode()).hexdigest()
    )


def target_info(target: Target, asked_mask_token: int | None, preset: Preset | None) -> TargetInfo:
    """What a manifest says of ``target``; the checksum of its weights is the writer's to fill in."""
    return TargetInfo(
        id=target.id,
        revision=target.revision,
        config=target.config,
        hidden_size=target.shapes.hidden_size,
        vocab_size=target.shapes.vocab_size,
        num_layers=target.shapes.num_layers,
        mask_token_id=choose_mask_token(target, asked_mask_token, preset.mask_token_id if preset else None),
        eos_token_ids=target.eos_token_ids,
        weights_sha256="",
    )


def choose_mask_token(target: Target, asked: int | None, preset: int | None) -> int:
    """The id that a draft embeds where it must guess.

    Asked for, else the preset's, else the first embedding row that no token uses (vocabulary larger than the tokenizer), else the
    special token of the highest id that is neither eos, bos, pad, unk nor named in the chat template.
    """
    vocab = target.shapes.vocab_size
    for flag, value in (("--mask-token-id", asked), ("the preset's mask token", preset)):
        if value is not None:
            if not 0 <= value < vocab:
                raise UsageError(f"{flag}: {value} is outside the target's vocabulary of {vocab}.")
            return value
    tokenizer = target.tokenizer
    if tokenizer is None:
        raise UsageError(
            "the target has no tokenizer to choose a mask token from. Pass --mask-token-id (an id that no row uses)."
        )
    used = len(tokenizer)
    if vocab > used:
        return used
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    taken = {tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id, *target.eos_token_ids}
    free: list[int] = [
        i
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special and i not in taken and i < vocab and token.content not in template
    ]
    if not free:
        raise UsageError(
            "no unused embedding row and no spare special token to serve as mask token. Pass --mask-token-id (an id that no row uses)."
        )
    return max(free)


@dataclass(frozen=True, slots=True)
class Parts:
    """A loaded model's parts. ``decoder``: whose output is after ``norm``; ``layers``: its decoder layers, in order."""

    decoder: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    embed: nn.Module
    head: nn.Module


def find_parts(model: Any, shapes: Shapes) -> Parts:
    """The parts of a transformers causal LM (or of the text model it wraps)."""
    from torch import nn

    stacks = [
        (name, parent, child)
        for name, parent in model.named_modules()
        for child in parent.children()
        if isinstance(child, nn.ModuleList) and len(child) == shapes.num_layers and not _in_list(name)
    ]
    # A wrapper may hold other stacks of the same depth (a vision tower): only a text decoder has a norm of its hidden size beside it.
    found = [
        (parent, layers, norms)
        for _, parent, layers in stacks
        if len(norms := _norms(parent, layers, shapes.hidden_size)) == 1
    ]
    if len(found) != 1:
        raise EngineError(
            f"{type(model).__name__}: looked for one stack of {shapes.num_layers} layers with one norm of width {shapes.hidden_size} beside it, "
            f"found {len(found)} (stacks of that depth: {[name for name, _, _ in stacks]}). This structure is not known."
        )
    decoder, layers, norms = found[0]
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    shape = (shapes.vocab_size, shapes.hidden_size)
    for what, module in (("embedding", embed), ("output head", head)):
        weight = getattr(module, "weight", None)
        if weight is None or tuple(weight.shape) != shape:
            found_shape = None if weight is None else tuple(weight.shape)
            raise EngineError(
                f"{type(model).__name__}: looked for an {what} of shape {shape}, found {found_shape}."
            )
    if getattr(head, "bias", None) is not None:
        raise EngineError(
            f"{type(model).__name__}: its output head has a bias, which a draft's frozen head does not carry."
        )
    return Parts(decoder, layers, norms[0], embed, head)


def _in_list(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _norms(parent: nn.Module, layers: nn.ModuleList, hidden: int) -> list[nn.Module]:
    """Children of ``parent`` with a weight of shape [H] and no other parameter than a bias."""
    out = []
    for child in parent.children():
        weight = getattr(child, "weight", None)
        if child is not layers and weight is not None and tuple(weight.shape) == (hidden,):
            out.append(child)
    return out


def frozen_target(parts: Parts) -> FrozenTarget:
    """The weights that training needs, as they are in the model (no copy)."""
    embed: Any = parts.embed.weight
    head: Any = parts.head.weight
    norm: Any = parts.norm.weight
    tied = head.data_ptr() == embed.data_ptr()
    return FrozenTarget(embed.detach(), norm.detach(), embed.detach() if tied else head.detach(), tied)


def compact(frozen: FrozenTarget) -> FrozenTarget:
    """The same weights in bfloat16 where that loses nothing (a bfloat16 checkpoint that ran in float32), so that engines agree on the bytes."""
    import torch

    tensors = (frozen.embed_tokens, frozen.norm, frozen.lm_head)
    if any(not torch.equal(t.to(torch.bfloat16).to(t.dtype), t) for t in tensors):
        return frozen
    embed = frozen.embed_tokens.to(torch.bfloat16)
    head = embed if frozen.tied else frozen.lm_head.to(torch.bfloat16)
    return FrozenTarget(embed, frozen.norm.to(torch.bfloat16), head, frozen.tied)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
