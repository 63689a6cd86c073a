"""``--draft-config FILE.json``: the shape of a draft, under the names in a draft's config.json or
the names of the flags.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dspark.cache import json_text
from dspark.cache.errors import UsageError

# Name in a draft's config.json -> setting of a training.
NAMES = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "block_size": "block_size",
    "markov_rank": "markov_rank",
    "markov_head_type": "markov_head_type",
    "speculator_type": "speculator_type",
    "draft_vocab_size": "draft_vocab_size",
    "sliding_window": "sliding_window",
    "layer_types": "layer_types",
    "rope_scaling": "rope_scaling",
}


def read_shape(path: str) -> dict[str, Any]:
    """Return the settings that the file fixes. Raises UsageError for a file that is not a JSON
    object, and for unknown keys.
    """
    try:
        content = json_text.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"--draft-config {path}: {error}; expected a JSON object.") from error
    if not isinstance(content, dict):
        raise UsageError(f"--draft-config {path}: expected a JSON object.")
    if unknown := sorted(set(content) - set(NAMES) - set(NAMES.values())):
        raise UsageError(
            f"--draft-config {path}: {', '.join(unknown)} cannot be set there: the target "
            f"determines them, or no draft has them. Keep only {', '.join(NAMES)} (or the "
            f"flags' names: {', '.join(sorted(set(NAMES.values()) - set(NAMES)))})."
        )
    out: dict[str, Any] = {}
    for key, value in content.items():
        setting: str = NAMES.get(str(key), str(key))
        if setting in out:
            raise UsageError(f"--draft-config {path}: {setting} is given twice.")
        out[setting] = _as_setting(setting, value)
    return out


def _as_setting(setting: str, value: Any) -> Any:
    """Convert a JSON ``value`` to the type of the flag with that name."""
    if setting == "layer_types" and isinstance(value, list):
        return tuple(value)
    return json.dumps(value, sort_keys=True) if isinstance(value, dict) else value
