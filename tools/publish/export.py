"""``dspark-tools export``: write a draft in the format and dtype for publication, with manifest and
card; ``--push`` uploads it to the hub.

OUT holds config.json, model.safetensors, manifest.json (count, dtype, size and sha256 of what was
written), README.md and pictures, and is written completely or not at all. The target is not needed:
what a draft borrows from it is not in the file, or (reduced vocabulary) is copied.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dspark.cache.shared.command import command, emit

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST, CARD = "manifest.json", "README.md"
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def export(
    draft: str,
    out: str,
    *,
    layout: str = "flat",
    dtype: str = "bf16",
    target: str | None = None,
    reports: tuple[str, ...] = (),
    pictures: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write OUT; returns its manifest. ``target`` None = the id in store.json. ``reports``: files
    from ``eval --output``.
    """
    import torch

    from dspark.cache.errors import DraftError, UsageError
    from dspark.cache.files.atomic import staged
    from dspark.cache.files.urls import refuse_url
    from dspark.tools import records
    from dspark.tools.publish import card
    from dspark.train.draft.saved import folder as files
    from dspark.train.draft.types import drafter
    from dspark.train.run.folder import STORE, TRAINING
    from dspark.train.run.history import HISTORY

    refuse_url(out, "export to")
    final = Path(out)
    _free(final, overwrite)
    read = [records.report(Path(r)) for r in reports]
    config = files.load_config(draft)
    run = card.DraftRun.read(Path(draft), config)
    target = target or run.store.get("target")
    if not target:
        raise UsageError(f"{draft} has no store.json that names the target; give --target ID")
    wanted = getattr(torch, DTYPES[dtype])
    kind = drafter(config.speculator_type)
    # Through the trained tensors, so that what servers need besides (a zero Markov head) is added
    # to other programs' drafts too.
    learnt = kind.learnt(files.read_tensors(draft), Path(draft) / files.WEIGHTS)
    stored = _whole(kind.served(learnt, config, wanted), config, draft)
    cast = {n: t.to(wanted).contiguous() if t.is_floating_point() else t for n, t in stored.items()}
    overflown = [
        n for n, t in cast.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())
    ]
    if overflown:
        raise DraftError(f"{draft}: {overflown[0]} overflows {dtype}; export as bf16")
    trained = files.trained_as(draft) or config
    kind = drafter(config.speculator_type)
    if layout == "speculators" and not kind.spelled_by_speculators:
        raise UsageError(
            f"{draft} is a draft of type {kind.name}, which the speculators format cannot "
            "express; use --format flat"
        )
    verifier = (target, _architectures(target)) if layout == "speculators" else None
    serving = _serving(target)
    # The target of a link: that is what is replaced, and the link stays.
    with staged(final.resolve(), replace=True) as new:
        new.mkdir(parents=True)
        files.write_tensors(new, cast, trained)
        files.write_config(new, config, wanted, verifier)
        more = kind.packed(new, config, cast, target)
        manifest = {
            "format": layout,
            "target": target,
            "method": kind.method,
            "block_size": config.block_size,
            "dtype": DTYPES[dtype],
            **_contents(new, cast, (files.CONFIG, files.WEIGHTS, *more)),
        }
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        images = card.pictures(run, new, read) if pictures else {}
        (new / CARD).write_text(card.card(run, manifest, read, images, final.name, serving))
        for name in (records.CALIBRATION, records.TEMPERATURES, TRAINING, STORE, HISTORY):
            if (Path(draft) / name).exists():
                shutil.copy(Path(draft) / name, new / name)
    return manifest


def _contents(folder: Path, tensors: dict[str, Tensor], names: Sequence[str]) -> dict[str, Any]:
    """What the manifest says of ``tensors`` and of the files ``names``, the weights second."""
    return {
        "tensors": len(tensors),
        "parameters": sum(t.numel() for t in tensors.values() if t.is_floating_point()),
        "bytes": (folder / names[1]).stat().st_size,
        "tensor_index": {
            n: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)}
            for n, t in sorted(tensors.items())
        },
        "files": {
            n: {"bytes": (folder / n).stat().st_size, "sha256": sha256(folder / n)} for n in names
        },
    }


def _free(final: Path, overwrite: bool) -> None:
    """Refuse an OUT that holds anything but an earlier export, and an earlier export too without
    --overwrite.
    """
    from dspark.cache.errors import ExistsError

    if not final.exists():
        return
    if not final.is_dir():
        raise ExistsError(f"{final} is a file, but OUT must be a folder; choose another")
    if not any(final.iterdir()):
        return
    if not (final / MANIFEST).is_file():
        raise ExistsError(f"{final} exists and holds no export (no {MANIFEST}); choose another OUT")
    if not overwrite:
        raise ExistsError(
            f"{final} exists and holds an earlier export; --overwrite replaces it, or choose "
            "another OUT"
        )


