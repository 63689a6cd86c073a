"""Write an SPD head as skippy and the method's own programs read it: ``spd-head.safetensors``,
``skippy-spd-head.json``, the checkpoint of torch.

The manifest says what the head is and names both files by size and sha256; ``faults`` applies the
rules by which skippy accepts or refuses one, so that an export is checked before it is copied
anywhere.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from dspark.cache import json_text
from dspark.cache.files.atomic import write_file
from dspark.train.draft.config import DraftConfig
from dspark.train.draft.saved.vocabulary import ids_of
from dspark.train.draft.spd.drafter import tap_rows

HEAD, MANIFEST, CHECKPOINT = (
    "spd-head.safetensors",
    "skippy-spd-head.json",
    "speculation_head_final.pt",
)
SCHEMA, FORMAT, SOURCE, VERSION = (
    "skippy-spd-head/v1",
    "safetensors-spd-head-v1",
    "torch-speculation-head-v10",
    10,
)
WIDTHS = {"F16": 2, "BF16": 2, "F32": 4}
DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
NOT_OF_THE_HEAD = ("embed_tokens.weight", "d2t", "t2d")


def write_skippy(
    folder: Path,
    config: DraftConfig,
    tensors: Mapping[str, Tensor],
    target: str,
    model_type: str | None = None,
) -> tuple[str, ...]:
    """Write the three files for the head with these ``tensors``, names as served, for the target
    with the id ``target``; returns their names.
    """
    import torch
    from safetensors.torch import save

    own = {name: t for name, t in sorted(tensors.items()) if name not in NOT_OF_THE_HEAD}
    ids = ids_of(tensors["d2t"]).tolist() if "d2t" in tensors else None
    stream = io.BytesIO()
    torch.save(
        {"state_dict": own, "config": _torch_config(config, ids, target, model_type)}, stream
    )
    checkpoint = _written(folder, CHECKPOINT, stream.getvalue())
    dtypes = {DTYPES[str(t.dtype).removeprefix("torch.")] for t in own.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "mixed"
    said = metadata(len(own), dtype, target, checkpoint["sha256"])
    serving = _written(folder, HEAD, save(own, metadata=said))
    manifest = {
        "schema": SCHEMA,
        "checkpoint": checkpoint,
        "serving_checkpoint": {
            **serving,
            "format": FORMAT,
            "tensor_count": len(own),
            "dtype": dtype,
        },
        "source": {
            "format": SOURCE,
            "reference_repo": None,
            "base_model_path": target,
            "model_type": model_type,
            "checkpoint_version": VERSION,
        },
        "topology": {
            **_topology(config, ids),
            "stage_layer_boundaries": list(config.stage_ends),
            "tap_norm": "none",
        },
    }
    write_file(folder / MANIFEST, (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode())
    return HEAD, MANIFEST, CHECKPOINT


def metadata(count: int, dtype: str, target: str, source_sha256: str) -> dict[str, str]:
    """Return the strings in the header of the head's file."""
    return {
        "format": FORMAT,
        "source_checkpoint_sha256": source_sha256,
        "source_format": SOURCE,
        "tensor_count": str(count),
        "dtype": dtype,
        "base_model_path": target,
    }


