"""A draft folder: ``config.json`` and ``model.safetensors`` in the layouts that vLLM serves with
method ``dspark``.

config.json is flat (DeepSpec's spelling, what training writes) or in the speculators format; the
tensors are the same. The weights' own header repeats, under ``TRAINED_AS``, the config they were
trained with: so an edited or converted config.json can be detected.

Legend: V/Vd target and draft vocabulary, H hidden size, r Markov rank.

Beside the trained tensors a reduced vocabulary needs ``d2t`` int64[Vd] (offsets: target id = i +
d2t[i]), ``t2d`` bool[V] and its own ``lm_head.weight`` [Vd, H]; for the full vocabulary vLLM takes
embedding and output matrix from the target, so they are left out unless requested. Both files are
written beside their place, synced and renamed, so a reader never sees half a file.

vLLM serves the vanilla Markov head and, by a zero head written for it, none (dflash). Gated and rnn
drafts are saved in full, with ``"vllm_servable": false`` in config.json: vLLM would refuse their
extra tensors. ``"sglang_servable"`` says whether SGLang serves a draft; it supports gated and rnn
heads.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dspark.cache import json_text
from dspark.cache.errors import DraftError
from dspark.cache.files.atomic import staged, write_file
from dspark.cache.files.checksum import crc32c
from dspark.cache.shared.process import no_plan_a_shape
from dspark.cache.target.frozen import FrozenTarget
from dspark.train.draft.config import DraftConfig
from dspark.train.draft.model import DraftModel, TargetWeights
from dspark.train.draft.saved.speculators import to_speculators
from dspark.train.draft.saved.spelling import flat_of
from dspark.train.draft.saved.vocabulary import faults, ids_of, offsets_of
from dspark.train.draft.types import drafter

CONFIG, WEIGHTS = "config.json", "model.safetensors"
TRAINED_AS, CHECKSUM = "dspark_trained_as", "dspark_crc32c"
FROZEN = ("embed_tokens.weight", "lm_head.weight")


def save_draft(
    folder: Path | str,
    model: DraftModel,
    *,
    dtype: torch.dtype = torch.bfloat16,
    include_frozen: bool = False,
    trained: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the draft; ``include_frozen`` adds embed_tokens and lm_head for readers that do not use
    the target's. ``trained`` replaces the model's own trained tensors, which are only shards if the
    model is sharded.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = served_tensors(model, dtype, include_frozen=include_frozen, trained=trained)
    write_tensors(folder, tensors, model.config)
    write_config(folder, model.config, dtype)
    drafter(model.config.speculator_type).written(folder, model)


def write_tensors(folder: Path, tensors: dict[str, Tensor], config: DraftConfig) -> None:
    """Write model.safetensors, with the training config and a checksum of all tensors in its
    header.
    """
    metadata = {
        "format": "pt",
        TRAINED_AS: json.dumps(config.to_flat(), sort_keys=True),
        CHECKSUM: str(checksum(tensors)),
    }
    # To the file, not to bytes first: those are copied while all other threads wait.
    with staged(folder / WEIGHTS, replace=True) as to:
        to.touch()
        mode = to.stat().st_mode
        save_file(tensors, to, metadata=metadata)
        to.chmod(mode)  # safetensors 0.8 lets only the owner read it


def checksum(tensors: Mapping[str, Tensor]) -> int:
    """Return the crc32c over names, dtypes, shapes and values, in the order of names."""
    out = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        out = crc32c(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode(), out)
        if tensor.numel():
            out = crc32c(tensor.reshape(-1).view(torch.uint8).numpy().data, out)
    return out


def write_config(
    folder: Path,
    config: DraftConfig,
    dtype: torch.dtype,
    verifier: tuple[str, list[str]] | None = None,
) -> None:
    """Write config.json: flat, or in the speculators format if its ``verifier`` (target id,
    architectures) is given.
    """
    flat = config.to_flat()
    flat["dtype"] = str(dtype).removeprefix("torch.")
    flat["vllm_servable"] = config.servable_by_vllm
    flat["sglang_servable"] = drafter(config.speculator_type).servable_by_sglang(config)
    spelled = flat if verifier is None else to_speculators(flat, *verifier)
    write_file(folder / CONFIG, (json.dumps(spelled, indent=2) + "\n").encode())


def served_tensors(
    model: DraftModel,
    dtype: torch.dtype,
    *,
    include_frozen: bool,
    trained: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return checkpoint name -> tensor on the CPU; ``trained`` as for ``save_draft``."""
    config = model.config
    whole = trained or dict(model.trained())
    learnt = {name: value.detach().to("cpu", dtype).contiguous() for name, value in whole.items()}
    out = drafter(config.speculator_type).served(learnt, config, dtype)
    head = model.frozen_head
    if include_frozen:
        embed = model.embed_tokens.weight
        assert isinstance(embed, Tensor)
        # safetensors refuses shared memory: a tied output matrix is written as a copy.
        out["embed_tokens.weight"] = embed.detach().to("cpu", dtype).clone()
    # a type may have its own
    if (include_frozen or config.reduced_vocab) and "lm_head.weight" not in out:
        out["lm_head.weight"] = head.draft_head.detach().to("cpu", dtype).clone()
    if head.draft_ids is not None:
        ids = head.draft_ids.cpu()
        out["d2t"] = offsets_of(ids)
        out["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill(0, ids, True)
    return out


def load_config(folder: Path | str) -> DraftConfig:
    """Load the config of a draft folder, in any spelling that ``flat_of`` knows."""
    try:
        return DraftConfig.from_flat(flat_of(read_config(folder)))
    except (
        TypeError,
        AttributeError,
        KeyError,
        OverflowError,
    ) as wrong:  # such as a list in place of a name
        raise DraftError(f"{Path(folder) / CONFIG}: a value has the wrong type: {wrong}") from wrong


def read_config(folder: Path | str) -> dict[str, Any]:
    """Read config.json unchanged."""
    path = Path(folder) / CONFIG
    try:
        flat: Any = json_text.read(path)
    except OSError as wrong:
        raise DraftError(
            f"{path}: {wrong.strerror}; expected a draft folder with {CONFIG} and {WEIGHTS}"
        ) from wrong
    except ValueError as wrong:
        raise DraftError(f"{path} is not JSON: {wrong}") from wrong
    if not isinstance(flat, dict):
        raise DraftError(f"{path} is not a JSON object")
    return flat


def trained_as(folder: Path | str) -> DraftConfig | None:
    """Return the config in the weights' header; None for weights that another program wrote."""
    with _opened(Path(folder) / WEIGHTS) as file:
        text = (file.metadata() or {}).get(TRAINED_AS)
    return None if text is None else DraftConfig.from_flat(json_text.loads(text))


def trained_shapes(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every trained tensor that ``config`` describes. Allocates nothing."""
    whole = dataclasses.replace(config, draft_vocab_size=config.vocab_size)
    kind = drafter(config.speculator_type)
    with torch.device("meta"):
        matrix = torch.empty(config.vocab_size, config.hidden_size)
        model = kind.network(
            whole, FrozenTarget(matrix, torch.empty(config.hidden_size), matrix, True), None
        )
        served = kind.served(dict(model.trained()), config, torch.float32)
    shapes = {name: tuple(p.shape) for name, p in served.items()}
    by_id = ("markov_head.markov_w2.weight", "lm_head.weight")
    return {
        n: (config.draft_vocab_size, *shape[1:]) if n in by_id else shape
        for n, shape in shapes.items()
    }


def load_draft(
    folder: Path | str,
    target: TargetWeights,
    *,
    dtype: torch.dtype = torch.float32,
    frozen_dtype: torch.dtype | None = None,
) -> DraftModel:
    """Load the draft in ``folder`` with ``target``'s embedding and output matrix; its config is
    ``.config``. Every tensor must be present, known and of the right shape: a draft that lacks one
    would run and be served, but badly. ``frozen_dtype`` None casts the target's matrices to
    ``dtype`` too.
    """
    no_plan_a_shape()
    config = load_config(folder)
    path = Path(folder) / WEIGHTS
    then = trained_as(folder)
    if then is not None and then.bonus_anchor != config.bonus_anchor:
        raise DraftError(
            f"{folder}: {CONFIG} says sample_from_anchor = {not config.bonus_anchor}, but the "
            f"weights were trained with {not then.bonus_anchor}; correct it"
        )
    stored = read_tensors(folder)
    _refuse_missing(stored, config, path)
    draft_ids = draft_ids_of(stored, config, path)
    kind = drafter(config.speculator_type)
    model = kind.network(config, target, draft_ids, frozen_dtype=frozen_dtype or dtype)
    stored = kind.learnt(stored, path)
    wanted = dict(model.trained())
    missing, unexpected = (
        sorted(set(wanted) - set(stored)),
        sorted(set(stored) - set(wanted) - set(FROZEN)),
    )
    if missing or unexpected:
        raise DraftError(
            f"{path} does not match {CONFIG}: missing {_some(missing)}, unexpected "
            f"{_some(unexpected)}"
        )
    for name, parameter in wanted.items():
        value = stored[name]
        if value.shape != parameter.shape:
            raise DraftError(
                f"{path}: {name} is {list(value.shape)}, expected {list(parameter.shape)}"
            )
        with torch.no_grad():
            parameter.copy_(value)
    model.to(dtype=dtype) if frozen_dtype is None else _cast_trained(model, dtype)
    check_frozen(stored, target, model.frozen_head.draft_ids, path)
    return model


def _refuse_missing(stored: Mapping[str, Tensor], config: DraftConfig, path: Path) -> None:
    """Raise DraftError, before allocating, if config.json describes far more than the file
    holds.
    """
    asked = sum(math.prod(shape) for shape in trained_shapes(config).values())
    held = sum(t.numel() for t in stored.values())
    if asked > 2 * held + (1 << 20):  # a type may make tensors of its own from what is stored
        raise DraftError(f"{path} holds {held:,} values, {CONFIG} describes {asked:,}")


def _cast_trained(model: DraftModel, dtype: torch.dtype) -> None:
    for _, parameter in model.trained():
        parameter.data = parameter.data.to(dtype)
    model.join()


def read_tensors(folder: Path | str) -> dict[str, Tensor]:
    """Read every tensor of model.safetensors, as stored. Raises DraftError if they do not match its
    checksum; other programs write none.
    """
    with _opened(Path(folder) / WEIGHTS) as file:
        out = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        expected = (file.metadata() or {}).get(CHECKSUM)
    if expected is not None and (found := str(checksum(out))) != expected:
        raise DraftError(
            f"{Path(folder) / WEIGHTS}: crc32c of its tensors is {found}, expected {expected}: "
            "the file was damaged, or changed by a program that did not update the "
            "checksum. Restore it, or resume the training, which rewrites it."
        )
    return out


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as wrong:
        raise DraftError(f"{path} cannot be read as safetensors: {wrong}") from wrong


def draft_ids_of(stored: dict[str, Tensor], config: DraftConfig, path: Path) -> Tensor | None:
    """Return the target ids of the draft's rows, taken out of ``stored``; None for the full
    vocabulary.
    """
    wrong = (
        faults(stored, config.draft_vocab_size, config.vocab_size) if config.reduced_vocab else []
    )
    offsets = stored.pop("d2t", None)
    stored.pop("t2d", None)
    if wrong:
        raise DraftError(f"{path}: {wrong[0]}")
    return ids_of(offsets) if config.reduced_vocab and offsets is not None else None


def check_frozen(
    stored: Mapping[str, Tensor], target: TargetWeights, ids: Tensor | None, path: Path
) -> None:
    """Check that included matrices are the target's at the file's precision; otherwise the draft
    belongs to another model.

    ``ids`` int64[Vd]: the target ids of the rows of a reduced vocabulary.
    """
    head = target.lm_head if ids is None else target.lm_head[ids.to(target.lm_head.device)]
    for name, own in (("embed_tokens.weight", target.embed_tokens), ("lm_head.weight", head)):
        value = stored.get(name)
        if value is None:
            continue
        if value.shape != own.shape:
            raise DraftError(
                f"{path}: {name} is {list(value.shape)}, the target's is {list(own.shape)}"
            )
        if not same_matrix(value, own):
            raise DraftError(
                f"{path}: {name} is not the target's; this draft was trained for another model"
            )


def same_matrix(stored: Tensor, own: Tensor) -> bool:
    """Tell whether ``stored`` is the target's ``own``, rounded once or twice: trained in bfloat16
    or not, then exported in any dtype.
    """
    if stored.shape != own.shape:
        return False
    own = own.detach().cpu()
    ways = (own.to(stored.dtype), own.to(torch.bfloat16).to(stored.dtype))
    return any(torch.equal(stored, way) for way in ways) or torch.equal(
        stored.to(torch.bfloat16), ways[1].to(torch.bfloat16)
    )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4]) or "nothing"
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown
