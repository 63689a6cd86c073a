"""``dspark-dump``: parse the flags and run one dump. Nothing heavy is imported before the flags are
parsed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from dspark.cache.files.urls import STORE
from dspark.cache.shared.command import (
    break_lock_flag,
    codec_options,
    command,
    emit,
    json_flag,
    version_flag,
)
from dspark.cache.shared.layer_ids import LayerIds
from dspark.cache.target.taps import READERS
from dspark.dump.config import (
    DEFAULT_SEQ_LENGTH,
    TURNS,
    DumpConfig,
)
from dspark.dump.engines.registry import ENGINES

EPILOG = """\b
Examples:
  dspark-dump --model zai-org/GLM-5.2-FP8
  dspark-dump --model ./smollm2 --data chats.jsonl.gz --output ./hs.zarr --limit 500
  dspark-dump --model Qwen/Qwen3-4B --data chats.jsonl --layers 1,9,17,25,33 --dry-run
  dspark-dump --model Qwen/Qwen3-4B --data chats.jsonl --for eagle3,dspark
  dspark-dump --model ./smollm2 --data chats.jsonl.gz --data more.parquet=0.3 --resume
  dspark-dump --model ./smollm2 --data chats.jsonl.gz --shard $SLURM_ARRAY_TASK_ID/8
  dspark-dump --model Qwen/Qwen3-4B --data prompts.jsonl --regenerate --no-thinking

