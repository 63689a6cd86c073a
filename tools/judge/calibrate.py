"""``dspark-tools calibrate``: measure how far the confidence head can be trusted on held-out data,
and calibrate it.

The held-out samples are split by prompt hash: temperatures are fitted on one half and judged on the
other. vLLM 0.32 reads confidence only with ``enable_adaptive_verification``, from the head's own
weights, as one linear map for all slots: it has no place for a temperature per slot. So ``--write``
puts temperatures into calibration.json and, for SGLang, which supports them, into
temperatures.json; and ``--fold`` scales the head's weights by the one temperature (and shift) that
suits all slots best, for any server that uses the head.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dspark.cache.shared.command import bar, command, emit
from dspark.tools.flags import COUNT_OR_ALL, DEVICE
from dspark.tools.outputs import OUTPUT_FILE, refuse_unwritable
from dspark.tools.records import CALIBRATION, TEMPERATURES

if TYPE_CHECKING:
    from torch import Tensor

    from dspark.tools.judge.calibration import Scaling


def calibrate(
    cache_path: str,
    draft: str,
    *,
    which: str = "validation",
    shift: bool = False,
    max_anchors: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    write: bool = False,
    fold: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Return the report that ``--json`` prints; ``write`` and ``fold`` change the draft folder."""
    import dspark.cache
    from dspark.cache.errors import DraftError, TrainError
    from dspark.tools.judge.calibration import fit, fit_shared
    from dspark.tools.judge.score import chosen
    from dspark.train.draft.saved.folder import load_config

    cache, config = dspark.cache.open(cache_path), load_config(draft)
    if write or fold:
        refuse_unwritable(Path(draft) / CALIBRATION)
    if not config.enable_confidence_head:
        raise DraftError(f"{draft} has no confidence head, so there is nothing to calibrate")
    samples = chosen(cache, draft, which)
    # A byte of the key that the split into training and validation does not use.
    odd = cache.index["sample_key"][samples, 15] % 2 == 1
    halves = [samples[~odd], samples[odd]]
    if not (halves[0].size and halves[1].size):
        raise TrainError(
            f"{cache_path}: {samples.size} samples ({which}) are too few to fit on one half and "
            "judge on the other; --split all, or hold out more"
        )
    total, done = [0, 0], [0, 0]

    def step(half: int) -> Callable[[int, int], None]:
        def report(at: int, of: int) -> None:
            done[half], total[half] = at, of
            progress(sum(done), sum(total))

        return report

    fitted, judged = (
        collect(
            cache,
            draft,
            part,
            max_anchors=max_anchors,
            device=device,
            dtype=dtype,
            progress=step(i),
        )
        for i, part in enumerate(halves)
    )
    scaled, shared = fit(*fitted, shift=shift), fit_shared(*fitted, shift=shift)
    result = {
        "draft": draft,
        "cache": cache_path,
        "method": "sequential temperature scaling" + (" and shift" if shift else ""),
        "blocks": {"fitted": fitted[0].shape[0], "judged": judged[0].shape[0]},
        **compared(scaled, shared, judged, config.block_size),
        "folded": fold,
    }
    if fold:
        fold_into_head(draft, shared)
    if write or fold:
        from dspark.cache.files.atomic import write_file

        write_file(Path(draft) / CALIBRATION, (json.dumps(result, indent=1) + "\n").encode())
        if not shift:  # SGLang divides by temperatures and shifts nothing
            folded = float(shared.temperature[0]) if fold else 1.0
            served = {"temperatures": [float(t) / folded for t in scaled.temperature]}
            write_file(Path(draft) / TEMPERATURES, (json.dumps(served) + "\n").encode())
    return result


def compared(
    scaled: Scaling, shared: Scaling, judged: tuple[Tensor, Tensor], block_size: int
) -> dict[str, Any]:
    """What the scaling by slot and the shared one change on ``judged``, (logit, accept) [N, B] of
    blocks that neither was fitted on.
    """
    from dspark.tools.judge.calibration import Scaling, identity, measure, recommended, sweep

    raw = identity(block_size)
    everywhere = Scaling(shared.temperature.expand(block_size), shared.shift.expand(block_size))
    before, after = measure(raw, *judged), measure(scaled, *judged)
    points = sweep(scaled, *judged)
    return {
        **scaled.to_json(),
        "shared": shared.to_json(),
        "before": before,
        "after": after,
        "after_shared": measure(everywhere, *judged),
        "lower_everywhere": all(
            b < a for a, b in zip(before["survival"]["ece"], after["survival"]["ece"], strict=True)
        ),
        "sweep": points,
        "recommended_threshold": recommended(points),
        "sweep_uncalibrated": sweep(raw, *judged),
    }