def file_bytes(shapes: Mapping[str, Sequence[int]], dtype: str, said: Mapping[str, str]) -> int:
    """Return the size of the head's file, from shapes alone."""
    header: dict[str, Any] = {"__metadata__": dict(said)}
    end = 0
    for name, shape in sorted(shapes.items()):
        start, end = end, end + prod(shape) * WIDTHS[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + end


def _topology(config: DraftConfig, ids: list[int] | None) -> dict[str, Any]:
    return {
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "num_stages": len(config.stage_ends),
        "num_spec_layers": config.num_layers,
        "trained_with_use_deepest": True,
        "shallow_hidden_layer_indices": tap_rows(config),
        "spec_init_from_base_layers": None,
        "draft_token_ids": ids,
    }


def _torch_config(
    config: DraftConfig, ids: list[int] | None, target: str, model_type: str | None
) -> dict[str, Any]:
    flat = _topology(config, ids) | {
        "model_type": model_type,
        "base_model_path": target,
        "version": VERSION,
    }
    return {key: value for key, value in flat.items() if value is not None or key == "model_type"}


def _written(folder: Path, name: str, data: bytes) -> dict[str, Any]:
    write_file(folder / name, data)
    return {"path": name, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def faults(folder: Path | str) -> list[str]:
    """Return the reasons why skippy would refuse the head in ``folder``; empty if it would not.
    Opens only the head's own file.
    """
    folder = Path(folder)
    try:
        said = json_text.read(folder / MANIFEST)
        assert isinstance(said, dict)
        return list(_faults(folder, said))
    except (OSError, ValueError, AssertionError) as wrong:
        return [f"{MANIFEST} cannot be read: {wrong}"]
    except (KeyError, TypeError, AttributeError) as wrong:
        return [f"{MANIFEST} has no valid {wrong}"]


def _faults(folder: Path, said: Mapping[str, Any]) -> Iterator[str]:
    source, topology = said["source"], said["topology"]
    if said["schema"] != SCHEMA:
        yield f"schema is {said['schema']!r}, expected {SCHEMA!r}"
    if (source["format"], source["checkpoint_version"]) != (SOURCE, VERSION):
        yield (
            f"source is {source['format']!r} version {source['checkpoint_version']}; expected "
            f"{SOURCE!r} version {VERSION}"
        )
    if not str(source["base_model_path"]).strip():
        yield "base_model_path is blank"
    entries = [
        said["checkpoint"],
        *([said["serving_checkpoint"]] if said.get("serving_checkpoint") else []),
    ]
    for entry in entries:
        path = PurePosixPath(entry["path"])
        if path.is_absolute() or not path.parts or {".", ".."} & {*entry["path"].split("/")}:
            yield f"path {entry['path']!r} must be relative, inside the folder"
        if entry["bytes"] <= 0:
            yield f"{entry['path']}: bytes is {entry['bytes']}"
        if len(entry["sha256"]) != 64 or set(entry["sha256"].lower()) - set("0123456789abcdef"):
            yield f"{entry['path']}: sha256 is not 64 hexadecimal digits"
    yield from _topology_faults(topology)
    if len(entries) == 2:
        yield from _file_faults(folder / entries[1]["path"], entries[1], topology)


def _topology_faults(t: Mapping[str, Any]) -> Iterator[str]:
    for name in ("hidden_size", "vocab_size", "num_stages", "num_spec_layers", "draft_vocab_size"):
        if t[name] <= 0:
            yield f"{name} is {t[name]}, expected a positive number"
    if t["draft_vocab_size"] > t["vocab_size"]:
        yield (
            f"draft_vocab_size {t['draft_vocab_size']} is larger than vocab_size {t['vocab_size']}"
        )
    ends, rows, ids = (
        t.get("stage_layer_boundaries"),
        t["shallow_hidden_layer_indices"],
        t.get("draft_token_ids"),
    )
    if ends is not None and (len(ends) != t["num_stages"] or not _rises(ends)):
        yield f"stage_layer_boundaries {ends}: expected {t['num_stages']} ascending numbers"
    if len(rows) != t["num_stages"] or not all(row and _rises(row) for row in rows):
        yield (
            f"shallow_hidden_layer_indices {rows}: expected {t['num_stages']} rows in "
            "ascending order"
        )
    if ids is not None and (
        len(ids) != t["draft_vocab_size"]
        or not _rises(ids)
        or ids[0] < 0
        or ids[-1] >= t["vocab_size"]
    ):
        yield (
            f"draft_token_ids: expected {t['draft_vocab_size']} ascending ids below "
            f"{t['vocab_size']}"
        )
    start = t.get("spec_init_from_base_layers")
    if start is not None and len(start) != t["num_spec_layers"]:
        yield f"spec_init_from_base_layers has {len(start)} layers, expected {t['num_spec_layers']}"


def _file_faults(
    path: Path, entry: Mapping[str, Any], topology: Mapping[str, Any]
) -> Iterator[str]:
    data = path.read_bytes()
    if entry["format"] != FORMAT:
        yield f"{path.name}: format is {entry['format']!r}, expected {FORMAT!r}"
    if len(data) != entry["bytes"]:
        yield f"{path.name} has {len(data)} bytes, the manifest says {entry['bytes']}"
    if hashlib.sha256(data).hexdigest() != entry["sha256"].lower():
        yield f"{path.name} has a different sha256 from the one in the manifest"
    length = int.from_bytes(data[:8], "little")
    if not 0 < length <= len(data) - 8:
        yield f"{path.name}: a header of {length} bytes does not fit the file"
        return
    header = json_text.loads(data[8 : 8 + length])
    named = header.pop("__metadata__", {})
    if named.get("format", FORMAT) != FORMAT:
        yield f"{path.name}: its metadata says format {named['format']!r}"
    if len(header) != entry["tensor_count"]:
        yield f"{path.name} has {len(header)} tensors, the manifest says {entry['tensor_count']}"
    yield from _tensor_faults(path.name, header, entry["dtype"], len(data) - 8 - length)
    for name, shape in _shapes(topology).items():
        if name not in header:
            yield f"{path.name} lacks {name}"
        elif header[name]["shape"] != shape:
            yield f"{path.name}: {name} is {header[name]['shape']}, expected {shape}"


def _tensor_faults(file: str, header: Mapping[str, Any], dtype: str, size: int) -> Iterator[str]:
    at = 0
    for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = tensor["data_offsets"]
        if tensor["dtype"] not in WIDTHS or (dtype != "mixed" and tensor["dtype"] != dtype):
            yield f"{file}: {name} is {tensor['dtype']}, expected {dtype}"
        elif end - start != prod(tensor["shape"]) * WIDTHS[tensor["dtype"]]:
            yield (
                f"{file}: {name} takes {end - start} bytes, which do not match its shape "
                f"{tensor['shape']}"
            )
        if start != at or end > size:
            yield (
                f"{file}: {name} is at bytes {start}..{end}; expected it to start at {at} and "
                f"end within {size}"
            )
        at = end
    if at != size:
        yield f"{file}: {size - at} bytes after the last tensor"


def _shapes(t: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the tensors whose shapes skippy checks."""
    size = t["hidden_size"]
    out = {
        f"stage_projs.{i}.weight": [size, size * len(row)]
        for i, row in enumerate(t["shallow_hidden_layer_indices"])
    }
    out |= {"g0_proj.weight": [size, size], "lm_head.weight": [t["draft_vocab_size"], size]}
    for i in range(t["num_spec_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out[f"spec_layers.{i}.{norm}.weight"] = [size]
    return out


def _rises(values: Sequence[int]) -> bool:
    return all(a < b for a, b in itertools.pairwise(values))
