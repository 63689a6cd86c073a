"""The target without its weights: config, shapes, tokenizer and its files, mask token."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.cache.errors import TargetError, UsageError, first_line
from dspark.cache.json_text import Json
from dspark.cache.manifest import TargetInfo, TokenizerInfo
from dspark.dump.target.identify import identify, read_config, refuse_config, refuse_kind
from dspark.dump.target.layers import Shapes

if TYPE_CHECKING:
    from dspark.dump.target.presets import Preset

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
TOKENIZER_MARKS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
)  # a folder with one of them has a tokenizer
# Sizes that a config class may compute instead of storing them.
SIZES = (
    "hidden_size",
    "vocab_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)
VOLATILE_CONFIG = (
    "_name_or_path",
    "transformers_version",
)  # describe how a config was read, not the model


@dataclass(frozen=True, slots=True)
class Target:
    """What is known of a target before its weights are read. ``config``: of its text model;
    ``whole``: transformers' config object of the checkpoint. ``tokenizer`` None: it has none.
    """

    id: str
    revision: str | None
    config: Json
    shapes: Shapes
    eos_token_ids: list[int]
    tokenizer: Any
    files: Mapping[str, bytes]
    whole: Any = None


def load_config(model: str, trust_remote_code: bool = False) -> tuple[Any, Json]:
    """Load the transformers config of a model id or folder, and its text model's as JSON. Raises
    TargetError for anything but a decoder LM.
    """
    identify(model)
    refuse_config(model, read_config(model), trust_remote_code)
    from transformers import AutoConfig  # seconds, for nothing where the model is refused

    try:
        whole = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (
        Exception
    ) as error:  # a config is checked by its class, which raises errors of many types
        raise TargetError(
            f"--model {model}: no config could be read ({type(error).__name__}: "
            f"{first_line(error)}). Its architecture may be newer than this transformers "
            "release, or its config.json may be damaged."
        ) from error
    refuse_kind(model, whole)
    return whole, text_json(whole)


def text_json(whole: Any) -> Json:
    """Return the text model's config as JSON, including sizes that are properties of the class and
    so not in its JSON.
    """
    text = whole.get_text_config()
    out = {
        k: v
        for k, v in json.loads(text.to_json_string(use_diff=False)).items()
        if k not in VOLATILE_CONFIG
    }
    for name in SIZES:
        value = getattr(text, name, None)
        if not isinstance(out.get(name), int) and isinstance(value, int):
            out[name] = value
    return out


def load_target(model: str, trust_remote_code: bool = False) -> Target:
    """Read config and tokenizer of a model id or folder; no weights."""
    whole, config = load_config(model, trust_remote_code)
    tokenizer = load_tokenizer(model, trust_remote_code)
    return Target(
        id=model,
        revision=getattr(whole, "_commit_hash", None),
        config=config,
        shapes=shapes_of(config, model),
        eos_token_ids=_eos_ids(model, config, tokenizer),
        tokenizer=tokenizer,
        files=_tokenizer_files(model, tokenizer),
        whole=whole,
    )


def shapes_of(config: Mapping[str, Any], model: str) -> Shapes:
    """Return H, V and the number of decoder layers. Raises TargetError if the config lacks one."""
    # Where a config counts something else (cache layers) as num_hidden_layers, it says num_layers
    # too.
    layers = (
        config.get("num_layers")
        if isinstance(config.get("num_layers"), int)
        else config.get("num_hidden_layers")
    )
    found = {
        "hidden_size": config.get("hidden_size"),
        "vocab_size": config.get("vocab_size"),
        "num_hidden_layers": layers,
    }
    missing = [k for k, v in found.items() if not isinstance(v, int) or v < 1]
    if missing:
        raise TargetError(
            f"--model {model}: its text config lacks {', '.join(missing)}; expected a "
            "decoder-only language model."
        )
    longest = config.get("max_position_embeddings")
    return Shapes(
        hidden_size=config["hidden_size"],
        vocab_size=config["vocab_size"],
        num_layers=int(layers or 0),
        max_positions=longest if isinstance(longest, int) else None,
    )


def load_tokenizer(model: str, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a folder or model id; None if a folder has none (rows must then be
    tokens).
    """
    from transformers import AutoTokenizer

    folder = Path(model)
    if folder.is_dir() and not any((folder / n).is_file() for n in TOKENIZER_MARKS):
        return None
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # of several libraries
        raise TargetError(
            f"--model {model}: its tokenizer could not be loaded: {first_line(error)}"
        ) from error


def _eos_ids(model: str, config: Mapping[str, Any], tokenizer: Any) -> list[int]:
    from transformers import GenerationConfig

    found: set[int] = set()
    try:
        given = [GenerationConfig.from_pretrained(model).eos_token_id]
    except OSError:
        given = []  # the target has no generation_config.json: use config and tokenizer
    for value in [*given, config.get("eos_token_id"), getattr(tokenizer, "eos_token_id", None)]:
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return sorted(found)


def _tokenizer_files(model: str, tokenizer: Any) -> dict[str, bytes]:
    """Return the tokenizer's files unchanged, or as transformers would save them if the target has
    none in the fast format.
    """
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
    """Return hashes that identify the tokenizer and the template."""
    data = target.files.get("tokenizer.json")
    sha = None if data is None else hashlib.sha256(data).hexdigest()
    if tokenised or target.tokenizer is None:
        return TokenizerInfo(sha256=sha, chat_template_sha256=None)
    from dspark.dump.corpus.masks import chat_template

    return TokenizerInfo(
        sha256=sha,
        chat_template_sha256=hashlib.sha256(chat_template(target.tokenizer).encode()).hexdigest(),
    )


def target_info(target: Target, asked_mask_token: int | None, preset: Preset | None) -> TargetInfo:
    """Return what a manifest says about ``target``; the writer fills in the checksum of its
    weights.
    """
    return TargetInfo(
        id=target.id,
        revision=target.revision,
        config=target.config,
        hidden_size=target.shapes.hidden_size,
        vocab_size=target.shapes.vocab_size,
        num_layers=target.shapes.num_layers,
        mask_token_id=choose_mask_token(
            target, asked_mask_token, preset.mask_token_id if preset else None
        ),
        eos_token_ids=target.eos_token_ids,
        weights_sha256="",
    )


def choose_mask_token(target: Target, asked: int | None, preset: int | None) -> int:
    """Choose the token id that a draft embeds at the positions it predicts: the requested one, else
    the preset's, else the first embedding row that no token uses (vocabulary larger than the
    tokenizer), else the special token with the highest id that is neither eos, bos, pad, unk nor
    named in the chat template.
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
            "the target has no tokenizer to choose a mask token from. Pass --mask-token-id (an "
            "id that no row uses)."
        )
    used = len(tokenizer)
    if vocab > used:
        return used
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    taken = {
        tokenizer.bos_token_id,
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
        *target.eos_token_ids,
    }
    free: list[int] = [
        i
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special and i not in taken and i < vocab and token.content not in template
    ]
    if not free:
        raise UsageError(
            "the target has no unused embedding row and no spare special token to use as "
            "mask token. Pass --mask-token-id (an id that no row uses)."
        )
    return max(free)
