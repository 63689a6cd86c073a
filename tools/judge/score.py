"""``dspark-tools score``: teacher-forced metrics of a draft on a store. With ``max_anchors`` 0
nothing is random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from dspark.cache.errors import MismatchError, UsageError
from dspark.cache.shared.command import bar, command, emit, json_flag, table
from dspark.cache.shared.own_process import starting
from dspark.tools import records
from dspark.tools.flags import COUNT, COUNT_OR_ALL, DEVICE
from dspark.tools.judge import several

if TYPE_CHECKING:
    from dspark.cache.reader import Cache
    from dspark.train.data.batch import Batch
    from dspark.train.data.row import PackedRow
    from dspark.train.objective.objective import ObjectiveOutput
    from dspark.train.objective.slots import SlotInputs


def score(
    cache: Cache,
    draft: str,
    *,
    max_anchors: int = 0,
    which: str = "all",
    total_seq_len: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Compute metrics over the samples that ``which`` names.

    ``all``; or ``validation`` / ``train``, the split that the draft was trained with (by prompt
    hash, from its training.json).
    """
    from dspark.train.draft.saved.folder import load_config

    samples = chosen(cache, draft, which)
    result = forced(
        cache,
        draft,
        samples,
        max_anchors=max_anchors,
        total_seq_len=total_seq_len,
        seed=seed,
        device=device,
        dtype=dtype,
        progress=progress,
        walk=True,
    )
    return {
        **result,
        "samples": int(samples.size),
        "which": which,
        "speculator_type": load_config(draft).speculator_type,
        "draft": str(draft),
        "cache": str(cache.path),
    }


def forced(
    cache: Cache,
    draft: str,
    samples: np.ndarray[Any, np.dtype[np.int64]],
    *,
    max_anchors: int,
    total_seq_len: int | None,
    seed: int,
    device: str,
    dtype: str,
    progress: Callable[[int, int], None],
    observe: Callable[[Batch, SlotInputs, ObjectiveOutput], None] | None = None,
    walk: bool = False,
) -> dict[str, Any]:
    """Compute the draft's teacher-forced metrics over ``samples``; ``observe`` sees the slots of
    every row. ``walk`` adds the accepted lengths where decoding begins its blocks
    (``train/objective/walk.py``), null unless every anchor is scored.
    """
    with starting():
        from dspark.train.compute import choose_compute
        from dspark.train.data.stream import VALIDATION_EPOCH, Stream
        from dspark.train.draft.saved.folder import load_draft
        from dspark.train.draft.types import drafter
        from dspark.train.evaluate import evaluate
        from dspark.train.objective.walk import KEYS, Walk
        from dspark.train.run.setup import row_length

        compute = choose_compute(device, dtype, False)
        model = load_draft(draft, cache.target, dtype=compute.dtype)
    belongs(cache, model.config, draft)
    model.to(compute.device)
    model.eval()
    stream = Stream(
        cache, samples, seed=seed, total_seq_len=row_length(cache, total_seq_len), rows_per_step=1,
        block_size=model.config.block_size, max_anchors=max_anchors,
    )  # fmt: skip
    total = len(stream.plan(VALIDATION_EPOCH))

    def rows() -> Iterator[PackedRow]:
        for done, step in enumerate(stream.steps_from(VALIDATION_EPOCH)):
            yield from step
            progress(done + 1, total)

    sums = Walk() if walk and max_anchors == 0 else None
    found = evaluate(
        model,
        cache,
        rows(),
        device=compute.device,
        dtype=compute.dtype,
        backend=compute.backend,
        observe=observe,
        walk=sums,
    )
    if walk and max_anchors == 0 and drafter(model.config.speculator_type).stages(model.config):
        from dspark.tools.judge.pipeline_score import pipeline_score
        from dspark.train.draft.spd.head import SpdHead

        assert isinstance(model, SpdHead)
        found |= pipeline_score(
            model,
            cache,
            (row for step in stream.steps_from(VALIDATION_EPOCH) for row in step),
            device=compute.device,
            dtype=compute.dtype,
            backend=compute.backend,
        )
    return {**found, **(sums.result() if sums is not None else dict.fromkeys(KEYS) if walk else {})}


