"""Identify what ``--model`` names, before transformers reads it: a target's folder or id, or
something else, which is then named. Everything is decided from names and small files, offline, in
seconds.
"""

from __future__ import annotations

import difflib
import functools
import os
import socket
import urllib.parse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dspark.cache import json_text
from dspark.cache.errors import TargetError, UsageError, first_line
from dspark.dump.target.presets import presets

# The largest plausible number for a key with this in its name; real models are a factor of ten
# below.
MOST = {
    "layers": 1 << 13,
    "n_layer": 1 << 13,
    "hidden_size": 1 << 18,
    "vocab_size": 1 << 25,
    "intermediate_size": 1 << 22,
    "head_dim": 1 << 16,
    "_heads": 1 << 16,
    "experts": 1 << 16,
}
CONFIG = "config.json"
PROBE_SECONDS = 3.0
DRAFTS = (
    "Qwen3DSparkModel",
    "Gemma4DSparkModel",
    "DSparkSpeculator",
    "DFlashDraftModel",
    "DSparkDraftModel",
)


def identify(model: str) -> None:
    """Raise UsageError unless ``model`` can be a language model's folder or id;
    says what it is instead. TargetError where an id cannot be looked up."""
    path = Path(model).expanduser()
    if path.is_file():
        what = "a GGUF file of llama.cpp" if path.suffix == ".gguf" else "a file"
        raise UsageError(
            f"--model {model}: this is {what}. Expected a folder with {CONFIG} and safetensors, "
            "or a model id"
            + (
                ": give the checkpoint that the GGUF was made from."
                if path.suffix == ".gguf"
                else "."
            )
        )
    if path.is_dir():
        _identify_folder(model, path)
    elif _is_path(model):
        raise UsageError(f"--model {model}: no such folder.{did_you_mean(model, _siblings(path))}")
    else:
        _identify_id(model)


def _is_path(model: str) -> bool:
    """A model id is ``name`` or ``owner/name``; anything else was meant as a path."""
    return model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model


def _siblings(path: Path) -> list[str]:
    parent = path.parent
    return [str(parent / p.name) for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []


def _identify_folder(model: str, path: Path) -> None:
    names = sorted(p.name for p in path.iterdir())
    if CONFIG in names:
        return
    found = ""
    if not names:
        found = "the folder is empty"
    elif "adapter_config.json" in names:
        base = _json(path / "adapter_config.json").get("base_model_name_or_path")
        found = (
            f"this is a LoRA adapter of {base or 'another model'}: merge it into its base model "
            "(peft's merge_and_unload) and give that"
        )
    elif any(n.endswith(".gguf") for n in names):
        found = (
            "this is a folder of GGUF files (llama.cpp): give the checkpoint that they were made "
            "from"
        )
    elif "zarr.json" in names:
        found = "this is a store of hidden states, not the target that it was made with"
    elif "model_index.json" in names:
        found = "this is a diffusers pipeline, not a language model"
    elif any(n.endswith((".safetensors", ".bin")) for n in names):
        found = f"weights without {CONFIG}: download the whole checkpoint"
    below = [n for n in names if (path / n / CONFIG).is_file()]
    if below and not found:
        found = f"no {CONFIG} here; did you mean {path / below[0]}?"
    raise UsageError(
        f"--model {model}: no config could be read: "
        f"{found or f'no {CONFIG}; found ' + ', '.join(names[:6])}. "
        f"Expected a folder with {CONFIG}, or a model id."
    )


def _identify_id(model: str) -> None:
    """Refuse at once a model id whose config is neither local nor on a reachable hub; the client
    itself would try for minutes.
    """
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(model, CONFIG) if model.count("/") <= 1 else None, str):
        if not hub_answers():
            go_offline()
        return
    if hub_answers():
        return
    raise TargetError(
        f"--model {model}: no config could be read: it is not a folder, it is not in the "
        f"local cache, and the hub cannot be reached.{did_you_mean(model, presets())} On "
        f"a machine with a network: hf download {model} --local-dir DIR; then --model DIR."
    )


