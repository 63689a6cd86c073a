"""``dspark-tools check DRAFT --model TARGET``: its flags and what it prints. ``stages`` checks."""

from __future__ import annotations

from typing import Any

import click

from dspark.cache.shared.command import command, emit, printable
from dspark.tools.check.stages import CheckConfig, check
from dspark.tools.flags import COUNT, DEVICE


@command(
    "check",
    epilog="""\b
Examples:
  dspark-tools check ./draft --model Qwen/Qwen3-4B
  dspark-tools check ./draft --model ./target --no-decode       files only, no weights of the target
  dspark-tools check ./draft --model ./target --serve --json    and block by block against real vLLM

Exit code 1 if anything is wrong or looks like a known mistake.
""",
)
@click.argument("draft")
@click.option("--model", required=True, help="Target: a model id or a folder.")
@click.option(
    "--num-speculative-tokens",
    type=COUNT,
    help="The num_speculative_tokens you plan to serve with.  [default: the block size]",
)
@click.option("--data", help="Prompts: JSONL or a named set.  [default: a few built-in questions]")
@click.option("--limit", default=6, type=COUNT, help="How many prompts the target answers.")
@click.option("--max-tokens", default=64, type=COUNT, help="Maximum new tokens per answer.")
@click.option(
    "--decode/--no-decode",
    default=True,
    help="Judge the draft's behaviour on the target's own answers (loads the target).",
)
@click.option(
    "--serve/--no-serve",
    default=None,
    help="Compare drafted blocks with real vLLM.  [default: if vLLM can run here]",
)
@click.option("--device", default="auto", type=DEVICE, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--dtype", default="auto", type=click.Choice(["auto", "float32", "bfloat16", "float16"])
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def check_command(as_json: bool, **flags: Any) -> None:
    """Find what can be wrong with DRAFT before it is served: files, layouts, ids, norms,
    vocabulary, behaviour, real blocks.
    """
    from rich.console import Console

    with Console(stderr=True).status("reading") as status:
        result = check(CheckConfig(**flags), note=status.update)
    if as_json:
        emit(result)
    else:
        show(result)
    click.get_current_context().exit(0 if result["ok"] else 1)


def show(result: dict[str, Any]) -> None:
    """Print the findings, worst first, and the verdict."""
    for level in ("error", "suspicion", "note"):
        for finding in result["findings"]:
            if finding["level"] == level:
                print(f"{level:<9}  {finding['name']:<12}  {printable(finding['text'])}")
    vllm = result["vllm"]
    needed = (
        f"needs {vllm['at_least']} or later ({vllm['because']}); " if "at_least" in vllm else ""
    )
    compared, served = (
        ", ".join(vllm[key]) for key in ("compared_token_for_token", "served_losslessly")
    )
    print(
        f"vLLM: {needed}compared token for token on {compared}, served losslessly by {served}; "
        f"installed here: {vllm['installed'] or 'none'}"
    )
    gain = result["gain"]
    verdict = (
        "no problem found in the stages that ran"
        if result["ok"]
        else "DO NOT SERVE this draft as it is"
    )
    if result["ok"] and gain and gain["theoretical_gain"] <= 1:
        verdict += f", but it would not be faster ({gain['theoretical_gain']:.2f}x at best)"
    print(f"{verdict}: {printable(result['draft'])}")
