"""``--config FILE.yaml``: the flags of a command in a file, and the file that a command saves with
its output.

A key is the name of a flag or argument (``seq-length``; ``seq_length`` will do). A value has the
flag's type: what click would refuse on the command line is refused here, in the same words.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.cache.errors import UsageError
from dspark.cache.shared import peers

if TYPE_CHECKING:
    import click

# They say how this call runs, not what it makes: never saved.
OF_THE_CALL = frozenset(
    {"resume", "overwrite", "break-lock", "dry-run", "json", "config", "help", "version"}
)


def read(path: Path, params: Sequence[click.Parameter], command: str) -> dict[str, Any]:
    """Read ``path`` as click's ``default_map`` for ``command`` (``dspark-train``) with ``params``.
    Raises UsageError.
    """
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not YAML: {error}") from error
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror or error}") from error
    found = {} if found is None else found
    if not isinstance(found, dict):
        raise UsageError(
            f"--config {path}: expected flag names with their values, found {_kind(found)}"
        )
    known = {flag_name(p): p for p in params if flag_name(p) not in ("config", "help", "version")}
    out = {}
    for key, value in found.items():
        name = str(key).replace("_", "-")
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = peers.answer(str(key), command) or (
                f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(known))}"
            )
            raise UsageError(f"--config {path}: unknown key {key!r}; {hint}")
        if value is not None:  # null: as if it were absent
            where = f"--config {path}: {name}"
            out[str(known[name].name)] = _as_given(value, known[name], where)
    return out


def flag_name(param: click.Parameter) -> str:
    """``--seq-length`` -> ``seq-length``; an argument's own name."""
    if param.param_type_name == "argument":
        return str(param.name).replace("_", "-")
    return max(param.opts, key=len).lstrip("-")


def _as_given(value: Any, param: click.Parameter, where: str) -> Any:
    """Convert ``value`` to its command-line form: text, lists of text, and booleans for
    switches.
    """
    if getattr(param, "is_flag", False):
        if not isinstance(value, bool):
            raise UsageError(f"{where} is a switch: expected true or false, found {value!r}")
        return value
    if getattr(param, "multiple", False) or param.nargs != 1:
        items = value if isinstance(value, list) else [value]
        return [_text(item, where) for item in items]
    if isinstance(value, list):  # 7,22,38
        return ",".join(_text(item, where) for item in value)
    return _text(value, where)


def _text(value: Any, where: str) -> str:
    if isinstance(value, dict):  # a flag that takes JSON
        return json.dumps(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UsageError(f"{where}: expected text or a number, found {_kind(value)}")
    return str(value)


def _kind(value: Any) -> str:
    return {"dict": "an object", "list": "a list", "str": "a text", "NoneType": "nothing"}.get(
        type(value).__name__, repr(value)
    )


def resolved(settings: Mapping[str, Any], made_by: str) -> bytes:
    """Return the settings of a run as a file for ``--config``, without those that are None or
    concern only this call.
    """
    import yaml

    names = {key.rstrip("_").replace("_", "-"): value for key, value in settings.items()}
    kept = {k: _plain(v) for k, v in names.items() if v is not None and k not in OF_THE_CALL}
    head = f"# Made by {made_by}. To repeat it: {made_by} --config THIS_FILE\n"
    text: str = yaml.safe_dump(kept, sort_keys=False, default_flow_style=None)
    return (head + text).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value