def collect(
    cache: Any,
    draft: str,
    samples: Any,
    *,
    max_anchors: int,
    device: str,
    dtype: str,
    progress: Callable[[int, int], None],
) -> tuple[Any, Any]:
    """Collect confidence logits and acceptance, both fp32 [N, B], of every full block of
    ``samples``.
    """
    import torch

    from dspark.cache.errors import TrainError
    from dspark.tools.judge.score import forced

    logits: list[Any] = []
    accepts: list[Any] = []

    def observe(batch: Any, slots: Any, out: Any) -> None:
        full = batch.counted.all(1)
        for kept, values in ((logits, slots.confidence), (accepts, out.accept)):
            kept.append(batch.in_blocks(values.detach().float())[full].cpu())

    forced(
        cache,
        draft,
        samples,
        max_anchors=max_anchors,
        total_seq_len=None,
        seed=0,
        device=device,
        dtype=dtype,
        progress=progress,
        observe=observe,
    )
    if not logits or not sum(rows.shape[0] for rows in logits):
        raise TrainError(
            f"{cache.path}: no full block in {samples.size} samples; nothing to calibrate on"
        )
    return torch.cat(logits), torch.cat(accepts)


def fold_into_head(draft: str, shared: Any) -> None:
    """Rewrite the confidence head of model.safetensors as ``w / T``, ``b / T + shift``. Training's
    checkpoints are not touched.
    """
    from dspark.train.draft.saved.folder import load_config, read_tensors, trained_as, write_tensors

    stored = read_tensors(draft)
    temperature, shift = float(shared.temperature[0]), float(shared.shift[0])
    for name, plus in (("confidence_head.proj.weight", 0.0), ("confidence_head.proj.bias", shift)):
        stored[name] = (stored[name].double() / temperature + plus).to(stored[name].dtype)
    write_tensors(Path(draft), stored, trained_as(draft) or load_config(draft))


@command(
    "calibrate",
    epilog="""\b
Examples:
  dspark-tools calibrate --cache ./hs.zarr --draft ./draft
  dspark-tools calibrate --cache ./hs.zarr --draft ./draft --write --plot reliability.svg
""",
)
@click.option(
    "--cache", "cache_path", required=True, help="Store of the draft's target and layers."
)
@click.option("--draft", required=True, help="Draft folder.")
@click.option(
    "--split",
    "which",
    default="validation",
    type=click.Choice(["all", "validation"]),
    help="Which samples: those held out in training, or all.",
)
@click.option(
    "--shift/--no-shift", default=False, help="Also fit a shift per slot, which the paper does not."
)
@click.option(
    "--max-anchors", default=0, type=COUNT_OR_ALL, help="Anchors per row; 0 = every eligible one."
)
@click.option(
    "--write",
    is_flag=True,
    help=f"Write the report to DRAFT/{CALIBRATION} and the temperatures, as SGLang reads them, to "
    f"DRAFT/{TEMPERATURES}.",
)
@click.option(
    "--fold",
    is_flag=True,
    help="Scale the head's weights, which vLLM reads, by one temperature fitted to all slots.",
)
@click.option("--plot", type=OUTPUT_FILE, help="Reliability diagrams, .png or .svg.")
@click.option("--device", default="auto", type=DEVICE, help="auto, cpu, cuda or cuda:N.")
@click.option("--dtype", default="float32", type=click.Choice(["float32", "bfloat16"]))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def calibrate_command(as_json: bool, plot: Path | None, **flags: Any) -> None:
    """Compare confidence with acceptance on held-out data: ECE, AUROC, Brier by position;
    sequential temperature scaling; threshold sweep.
    """
    from dspark.tools.judge import plots

    if plot is not None:
        plots.refuse_undrawable(plot)
    with bar("calibrate") as progress:
        result = calibrate(**flags, progress=progress)
    if as_json:
        emit(result)
    else:
        print(table(result))
    if plot is not None:
        plots.reliability(result, plot)


def table(result: dict[str, Any]) -> str:
    """Format, as Markdown, the figures by position, before and after; then the sweep and the
    threshold it recommends.
    """
    from dspark.tools.judge.calibration import KEPT, recommended

    before, after = result["before"]["survival"], result["after"]["survival"]
    lines = [
        "| position | T | ECE | calibrated | Brier | calibrated | AUROC | confidence | accepted |",
        "|" + " --- |" * 9,
    ]
    for k, t in enumerate(result["temperature"]):
        roc = before["auroc"][k]
        lines.append(
            f"| {k + 1} | {t:.2f} | {before['ece'][k]:.4f} | {after['ece'][k]:.4f} | "
            f"{before['brier'][k]:.4f} | {after['brier'][k]:.4f} | "
            f"{'-' if roc is None else f'{roc:.3f}'} | {before['confidence'][k]:.3f} | "
            f"{before['accepted'][k]:.3f} |"
        )
    lines += [
        "",
        "| survival at least | drafts verified per step | tokens per step | accepted of verified |",
        "|" + " --- |" * 4,
    ]
    lines += [
        f"| {r['threshold']:.2f} | {r['verified']:.2f} | {r['tokens']:.3f} | "
        f"{r['accepted_share']:.3f} |"
        for r in result["sweep"]
    ]
    if not result["sweep"]:
        return "\n".join(lines)
    best = recommended(result["sweep"])
    at = next(r for r in result["sweep"] if r["threshold"] == best)
    lines += [
        "",
        f"Recommended threshold {best:.2f}: {at['tokens']:.3f} tokens per step with "
        f"{at['verified']:.2f} drafts verified, "
        f"the fewest that keep {KEPT:.0%} of the tokens gained.",
    ]
    return "\n".join(lines)
