"""``dspark-train``: flags to TrainConfig to the loop. Imports nothing heavy until it runs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from dspark.cache.errors import Stopped, UsageError
from dspark.cache.shared.command import bar, break_lock_flag, command, emit, version_flag
from dspark.cache.shared.layer_ids import LayerIds
from dspark.cache.shared.own_process import starting
from dspark.train.config import LOGGERS, SCHEDULES, SELECT, STRATEGIES, TrainConfig, with_passes
from dspark.train.draft.saved.shape_file import read_shape
from dspark.train.draft.types import TYPES, drafter
from dspark.train.recipes import AUTO, NONE, configure, recipes

DEFAULTS = TrainConfig(cache="")
NOT_SETTINGS = {
    "recipe",
    "resume",
    "overwrite",
    "break_lock",
    "dry_run",
    "as_json",
}  # flags that are not fields of TrainConfig


def _names(context: click.Context, parameter: click.Parameter, value: Any) -> tuple[str, ...]:
    """Split a comma-separated list; a config file's list is one already."""
    parts = value.split(",") if isinstance(value, str) else value or ()
    return tuple(str(part).strip() for part in parts)


@command(
    epilog="""\b
Examples:
  dspark-train --cache ./hs.zarr
  dspark-train --cache ./hs.zarr --output ./draft --epochs 3 --block-size 7 --max-anchors 512
  dspark-train --cache ./hs.zarr --resume                    after Ctrl-C or a crash
  dspark-train --cache ./hs.zarr --speculator-type dflash    the plain parallel draft
  dspark-train --cache ./hs.zarr --recipe Qwen3-4B --epochs 3
  dspark-train --cache ./own.zarr --init-from ./draft --lr 1e-4    fine-tune a draft
  dspark-train --cache ./own.zarr --cache ./general.zarr=0.05 --init-from ./draft
  torchrun --nproc-per-node 8 -m dspark.train --cache ./hs.zarr    8 GPUs
""",
)
@click.option(
    "--cache",
    required=True,
    multiple=True,
    metavar="STORE[=PASSES]",
    help="Store that dspark-dump wrote. Repeatable, for stores of one target: they are mixed, "
    "each with its number of passes per epoch (default 1).",
)
@click.option(
    "--output",
    default=DEFAULTS.output,
    help="Folder of the draft: config.json, model.safetensors, metrics.jsonl, checkpoints/.",
)
@click.option(
    "--recipe",
    default=AUTO,
    metavar="NAME",
    help=f"Defaults for flags that are not given: {', '.join(recipes())}; {AUTO} = the recipe of "
    f"the store's target, if there is one; {NONE}.",
)
@click.option(
    "--epochs", default=DEFAULTS.epochs, type=float, help="Passes over the training samples."
)
@click.option("--max-steps", type=int, help="Total optimizer steps, instead of --epochs.")
@click.option("--lr", default=DEFAULTS.lr, help="Peak learning rate.")
@click.option(
    "--optimizer",
    default=DEFAULTS.optimizer,
    type=click.Choice(["adamw", "muon"]),
    help="muon: orthogonal steps for the layers' matrices, AdamW for the rest. On SmolLM2, "
    "after equal steps: tau 3.3 at --lr 2e-3, against 2.5 with AdamW at 1e-3.",
)
@click.option(
    "--min-lr-ratio",
    default=DEFAULTS.min_lr_ratio,
    help="Learning rate at the end of the schedule, as a fraction of --lr.",
)
@click.option(
    "--lr-schedule", default=DEFAULTS.lr_schedule, type=click.Choice(SCHEDULES),
    help=(
"How the learning rate falls after warm-up; wsd: constant, then linear over the last "
"fifth."
),
)  # fmt: skip
@click.option(
    "--warmup-ratio", default=DEFAULTS.warmup_ratio, help="Fraction of the steps used for warm-up."
)
@click.option("--weight-decay", default=DEFAULTS.weight_decay)
@click.option(
    "--betas", nargs=2, type=float, default=DEFAULTS.betas,
    help="AdamW's two moment decay rates.",
)  # fmt: skip
@click.option("--grad-clip", default=DEFAULTS.grad_clip, help="Clip gradients to this global norm.")
@click.option(
    "--total-seq-len",
    type=int,
    help="Tokens per packed row.  [default: 4096, or the store's sequence length]",
)
@click.option(
    "--rows-per-step",
    default=DEFAULTS.rows_per_step,
    help="Packed rows per optimizer step, over all processes.",
)
@click.option(
    "--max-anchors",
    default=DEFAULTS.max_anchors,
    help="Anchors drawn per row; 0 = every eligible one.",
)
@click.option("--speculator-type", default=DEFAULTS.speculator_type, type=click.Choice(list(TYPES)))
@click.option(
    "--layers",
    type=LayerIds(),
    help="Which of the store's layers the draft reads, as outputs of layer i.  [default: all; "
    "three for eagle3 and peagle]",
)
@click.option("--num-layers", default=DEFAULTS.num_layers, help="Layers of the draft.")
@click.option(
    "--num-heads", type=int, help="Query heads per draft layer.  [default: from the target]"
)
@click.option(
    "--num-kv-heads", type=int, help="Key-value heads per draft layer.  [default: from the target]"
)
@click.option(
    "--head-dim",
    type=int,
    help="Width of a head; must be even.  [default: from the target; 128 where serving needs it]",
)
@click.option(
    "--intermediate-size",
    type=int,
    help="Width of a draft layer's MLP.  [default: the target's, or 3 x hidden size if only its "
    "experts have one]",
)
@click.option(
    "--sliding-window",
    type=int,
    help="Let layers attend only to the last N tokens, as vLLM serves them. 0 = attend to "
    "everything.  [default: 0, or the value of --init-from's draft]",
)
@click.option(
    "--layer-types",
    callback=_names,
    metavar="KINDS",
    help="sliding or full per layer, if --sliding-window is not for all of them: "
    "sliding,sliding,full.",
)
@click.option(
    "--rope-scaling",
    metavar="JSON",
    help='Scale RoPE for rows longer than the target was trained on: \'{"rope_type": "yarn", '
    '"factor": 4, "original_max_position_embeddings": 8192}\'; linear and llama3 '
    "too; none = unscaled.",
)
@click.option(
    "--draft-config",
    metavar="FILE.json",
    help="The draft's shape from a file (num_attention_heads, head_dim, ...); flags override it.",
)
@click.option(
    "--init-from",
    metavar="DRAFT",
    help="Start from the weights of this draft (ours, DeepSpec's or speculators'). Its shape is "
    "the default for the shape flags.",
)
@click.option("--block-size", default=DEFAULTS.block_size, help="Tokens drafted per anchor (B).")
@click.option("--markov-rank", default=DEFAULTS.markov_rank)
@click.option(
    "--markov-head-type",
    default=DEFAULTS.markov_head_type,
    type=click.Choice(["vanilla", "gated", "rnn"]),
    help="vLLM serves vanilla only.",
)
@click.option(
    "--draft-vocab-size",
    type=int,
    help="Let the draft propose only the N most frequent supervised token ids.  [default: the "
    "whole vocabulary]",
)
@click.option(
    "--loss-fn",
    default=DEFAULTS.loss_fn,
    help="Loss weights as JSON: ce, kl (divergence from the target) and l1 (= 2 TV), or "
    "tv (= l1 / 2).",
)
@click.option(
    "--confidence-head-alpha",
    default=DEFAULTS.confidence_head_alpha,
    help="Weight of the confidence loss; 0 = no confidence head.",
)
@click.option("--decay", default=DEFAULTS.decay, help="Slot k has weight exp(-k/decay).")
@click.option(
    "--val-fraction",
    default=DEFAULTS.val_fraction,
    help="Fraction of the prompts held out, chosen by hash.",
)
@click.option("--val-rows", default=DEFAULTS.val_rows, help="Maximum packed rows per validation.")
@click.option(
    "--val-walk-rows",
    default=DEFAULTS.val_walk_rows,
    help="On how many of these rows to also compute the walk: the accepted length at the "
    "positions where decoding starts its blocks. 0 = none.",
)
@click.option(
    "--select", default=DEFAULTS.select, type=click.Choice(SELECT),
    help="Which draft is exported: the last one, or the best one in validation.",
)  # fmt: skip
@click.option(
    "--checkpoint-freq",
    default=DEFAULTS.checkpoint_freq,
    help="Epochs between checkpoints and validations; 0.25 = four per epoch.",
)
@click.option("--keep-checkpoints", default=DEFAULTS.keep_checkpoints)
@click.option("--seed", default=DEFAULTS.seed)
@click.option("--device", default=DEFAULTS.device, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--dtype",
    default=DEFAULTS.dtype,
    type=click.Choice(["auto", "bfloat16", "float32"]),
    help="auto: bfloat16 on cuda, float32 on cpu.",
)
@click.option(
    "--workers",
    type=int,
    help="Processes that read the store, per GPU.  [default: 2 to 8, by the GPU's share of the "
    "cores; 0 on cpu]",
)
@click.option(
    "--compile/--no-compile",
    "compile_",
    default=None,
    help="torch.compile the step.  [default: on cuda]",
)
@click.option(
    "--activation-checkpointing",
    is_flag=True,
    help="Recompute each layer in the backward pass: less memory per row, more time.",
)
@click.option(
    "--strategy",
    type=click.Choice(STRATEGIES),
    help="How processes under torchrun share the work: zero splits master weights and moments, "
    "ddp replicates everything, fsdp2 is torch's FSDP2.  [default: zero]",
)
@click.option(
    "--log-every", default=DEFAULTS.log_every, help="Steps between rows of metrics.jsonl."
)
@click.option(
    "--logger",
    multiple=True,
    type=click.Choice(LOGGERS),
    help="Also log there; repeatable. A logger that is not installed causes only a warning.",
)
@click.option(
    "--tensorboard/--no-tensorboard",
    default=DEFAULTS.tensorboard,
    help="Write event files to OUTPUT/tensorboard.",
)
@click.option("--resume", is_flag=True, help="Continue from the newest checkpoint in --output.")
@click.option("--overwrite", is_flag=True, help="Replace the training in --output.")
@break_lock_flag
@click.option(
    "--dry-run",
    is_flag=True,
    help="Take a few steps, write nothing, and report steps, hours and memory.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print the last metrics as one JSON object on stdout."
)
@version_flag
def main(
    resume: bool, overwrite: bool, break_lock: bool, dry_run: bool, as_json: bool, **flags: Any
) -> None:
    """Train a DSpark draft from a store of hidden states. No target model, no server."""
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    config = configured(click.get_current_context())
    with starting():
        from dspark.train.distributed import PeerError, rank_here
        from dspark.train.loop import train

    first = rank_here() == 0
    if dry_run:
        return _tell(config, first, as_json)

    try:
        with bar("train") if first else nullcontext(_quiet) as progress:
            result = train(
                config,
                resume=resume,
                overwrite=overwrite,
                break_lock=break_lock,
                progress=progress,
                say=_say if first else _quiet,
            )
    except (PeerError, Stopped) as error:
        if first:
            raise
        sys.exit(getattr(error, "exit_code", 1))  # rank 0 has printed it
    if not first:
        return
    for line in closing(config, result):
        _say(line)
    if as_json:
        emit(result)


