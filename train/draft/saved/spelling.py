"""Convert config.json from other projects' forms to the flat one that ``DraftConfig.from_flat``
checks. Four differences are resolved here; everything else in a config stays, for ``from_flat`` to
honour or to refuse by key:

- the draft's own keys are in a nested ``dflash_config`` (SpecForge, z-lab), which takes precedence
  over the top level in vLLM;
- its windows too: ``use_swa``, ``swa_window_size`` and ``causal`` there are ``layer_types``,
  ``sliding_window`` and ``is_causal`` here;
- ``architectures`` names the trainer's class: vLLM to 0.31 takes ``DSparkDraftModel`` for a
  DeepSeek-V4 draft, in the target's files;
- a plain DFlash draft leaves out ``sample_from_anchor``, and its anchor is a bonus token: slot 0
  predicts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark.cache.errors import DraftError
from dspark.train.draft.saved import speculators
from dspark.train.draft.sight import FULL, SLIDING

NESTED = "dflash_config"
SERVED = "Qwen3DSparkModel"
# Classes with our tensors under our names -> what an absent sample_from_anchor means.
_CLASSES = {SERVED: True, "DSparkDraftModel": True, "DFlashDraftModel": False}
# Keys of dflash_config that have a flat name, and what the others may say.
_LIFTED = (
    "mask_token_id",
    "target_layer_ids",
    "num_target_layers",
    "block_size",
    "draft_vocab_size",
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "confidence_head_with_markov",
    "sample_from_anchor",
)
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "projector_type": ("dspark", "dflash"),
    "attention_mode": ("gqa",),
}
_WINDOWS = ("use_swa", "swa_window_size", "causal")


def flat_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flat form of a config.json in any known form. Raises DraftError, naming the key,
    for contradictions.
    """
    if speculators.MARK in config:
        return speculators.to_flat(config)
    flat = _lifted(config)
    names = flat.get("architectures")
    if (
        names
        and flat.get("model_type", "qwen3") == "qwen3"
        and len(names) == 1
        and names[0] in _CLASSES
    ):
        if flat.get("sample_from_anchor") is None and not _CLASSES[names[0]]:
            flat["sample_from_anchor"] = False
        if names != [SERVED]:
            flat["architectures"] = [SERVED]
            _filled(flat)
    return flat


def _lifted(config: Mapping[str, Any]) -> dict[str, Any]:
    flat = dict(config)
    nested = flat.pop(NESTED, None)
    if not nested:
        return flat
    if not isinstance(nested, Mapping):
        raise DraftError(f"config.json has {NESTED} = {nested!r}; expected an object")
    flat |= _windows(flat, nested)
    for key, value in nested.items():
        if key in _WINDOWS:
            continue
        if key in _LIFTED:
            if flat.get(key) not in (None, value):
                raise DraftError(
                    f"config.json has {key} = {flat[key]!r} and {NESTED}.{key} = {value!r}; vLLM "
                    "uses the second. Keep one"
                )
            flat[key] = value
        elif value is not None and value not in _ALLOWED.get(key, ()):
            known = (
                f"; this package supports only {_ALLOWED[key][0]!r}"
                if key in _ALLOWED
                else ", which this package does not support"
            )
            raise DraftError(f"config.json has {NESTED}.{key} = {value!r}{known}")
    _filled(flat)
    return flat


def _windows(flat: Mapping[str, Any], nested: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``nested`` says about windows, as flat keys, with vLLM's precedence (0.32,
    ``_resolve_layer_attention``).
    """
    for key, kind in zip(_WINDOWS, (bool, int, bool), strict=True):
        if not isinstance(nested.get(key), kind | None):
            raise DraftError(
                f"config.json has {NESTED}.{key} = {nested[key]!r}; expected {kind.__name__}"
            )
    out: dict[str, Any] = {}
    kinds = flat.get("layer_types") or []
    if nested.get("use_swa") and SLIDING not in kinds:
        # Whether a slot sees later ones depends on the given types, not on the window that this
        # forces.
        count = flat.get("num_hidden_layers")
        out |= {"layer_types": [SLIDING] * (len(kinds) or count or 0), "is_causal": False}
    elif not kinds and "num_hidden_layers" in flat:
        out["layer_types"] = [FULL] * flat["num_hidden_layers"]
    if nested.get("swa_window_size") is not None:
        out["sliding_window"] = nested["swa_window_size"]
    if nested.get("causal") is not None:
        out["is_causal"] = nested["causal"]
    if flat.get("is_causal") is not None:
        out["is_causal"] = flat["is_causal"]
    return out


def _filled(flat: dict[str, Any]) -> None:
    """Fill in what these projects leave out because it can be inferred: the fewest layers that a
    target with these ids can have.
    """
    ids = flat.get("target_layer_ids")
    if isinstance(ids, list) and ids and flat.get("num_target_layers") is None:
        flat["num_target_layers"] = max(1, *(i + 1 for i in ids))
