"""The tensors of a checkpoint by name, from its index and headers; a tensor's data is read only
when it is asked for.

A checkpoint is a folder or a model id; its files are safetensors, else PyTorch ``.bin`` files,
which are read with ``weights_only`` and so run no code. Tensors of decoder layers are left out:
nothing here needs them, and they are in the large files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.cache import json_text
from dspark.cache.errors import TargetError, first_line

if TYPE_CHECKING:
    import torch

# Index and single file of each format, in the order of preference.
FORMATS = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
HEADER_LIMIT = 100_000_000  # bytes; safetensors' own limit


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file. ``dtype`` in safetensors' spelling (``BF16``, ``F8_E4M3``); both None
    where only the name is known.
    """

    file: str
    dtype: str | None
    shape: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """``tensors``: those outside decoder layers, by name. ``total_bytes``: of all files, None where
    no index says it.
    """

    model: str
    tensors: dict[str, Stored]
    total_bytes: int | None

    def read(self, name: str) -> torch.Tensor:
        """Read tensor ``name`` on the CPU; its file is downloaded if it is not local yet."""
        from safetensors import SafetensorError, safe_open

        path = _local(self.model, self.tensors[name].file)
        try:
            if path.suffix == ".bin":
                return _unpickled(path)[name].clone()
            with safe_open(path, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
        except (OSError, SafetensorError) as error:
            raise TargetError(f"{path}: tensor {name} cannot be read: {error}") from error


def open_checkpoint(model: str) -> Checkpoint:
    """Read the index and headers of ``model``. Raises TargetError if there are none, or one is
    damaged.
    """
    for index, single in FORMATS:
        found = _small_file(model, index)
        if found is not None:
            return _indexed(model, found, single)
        if (Path(model) / single).is_file() or (not Path(model).is_dir() and _there(model, single)):
            tensors = {n: s for n, s in _headers(model, single).items() if outside_layers(n)}
            return Checkpoint(model, tensors, None)
    raise TargetError(
        f"{model}: no weights found; looked for "
        f"{', '.join(name for pair in FORMATS for name in pair)}. {what_lies_in(model)}"
        "Expected a checkpoint as transformers writes it (save_pretrained)."
    )


def _indexed(model: str, index: Path, single: str) -> Checkpoint:
    try:
        content = json_text.read(index)
        names: dict[str, str] = {
            n: f for n, f in content["weight_map"].items() if outside_layers(n)
        }
        size = content.get("metadata", {}).get("total_size")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise TargetError(
            f"{index}: expected a weight_map in JSON: {error!r}. Download it again."
        ) from error
    tensors: dict[str, Stored] = {}
    for file in sorted(set(names.values())):
        if single.endswith(".bin") and not (Path(model) / file).is_file():
            headers: dict[str, Stored] = {}  # a .bin file has no header that could be read remotely
        else:
            headers = _headers(model, file)
        for name in (n for n, f in names.items() if f == file):
            tensors[name] = headers.get(name, Stored(file, None, None))
    return Checkpoint(model, tensors, int(size) if isinstance(size, int | float) else None)


def outside_layers(name: str) -> bool:
    """Tell whether ``name`` is outside any numbered module, unlike
    ``model.layers.3.mlp.weight``.
    """
    return not any(part.isdigit() for part in name.split("."))


def _headers(model: str, file: str) -> dict[str, Stored]:
    path = Path(model) / file
    if not Path(model).is_dir():
        cached = _cached(model, file)
        if cached is None:
            return _remote_headers(model, file)
        path = cached
    if not path.is_file():
        raise TargetError(
            f"{path}: the index names it, but it is missing. The checkpoint is "
            "incomplete: download it again."
        )
    if path.suffix == ".bin":
        return {n: Stored(file, _code(t), tuple(t.shape)) for n, t in _unpickled(path).items()}
    return {
        n: Stored(file, v["dtype"], tuple(v["shape"])) for n, v in safetensors_header(path).items()
    }


def safetensors_header(path: Path) -> dict[str, Any]:
    """Name -> dtype, shape, data_offsets. Raises TargetError for a file that is not one, or is cut
    short.
    """
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json_text.loads(file.read(size)) if 0 < size < HEADER_LIMIT else None
    except (OSError, ValueError):
        header = None
    if not isinstance(header, dict):
        what = "a Git LFS pointer" if _is_pointer(path) else "not a safetensors file, or cut short"
        raise TargetError(f"{path}: {what}. Download the checkpoint again.")
    header.pop("__metadata__", None)
    end = max((int(v["data_offsets"][1]) for v in header.values()), default=0)
    if path.stat().st_size < 8 + size + end:
        raise TargetError(
            f"{path}: {path.stat().st_size:,} bytes, but its header says "
            f"{8 + size + end:,}. Download it again."
        )
    return header


def _is_pointer(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(40).startswith(b"version https://git-lfs")


def _remote_headers(model: str, file: str) -> dict[str, Stored]:
    """Read the headers of a file on the hub by range requests: a few kilobytes instead of the whole
    file.
    """
    import huggingface_hub

    try:
        found = huggingface_hub.HfApi().parse_safetensors_file_metadata(model, file)
    except Exception as error:  # the client raises errors of several packages
        raise TargetError(
            f"{model}: the header of {file} could not be read from the hub "
            f"({first_line(error)}). Download the checkpoint first: hf download {model}"
        ) from error
    return {n: Stored(file, str(t.dtype), tuple(t.shape)) for n, t in found.tensors.items()}


def _unpickled(path: Path) -> dict[str, torch.Tensor]:
    """Map a ``.bin`` file without reading it; its pickle may hold only tensors."""
    import pickle

    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, ValueError) as error:
        raise TargetError(
            f"{path}: refused: {first_line(error)}. A .bin file is a pickle and may run "
            "code when it is read, so only plain tensors in the zip format are read. "
            "Convert it to safetensors, or use a safetensors checkpoint."
        ) from error
    return {n: t for n, t in content.items() if isinstance(t, torch.Tensor)}


def _code(tensor: torch.Tensor) -> str:
    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
    name = str(tensor.dtype).removeprefix("torch.")
    return names.get(name, name.upper())


def _small_file(model: str, name: str) -> Path | None:
    """Return a file of a few kilobytes, downloaded if necessary; None if ``model`` has no file of
    that name.
    """
    from transformers.utils import cached_file

    if Path(model).is_dir():
        return Path(model) / name if (Path(model) / name).is_file() else None
    try:
        found = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise TargetError(
            f"{model}: {name} could not be fetched ({first_line(error)}). Download the "
            f"checkpoint first: hf download {model}"
        ) from error
    return None if found is None else Path(found)


def _local(model: str, name: str) -> Path:
    if Path(model).is_dir():
        return Path(model) / name
    found = _small_file(model, name)
    if found is None:
        raise TargetError(f"{model}: {name} is missing.")
    return found


def _cached(model: str, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, name)
    return Path(found) if isinstance(found, str) else None


def _there(model: str, name: str) -> bool:
    """Tell whether a model id has file ``name``, locally or on the hub."""
    if _cached(model, name) is not None:
        return True
    import huggingface_hub

    try:
        return huggingface_hub.file_exists(model, name)
    except Exception as error:  # offline, in one of several ways
        raise TargetError(
            f"{model}: its files are not on this machine and the hub cannot be reached "
            f"({first_line(error)}). Download it first: hf download {model}"
        ) from error


def what_lies_in(model: str) -> str:
    """Describe the files of a folder in a few words, for a message."""
    if not Path(model).is_dir():
        return ""
    names: Iterable[str] = sorted(p.name for p in Path(model).iterdir())
    listed = ", ".join(list(names)[:6])
    return f"The folder holds {listed or 'nothing'}. "