\b
A row of --data is {"messages": [...]} or {"input_ids": [...], "loss_mask": [...]};
{"finished": false} marks a last answer that was cut short. Exit code: 0 done, 1 failed, 2 wrong
usage."""


class DrafterTypes(click.ParamType):  # type: ignore[type-arg]  # no generic before click 8.4
    """Comma-separated names of drafter types."""

    name = "TYPES"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        kinds = (
            value if isinstance(value, tuple) else tuple(w for w in re.split(r"[,\s]+", value) if w)
        )
        unknown = [kind for kind in kinds if kind not in READERS]
        if unknown or not kinds:
            self.fail(
                f"{', '.join(unknown) or 'empty'}: expected some of {', '.join(READERS)}",
                param,
                ctx,
            )
        return tuple(dict.fromkeys(kinds))


@command(epilog=EPILOG)
@click.option(
    "--model",
    required=True,
    metavar="ID_OR_DIR",
    help="The target: a model id, or a folder with config.json.",
)
@click.option(
    "--data",
    multiple=True,
    metavar="FILE|DATASET",
    help="JSONL, JSON, parquet or arrow (also .gz, .zst), a folder or glob, a data set id "
    "org/name[/config][:split], - for stdin; "
    "FILE=0.3 takes a share of its rows. May be repeated: each is a source of its own.  "
    "[default: the preset's]",
)
@click.option(
    "--output",
    type=STORE,
    default=Path("hs.zarr"),
    help="The store to write: a folder, or s3://, gs:// or az:// and BUCKET/NAME.",
)
@click.option(
    "--engine",
    type=click.Choice(["auto", *ENGINES]),
    default="auto",
    help="auto: vllm if there is a GPU and it is installed, else transformers.",
)
@click.option(
    "--layers",
    type=LayerIds(),
    help="Output of decoder layer i, 0-based: 7,22,38.  [default: the preset's, or five spread "
    "evenly]",
)
@click.option(
    "--target-layer-ids",
    type=LayerIds(),
    help='vLLM convention, state entering layer j = i + 1: "8 23 39".',
)
@click.option(
    "--for",
    "for_",
    type=DrafterTypes(),
    help="Drafter types to store layers for, such as eagle3,dspark. With --layers, checks "
    f"that these are enough. Types: {', '.join(READERS)}.",
)
@click.option(
    "--seq-length",
    type=int,
    help=f"Cut rows to this many tokens.  [default: the preset's, or {DEFAULT_SEQ_LENGTH}]",
)
@codec_options
@click.option(
    "--calibration",
    type=STORE,
    metavar="STORE",
    help="Take the codec's calibration from another store of the same target, layers and codec, "
    "or from its calibration.safetensors.  [default: computed from --data]",
)
@click.option("--limit", type=int, help="Read only the first N rows of each --data.")
@click.option("--resume", is_flag=True, help="Continue the store at --output.")
@click.option(
    "--shard",
    metavar="I/N",
    help="Write every N-th part only; I runs from 0 to N - 1. The N dumps share one --output, "
    "or each has its own and dspark-tools merge joins them. Continues an existing store.",
)
@click.option(
    "--ray",
    type=int,
    metavar="N",
    help="Run N shards on the Ray cluster at RAY_ADDRESS, or on this machine. Each gets "
    "--tensor-parallel-size GPUs, or one.",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace the store at --output, and the target's answers beside it.",
)
@click.option(
    "--assistant-pattern",
    metavar="REGEX",
    help="Regular expression for the rendered chat; its group 1 is supervised.  [default: the "
    "preset's, or the template]",
)
@click.option(
    "--turns",
    type=click.Choice(TURNS),
    default="auto",
    help="How a chat becomes samples. auto: turns share a sample as long as later turns only "
    "append to the rendered text; each: one per answer; last: only the last answer's; "
    "whole: one per chat, or the row is dropped.",
)
@click.option(
    "--template-kwargs",
    metavar="JSON",
    help="Passed to the chat template, such as '{\"enable_thinking\": false}'.",
)
@click.option(
    "--min-supervised",
    type=int,
    default=2,
    help="Rows with fewer supervised tokens are dropped and counted.",
)
@click.option(
    "--max-dropped",
    type=float,
    default=0.5,
    help="Fail when more than this share of the rows is dropped.",
)
@click.option(
    "--mask-token-id",
    type=int,
    help="Mask-token id: what the draft embeds at the positions it predicts.  [default: the "
    "preset's, or an unused id]",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    help="auto: cuda where there is a GPU.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float32", "float16"]),
    default="auto",
    help="auto: bfloat16 on cuda, float32 on cpu.",
)
@click.option(
    "--batch-tokens",
    type=int,
    help="Tokens per forward pass.  [default: 16384 to 65536 on cuda, depending on hidden "
    "size; 2048 on cpu; with vllm, vLLM's default, on cuda up to 65536 for small targets]",
)
@click.option(
    "--part-tokens",
    type=int,
    help="Tokens per part, the unit of writing and resuming.  [default: 32768 on cpu; on "
    "cuda, as many as make 512 MB of states]",
)
@click.option(
    "--workers",
    type=int,
    help="Processes that tokenise; the same number write.  [default: a quarter of the cores "
    "on cuda, 0 on cpu]",
)
@click.option(
    "--regenerate",
    is_flag=True,
    help="Use only the prompts: the target answers them turn by turn, and the states of that "
    "run are stored.",
)
@click.option(
    "--temperature",
    type=float,
    help="With --regenerate.  [default: the target's generation_config]",
)
@click.option(
    "--top-p", type=float, help="With --regenerate.  [default: the target's generation_config]"
)
@click.option(
    "--max-tokens", type=int, help="With --regenerate: maximum tokens per answer.  [default: 2048]"
)
@click.option(
    "--answers",
    type=int,
    metavar="N",
    help=(
        "With --regenerate: answers per prompt; each continues its own conversation.  [default: 1]"
    ),
)
@click.option(
    "--thinking/--no-thinking",
    default=None,
    help="With --regenerate: enable_thinking of the chat template.  [default: the template's]",
)
@click.option(
    "--tensor-parallel-size",
    type=int,
    metavar="N",
    help="With vllm: GPUs per copy of the target.  [default: the fewest that hold its weights]",
)
@click.option(
    "--data-parallel-size",
    type=int,
    metavar="N",
    help="With vllm: engines that share the rows, each on its own GPUs.  [default: as many as fit]",
)
@click.option(
    "--engine-arg",
    multiple=True,
    metavar="KEY=VALUE",
    help="With vllm: an argument of vllm.LLM, such as pipeline_parallel_size=2 or "
    "enable_expert_parallel=true. May be repeated.",
)
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run the Python code in the target's repository; read it first.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print the plan, and what each step from target to served draft needs, then stop; no "
    "weights are read. Exit code 1 if a step cannot work.",
)
@click.option(
    "--measure",
    is_flag=True,
    help="Print the plan with time and size measured, and stop: the target is read, calibrated "
    "on and timed on some rows, into a store that is removed again.",
)
@break_lock_flag
@json_flag
@version_flag
def main(as_json: bool, **flags: Any) -> None:
    """Run a target over a corpus and keep its hidden states in a store that drafts are trained
    from.
    """
    out = execute(DumpConfig(**flags))
    if as_json:
        emit(out)


def execute(config: DumpConfig) -> dict[str, Any]:
    """Plan or dump; returns what ``--json`` prints."""
    from dspark.dump.job import plan_only
    from dspark.dump.progress import Display
    from dspark.dump.target.chain import BrokenChain, table

    show = Display()
    if config.dry_run:
        try:
            plan = plan_only(config)
        except BrokenChain as broken:
            for line in table(broken.links):
                show.say(line)
            raise
        for line in [*table(plan.chain), "", *plan.lines()]:
            show.say(line)
        return plan.to_json()
    if config.measure:
        from dspark.dump.measure import measure

        plan = measure(config, show)
        for line in plan.lines():
            show.say(line)
        return plan.to_json()
    if config.ray is not None:
        from dspark.dump.actors import dump
    else:
        from dspark.dump.run import dump

    return dump(config, show)
