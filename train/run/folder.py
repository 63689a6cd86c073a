"""The folder of a training run: what it belongs to, and which settings and store it was started
with.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.cache import json_text
from dspark.cache.canonical import canonical
from dspark.cache.errors import DraftError, ExistsError, MismatchError, UsageError
from dspark.cache.files.atomic import STAGING, existing_parent, fsync_path, write_errors, write_file
from dspark.cache.files.lock_files import LOCK
from dspark.cache.files.urls import where
from dspark.cache.settings import rotated_bits
from dspark.cache.shared import config_file
from dspark.train.config import TrainConfig
from dspark.train.recipes import NONE

if TYPE_CHECKING:  # a tool that reads a record does not need the rest of a run
    from dspark.cache.reader import Cache
    from dspark.train.run.setup import Run

TRAINING = "training.json"  # the config of the run, beside the draft
METRICS = "metrics.jsonl"  # a row every --log-every steps, and the validations
CLEARING = ".clearing"  # there while an --overwrite deletes
RESOLVED = "train.yaml"  # the same settings as flags, for --config
# which store it was trained on; the path may change between a run and its resumption, the store may
# not
STORE = "store.json"


WRITTEN = (
    "expected the object that dspark-train wrote. Restore a complete copy of the file, or train "
    "into another --output."
)


def read_record(path: Path, remedy: str = WRITTEN) -> dict[str, Any]:
    """The JSON object in ``path``, a file beside a draft. Raises DraftError, naming the file, if it
    is missing, not JSON, or not an object. ``remedy``: what was expected in it and what to do.
    """
    try:
        found: Any = json_text.read(path)
    except OSError as wrong:
        raise DraftError(f"{path} cannot be read: {wrong.strerror}") from wrong
    except ValueError as wrong:  # of JSON, or bytes that are no text
        raise DraftError(f"{path} is not JSON ({wrong}); {remedy}") from wrong
    if not isinstance(found, dict):
        raise DraftError(f"{path} holds a JSON {type(found).__name__}, not an object; {remedy}")
    return found


def identity(output: Path) -> int | None:
    """Return what distinguishes successive trainings in ``output``: the inode of the record that
    each starts with.
    """
    try:
        return (output / TRAINING).stat().st_ino
    except OSError:
        return None


def refuse_file(output: Path) -> None:
    """Raise UsageError if ``output`` is, or is below, a file."""
    above = existing_parent(output)
    if not above.is_dir():
        raise UsageError(
            f"--output {output}: {above} is a file; expected a folder, or an unused name"
        )


def claim(output: Path, config: TrainConfig, *, resume: bool, overwrite: bool) -> None:
    """Refuse to write into a folder that holds something else, or another run. Changes nothing;
    ``begin`` does what ``overwrite`` allows.
    """
    if config.init_from and Path(config.init_from).resolve().is_relative_to(output.resolve()):
        raise UsageError(
            f"--init-from {config.init_from} lies in --output {output}, which the training "
            "writes; choose another --output"
        )
    refuse_file(output)
    if not output.exists() or all(
        e.name == LOCK or e.name.startswith(STAGING) for e in output.iterdir()
    ):
        return
    previous = output / TRAINING
    if not previous.is_file():
        raise ExistsError(
            f"{output} exists and is not a dspark training run. Choose another --output."
        )
    if overwrite:
        for store, _ in config.stores:
            path = where(store)
            if isinstance(path, Path) and path.resolve().is_relative_to(output.resolve()):
                raise UsageError(
                    f"--overwrite would delete {store}, which lies in {output}. Move the store, "
                    "or choose another --output."
                )
        return
    if (output / CLEARING).exists():
        raise ExistsError(
            f"{output}: an --overwrite was stopped while it deleted the training there, and what "
            "is left is incomplete. Use --overwrite again."
        )
    if not resume:
        raise ExistsError(
            f"{output} holds a training run. Use --resume to continue it, --overwrite to replace "
            "it, or another --output."
        )
    config.continues(TrainConfig.from_json(read_record(previous), str(previous)), str(output))


def store_identity(run: Run) -> dict[str, Any]:
    """Return what identifies a store, for people and for ``--resume``. For several: what they have
    in common, totals, and each one.
    """
    each = [_identity(store) for store in run.cache.stores]
    if len(each) == 1:
        return each[0]
    common = {k: v for k, v in each[0].items() if all(one.get(k) == v for one in each)}
    sums = {k: sum(one[k] for one in each) for k in ("samples", "tokens")}
    return common | sums | {"stores": each}


def _identity(store: Cache) -> dict[str, Any]:
    m = store.manifest
    return {
        "target": m.target.id,
        "revision": m.target.revision,
        "weights_sha256": m.target.weights_sha256,
        "layers": m.layers,
        "codec": m.codec.name,
        **dict(zip(("aux_bits", "last_bits"), rotated_bits(m.codec.name) or (), strict=False)),
        "source": m.source.id,
        "source_sha256": m.source.sha256,
        "samples": m.counts.samples,
        "tokens": m.counts.tokens,
        "content": content(store),
    }


def content(*stores: Cache) -> str:
    """Return what identifies the states and masks of stores: a sha256 over their plans and the
    checksums of every part's record, which lists those of its files.
    """
    if len(stores) > 1:
        return hashlib.sha256(" ".join(map(content, stores)).encode()).hexdigest()
    (cache,) = stores
    return hashlib.sha256(
        canonical({"plan": cache.manifest.digest(), "parts": cache.part_crcs})
    ).hexdigest()


def same_store(output: Path, run: Run) -> None:
    """Raise MismatchError, naming every difference, if the run in ``output`` was started on another
    store.
    """
    path = output / STORE
    if not path.is_file():
        return  # nothing was trained there yet
    then, now = read_record(path), store_identity(run)
    diffs = [
        f"{k}: {then.get(k)!r} there, {now[k]!r} in {run.config.cache}"
        for k in now
        if then.get(k) != now[k]
    ]
    if diffs:
        raise MismatchError(
            f"{output} was started on a different store: "
            + "; ".join(diffs)
            + ". Use that one, or another --output."
        )


def begin(output: Path, run: Run, *, resume: bool, overwrite: bool = False) -> None:
    """Create the folder and record what it belongs to, once ``claim`` and ``prepare`` have
    succeeded. On ``resume``, refuse another store; on ``overwrite``, delete the training that is
    there.
    """
    if resume:
        from dspark.train.run.history import same_start

        same_store(output, run)
        same_start(output, run)
    with write_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        if overwrite and (output / TRAINING).is_file():
            (output / CLEARING).touch()
            fsync_path(output)
            _clear(output)
    # First the record that identifies the folder, so that a run killed early can be continued or
    # replaced like any other.
    write_file(output / TRAINING, (json.dumps(run.config.to_json(), indent=1) + "\n").encode())
    write_file(output / STORE, (json.dumps(store_identity(run), indent=1) + "\n").encode())
    write_file(
        output / RESOLVED,
        config_file.resolved(run.config.flags() | {"recipe": NONE}, "dspark-train"),
    )
    (output / CLEARING).unlink(missing_ok=True)


def _clear(output: Path) -> None:
    """Delete everything but the record that identifies the folder: if this is interrupted, the
    folder can still be replaced.
    """
    for entry in output.iterdir():
        if entry.name in (TRAINING, LOCK, CLEARING):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