def _tell(config: TrainConfig, first: bool, as_json: bool) -> None:
    """Do the dry run on all ranks; the first reports."""
    from dspark.train import dry

    found = dry.dry_run(config, say=_say if first else _quiet)
    if not first:
        return
    _say(dry.words(found))
    if as_json:
        emit(found)


def configured(context: click.Context) -> TrainConfig:
    """Return the settings of a command line: its flags, and a recipe's or the general defaults for
    the rest.
    """
    default = click.core.ParameterSource.DEFAULT
    given = {
        n: v for n, v in context.params.items() if context.get_parameter_source(n) is not default
    }
    named = {n.rstrip("_"): v for n, v in given.items() if n not in NOT_SETTINGS}  # compile_
    shape = read_shape(named.pop("draft_config")) if "draft_config" in named else {}
    if named.get("init_from"):
        from dspark.train.draft.saved.warm import settings_of

        shape = settings_of(named["init_from"]) | shape
    named = shape | named | _stores(named["cache"])
    return configure(named, context.params["recipe"])


def _stores(given: Sequence[str]) -> dict[str, Any]:
    """Return the settings ``cache`` and ``caches`` for ``--cache``."""
    first, passes = with_passes(given[0])
    plain = len(given) == 1 and passes == 1
    return {"cache": first, "caches": () if plain else tuple(given)}