@functools.cache
def hub_answers() -> bool:
    """Tell whether the hub's host accepts a connection within seconds; checked once per process. A
    proxy is assumed to work.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(n) for n in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    url = urllib.parse.urlsplit(constants.ENDPOINT)
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((url.hostname or "huggingface.co", port), PROBE_SECONDS).close()
    except OSError:
        return False
    return True


def go_offline() -> None:
    """Let the hub's client use its cache without contacting the hub first, which takes half a
    minute without a network.
    """
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True


def did_you_mean(model: str, known: Iterable[str]) -> str:
    """Return `` Did you mean X?`` if a known name is close to ``model``, else nothing."""
    names = {n.lower(): n for n in known}
    names |= {n.split("/")[-1]: full for n, full in list(names.items())}
    for asked in (model.lower(), model.lower().rstrip("/").split("/")[-1]):
        close = difflib.get_close_matches(asked, names, n=1, cutoff=0.75)
        if close and names[close[0]] != model:
            return f" Did you mean {names[close[0]]}?"
    return ""


def refuse_config(model: str, raw: Mapping[str, Any], trust_remote_code: bool) -> None:
    """Raise TargetError for a ``config.json`` that is not a decoder language model's, or that needs
    code that may not run.
    """
    from transformers import CONFIG_MAPPING

    _refuse_sizes(model, raw)
    named = raw.get("architectures")
    kinds = [str(a) for a in named] if isinstance(named, list) else []
    if "speculators_model_type" in raw or any(k in DRAFTS or "Eagle3" in k for k in kinds):
        raise TargetError(
            f"--model {model}: this is a draft ({', '.join(kinds)}), not a target. Give the "
            "model that it drafts for."
        )
    model_type = raw.get("model_type")
    if raw.get("auto_map") and model_type not in CONFIG_MAPPING and not trust_remote_code:
        raise TargetError(
            f"--model {model}: its architecture {', '.join(kinds) or model_type} is not "
            "in transformers, and its repository contains its own Python code. Read that "
            "code; if you trust it, pass --trust-remote-code."
        )
    if model_type is None and not raw.get("auto_map"):
        raise TargetError(
            f"--model {model}: {CONFIG} has no model_type; expected a transformers checkpoint."
        )


def _refuse_sizes(model: str, raw: Mapping[str, Any]) -> None:
    """Raise TargetError for a size that no model has, before anything allocates a list or a matrix
    of it. Nested configs are checked too.
    """
    for name, value in raw.items():
        if isinstance(value, dict):
            _refuse_sizes(model, value)
        most = next((most for word, most in MOST.items() if word in name), None)
        if most and isinstance(value, int) and not isinstance(value, bool) and value > most:
            raise TargetError(
                f"--model {model}: {CONFIG} says {name} {value}, more than {most}; expected the "
                "config of a language model."
            )


def refuse_kind(model: str, config: Any) -> None:
    """Raise TargetError for a loaded config that is an encoder's or has no language model.

    Transformers' mappings tell whether it has a class for the config; a config of remote code is
    not in them and is accepted.
    """
    from transformers.models.auto import modeling_auto as autos

    named = getattr(config, "architectures", None) or [type(config).__name__]
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise TargetError(
            f"--model {model}: {CONFIG} has architectures of {type(named).__name__}; expected a "
            "list of class names."
        )
    kinds = ", ".join(named)
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False) and not getattr(text, "is_decoder", False):
        raise TargetError(
            f"--model {model}: {kinds} is an encoder-decoder; expected a decoder-only language "
            "model."
        )
    causal = type(config) in autos.MODEL_FOR_CAUSAL_LM_MAPPING
    masked = type(config) in autos.MODEL_FOR_MASKED_LM_MAPPING
    only_masked = all(
        k.endswith(("ForMaskedLM", "ForPreTraining", "Model")) for k in kinds.split(", ")
    )
    if (
        masked
        and not getattr(text, "is_decoder", False)
        and (not causal or only_masked or text.model_type in ENCODERS)
    ):
        raise TargetError(
            f"--model {model}: {kinds} is an encoder that fills in masked tokens (like BERT); "
            "expected a decoder-only language model."
        )
    if language_model_class(config) is None and not getattr(config, "auto_map", None):
        raise TargetError(
            f"--model {model}: transformers has no language model for {kinds} "
            f"({type(config).__name__}); expected a decoder-only language model."
        )


def language_model_class(config: Any) -> Any:
    """Return the transformers class that holds this config's language model: a causal LM, or the
    wrapper of one (images, audio); None if there is none.
    """
    import transformers
    from transformers.models.auto import modeling_auto as autos

    kinds = (
        (transformers.AutoModelForCausalLM, autos.MODEL_FOR_CAUSAL_LM_MAPPING),
        (transformers.AutoModelForImageTextToText, autos.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
        (
            getattr(transformers, "AutoModelForMultimodalLM", None),
            getattr(autos, "MODEL_FOR_MULTIMODAL_LM_MAPPING", {}),
        ),
    )
    return next((cls for cls, known in kinds if cls is not None and type(config) in known), None)


# Encoders that transformers can also build as decoders, although their checkpoints are not.
ENCODERS = (
    "bert",
    "roberta",
    "xlm-roberta",
    "camembert",
    "electra",
    "xlm-roberta-xl",
    "megatron-bert",
    "roberta-prelayernorm",
    "ernie",
    "rembert",
    "roformer",
    "data2vec-text",
    "big_bird",
    "xmod",
)


def read_config(model: str) -> dict[str, Any]:
    """Read the JSON of ``config.json`` unchanged. Raises TargetError if it is not an object."""
    from transformers.utils import cached_file

    try:
        path = cached_file(model, CONFIG)
    except (OSError, ValueError) as error:
        raise TargetError(
            f"--model {model}: no config could be read ({first_line(error)})."
            f"{did_you_mean(model, presets())} Expected a model id that can be reached, or a "
            f"folder with {CONFIG}."
        ) from error
    return _json(Path(str(path)))


def _json(path: Path) -> dict[str, Any]:
    try:
        out = json_text.read(path)
    except (OSError, ValueError) as error:
        raise TargetError(f"{path}: not JSON: {error}. Download it again.") from error
    if not isinstance(out, dict):
        raise TargetError(f"{path}: expected a JSON object. Download it again.")
    return out