def _whole(stored: dict[str, Any], config: Any, draft: str) -> dict[str, Any]:
    """Return ``stored`` if it is what ``config`` describes; an incomplete draft is not
    published.
    """
    from dspark.cache.errors import DraftError
    from dspark.train.draft.saved.folder import FROZEN, trained_shapes

    wanted = trained_shapes(config)
    wrong = [n for n, shape in wanted.items() if n not in stored or tuple(stored[n].shape) != shape]
    wrong += [n for n in ("d2t", "lm_head.weight") if config.reduced_vocab and n not in stored]
    wrong += [n for n in stored if n not in {*wanted, *FROZEN, "d2t", "t2d"}]
    if wrong:
        raise DraftError(
            f"{draft}: {wrong[0]} is missing, unexpected or of the wrong shape ({len(wrong)} in "
            "all); dspark-tools check gives details"
        )
    return stored


def _architectures(target: str) -> list[str]:
    from transformers import AutoConfig

    try:
        return list(AutoConfig.from_pretrained(target, local_files_only=True).architectures or [])
    except (OSError, ValueError, KeyError):
        return []  # not on this machine; no server reads it


def _serving(target: str) -> str | None:
    """Return what serves drafts for ``target``, from the table of families; None if its config is
    not on this machine.
    """
    from transformers import AutoConfig

    from dspark.dump.target.chain import serving

    try:
        config = AutoConfig.from_pretrained(target, local_files_only=True)
    except (OSError, ValueError, KeyError):
        return None
    return serving([config.model_type, config.get_text_config().model_type]).text


def sha256(path: Path) -> str:
    """Return the sha256 of a file, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def push(folder: str, repo: str, *, private: bool = False) -> str:
    """Upload OUT to the hub as ``repo``; returns its address. The manifest is checked first, so
    what is uploaded is what was exported.
    """
    from dspark.cache.errors import DraftError, UsageError
    from dspark.tools import records

    for name, entry in records.manifest(Path(folder) / MANIFEST)["files"].items():
        try:
            found = sha256(Path(folder) / name)
        except OSError as wrong:
            raise DraftError(
                f"{folder}/{name}, which the manifest names, cannot be read: {wrong.strerror}; "
                "export again"
            ) from wrong
        if found != entry["sha256"]:
            raise DraftError(
                f"{folder}/{name} is not what was exported: found sha256 {found}, the manifest "
                f"has {entry['sha256']}"
            )
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        api = HfApi()
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="dspark draft")
    except HFValidationError as error:
        raise UsageError(f"--push {repo}: {error}") from error
    # The hub's client lets the errors of its HTTP library through: OSErrors in some versions,
    # exceptions of their own in others.
    except (
        OfflineModeIsEnabled,
        LocalTokenNotFoundError,
        HfHubHTTPError,
        OSError,
        RuntimeError,
    ) as error:
        raise DraftError(_not_pushed(folder, repo, error)) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpcore", "requests"):
            raise
        raise DraftError(_not_pushed(folder, repo, error)) from error
    return str(address)


def _not_pushed(folder: str, repo: str, error: BaseException) -> str:
    from dspark.cache.errors import first_line

    return (
        f"--push {repo}: the hub could not be reached or refused the upload "
        f"({first_line(error)}). {folder} is complete: rerun with a network and a login, "
        f"or run `hf upload {repo} {folder}`"
    )


@command(
    "export",
    epilog="""\b
Examples:
  dspark-tools export ./draft ./published
  dspark-tools export ./draft ./published --format speculators --dtype fp16 --report eval.json
  dspark-tools export ./draft ./published --push me/qwen3-4b-dspark
""",
)
@click.argument("draft")
@click.argument("out")
@click.option(
    "--format",
    "layout",
    default="flat",
    type=click.Choice(["flat", "speculators"]),
    help="Format of config.json; vLLM reads both.",
)
@click.option("--dtype", default="bf16", type=click.Choice(list(DTYPES)))
@click.option(
    "--target",
    help="Id of the target, for the card and its commands.  [default: the one in DRAFT/store.json]",
)
@click.option(
    "--report",
    "reports",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    help="A report written by eval --output, for the card; repeatable.",
)
@click.option(
    "--pictures/--no-pictures", default=True, help="Draw pictures for the card (needs matplotlib)."
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier export in OUT.")
@click.option("--push", "repo", help="Also upload OUT to this repository on the Hugging Face hub.")
@click.option("--private", is_flag=True, help="Make that repository private.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the manifest as one JSON object on stdout."
)
def export_command(
    draft: str, out: str, repo: str | None, private: bool, as_json: bool, **flags: Any
) -> None:
    """Write DRAFT to OUT as it is published: config, weights, manifest with checksums, model card,
    pictures.
    """
    manifest = export(draft, out, **flags)
    address = push(out, repo, private=private) if repo else None
    if as_json:
        emit(manifest | {"pushed": address})
        return
    print(
        f"{out}: {manifest['format']}, {manifest['tensors']} tensors, {manifest['dtype']}, "
        f"{manifest['bytes']:,} bytes" + (f"; {address}" if address else "")
    )