def belongs(cache: Cache, config: Any, draft: str) -> None:
    """Raise MismatchError unless the draft was made for this store's target, and the store has the
    layers that it reads.
    """
    from dspark.train.draft.types import drafter

    target = cache.manifest.target
    if missing := [i for i in config.target_layer_ids if i not in cache.manifest.layers]:
        raise MismatchError(
            f"{draft}: its target_layer_ids (output of layer i) are "
            f"{list(config.target_layer_ids)}, but the store {cache.path} has "
            f"{cache.manifest.layers}, without {missing}; score the draft on a store that "
            "has them"
        )
    pairs = (
        ("hidden size", config.hidden_size, target.hidden_size),
        ("vocabulary", config.vocab_size, target.vocab_size),
        *(
            [("mask token", config.mask_token_id, target.mask_token_id)]
            if drafter(config.speculator_type).masks
            else []
        ),
    )
    for what, ours, theirs in pairs:
        if ours != theirs:
            raise MismatchError(
                f"{draft}: its {what} is {ours}, but the store {cache.path} has {theirs}; score "
                "the draft on a store of its own target"
            )


def chosen(cache: Cache, draft: str, which: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the sample indices of the scored part of the store."""
    from dspark.train.data.stream import split
    from dspark.train.run.folder import TRAINING

    if which == "all":
        return np.arange(len(cache), dtype=np.int64)
    path = Path(draft) / TRAINING
    if not path.exists():
        raise UsageError(
            f"--split {which} needs {path}, which records how training split the store; --split "
            "all does not need it"
        )
    record = records.training(Path(draft), val_fraction=True)
    training, held_out = split(cache.index["sample_key"], float(record["val_fraction"]))
    return held_out if which == "validation" else training


def same_samples(cache: Cache, drafts: Sequence[str], which: str) -> None:
    """Raise UsageError unless ``which`` names the same samples for all ``drafts``: one table
    compares on one set.
    """
    first = chosen(cache, drafts[0], which)
    for other in drafts[1:]:
        if not np.array_equal(first, chosen(cache, other, which)):
            raise UsageError(
                f"--split {which}: {drafts[0]} and {other} were trained with different splits, "
                "so the samples would differ; use --split all"
            )


@command(
    "score",
    epilog="\b\nExamples:\n"
    "  dspark-tools score --cache ./hs.zarr --draft ./draft --split validation",
)
@click.option("--cache", required=True, help="Store of the draft's target and layers.")
@click.option(
    "--draft",
    required=True,
    multiple=True,
    help="Draft folder: config.json and model.safetensors. Repeatable: one table, on the same "
    "samples.",
)
@click.option(
    "--max-anchors",
    default=0,
    type=COUNT_OR_ALL,
    help="Anchors per row; 0 = every eligible one, no randomness.",
)
@click.option(
    "--split",
    "which",
    default="all",
    type=click.Choice(["all", "validation", "train"]),
    help="Which samples, according to the draft's own split.",
)
@click.option(
    "--total-seq-len",
    type=COUNT,
    help="Tokens per packed row; does not change the result.  [default: as in training]",
)
@click.option("--device", default="auto", type=DEVICE, help="auto, cpu, cuda or cuda:N.")
@click.option("--dtype", default="float32", type=click.Choice(["float32", "bfloat16"]))
@json_flag
def score_command(
    cache: str, draft: tuple[str, ...], max_anchors: int, which: str, as_json: bool, **where: Any
) -> None:
    """Compute teacher-forced metrics of a draft: losses, accept rate by slot, mean accepted length
    (tau), calibration.
    """
    import dspark.cache

    with starting():
        store = dspark.cache.open(cache)
    same_samples(store, draft, which)
    found = []
    for folder in draft:
        with bar(f"score {folder}" if len(draft) > 1 else "score") as progress:
            found.append(
                score(
                    store, folder, max_anchors=max_anchors, which=which, progress=progress, **where
                )
            )
    if as_json:
        emit(found[0] if len(draft) == 1 else {"drafts": found})
        return
    if len(draft) > 1:
        said = (
            f"{found[0]['samples']} samples ({which}) of {cache}, at every anchor"
            if max_anchors == 0
            else f"{found[0]['samples']} samples ({which}) of {cache}, {max_anchors} anchors per "
            "row"
        )
        several.show(several.cells(draft, found, several.SCORE), said)
        return
    data = found[0]

    def number(value: Any) -> str:
        if isinstance(value, list):
            return "  ".join(f"{v:.3f}" for v in value)
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    units = {
        "mean_accepted_length": "tau: tokens per target step at an anchor drawn anywhere, "
        "temperature 1",
        "walk": "tokens per target step where decoding begins its blocks, temperature 1",
        "walk_greedy": "the same, greedy",
        "accept_rate": "by slot, given that all before it were accepted",
        "ce_loss": "nats",
    }
    first = [name for name in ("walk", "walk_greedy", "mean_accepted_length") if name in data]
    names = [*first, *(name for name in data if name not in first)]
    table([(name, f"{number(data[name])}  {units.get(name, '')}".rstrip()) for name in names])