def config_of(words: Sequence[str]) -> TrainConfig:
    """Return the config of ``dspark-train`` for the command line ``words``, including recipes.
    Reads the store's manifest and writes nothing.
    """
    return configured(main.make_context("dspark-train", list(words)))


def closing(config: TrainConfig, result: dict[str, Any]) -> list[str]:
    """Return what the command prints at the end: the result, where the log is, and what to do
    next.
    """
    tau = result.get("mean_accepted_length")
    judged = "held out" if result.get("validation") else "training rows"
    out, model = config.output, _target(Path(config.output))
    split = "validation" if result.get("validation") else "train"
    return [
        f"speculator type {config.speculator_type}: {drafter(config.speculator_type).servers}",
        f"done: {out}" + (f"  accepted length (tau) {tau:.3f} ({judged})" if tau else ""),
        f"log: {out}/train.log   metrics: {out}/metrics.jsonl   settings: {out}/train.yaml",
        "next:",
        f"  dspark-tools score --cache {config.cache} --draft {out} --split {split}",
        f"  dspark-tools check {out} --model {model}",
        f"  dspark-tools eval --model {model} --draft {out} --data PROMPTS.jsonl",
        f"  dspark-tools report {config.cache} {out} -o report.html",
    ]


def _target(draft: Path) -> str:
    """Return the target that ``draft`` was trained for, as a command line takes it."""
    from dspark.train.run.folder import STORE, read_record

    return shlex.quote(str(read_record(draft / STORE)["target"]))


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _quiet(*unused: object) -> None:
    """Suppress the progress and messages of the other processes."""
