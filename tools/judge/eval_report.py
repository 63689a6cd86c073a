"""The report of ``dspark-tools eval``: totals, and one line per source as on public model cards, as
JSON, table and Markdown.

``theoretical_gain`` is the speed-up that the accepted length would give if a step cost what it
reads: decoding one sequence is bound by reading weights, so a block costs ``1 + draft / target``
target steps and yields ``mean_accepted_length`` tokens. Draft weights read per block: everything
trained but the rows of its Markov embedding, and its output matrix. Of the target: everything but
an untied embedding. A mixture of experts reads fewer of its weights than are counted, so there the
gain is an upper bound. For a head that runs beside a pipeline it is what ``tools/decode/gain.py``
computes, a share: 0.14 is 14 % more tokens per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from dspark.tools.decode.gain import pipeline_gains
from dspark.tools.decode.outcome import Outcome, rate, summarise
from dspark.tools.decode.prompts import Prompt

UNNAMED = "all"


def report(
    prompts: Sequence[Prompt],
    drafted: Sequence[Outcome],
    alone: Sequence[Outcome],
    *,
    greedy: bool,
    relative_cost: float | None,
) -> dict[str, Any]:
    """Return totals, also per source. ``alone``: the target by itself on the first ``len(alone)``
    prompts.

    ``lossless`` and the speeds compare those prompts only; null if there are none; ``lossless`` is
    also null with a temperature, when only distributions could be compared.
    """
    rows = [
        (p, d, alone[i] if i < len(alone) else None)
        for i, (p, d) in enumerate(zip(prompts, drafted, strict=True))
    ]
    sources: dict[str, list[tuple[Prompt, Outcome, Outcome | None]]] = {}
    for row in rows:
        sources.setdefault(row[0].source or UNNAMED, []).append(row)
    return {
        **_line(rows, greedy, relative_cost),
        "relative_cost": relative_cost,
        "diverged": _diverged(rows) if greedy else [],
        "per_source": {
            name: _line(found, greedy, relative_cost) for name, found in sorted(sources.items())
        },
    }


def _line(
    rows: Sequence[tuple[Prompt, Outcome, Outcome | None]],
    greedy: bool,
    relative_cost: float | None,
) -> dict[str, Any]:
    out = summarise([d for _, d, _ in rows])
    both = [(d, a) for _, d, a in rows if a is not None]
    alone = rate([a for _, a in both]) if both else None
    length = out["mean_accepted_length"]
    return {
        **out,
        "compared": len(both),
        "lossless": not _diverged(rows) if both and greedy else None,
        "tokens_per_second_target": alone,
        "speedup": rate([d for d, _ in both]) / alone if alone else None,
        "theoretical_gain": None
        if length is None or relative_cost is None
        else length / (1 + relative_cost),
        **pipeline_gains([d for _, d, _ in rows]),
    }


def _diverged(rows: Sequence[tuple[Prompt, Outcome, Outcome | None]]) -> list[str]:
    return [p.where for p, d, a in rows if a is not None and a.tokens != d.tokens]


def relative_cost(model: str, draft: str) -> float | None:
    """Return the weights a drafted block reads, as a share of those a target step reads; None for a
    target that transformers cannot build without its code.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from dspark.train.draft.saved.folder import load_config, trained_shapes

    config = load_config(draft)
    read = sum(
        prod(shape)
        for name, shape in trained_shapes(config).items()
        if name != "markov_head.markov_w1.weight"
    )
    read += config.draft_vocab_size * config.hidden_size
    try:
        with torch.device("meta"):
            target = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    except (OSError, ValueError, KeyError, ImportError):
        return None
    embed, head = target.get_input_embeddings(), target.get_output_embeddings()
    every = sum(p.numel() for p in target.parameters())
    return float(read / (every if head.weight is embed.weight else every - embed.weight.numel()))


RATES = "accept rate by position"
HEADER = (
    "source",
    "prompts",
    "drafts",
    "accepted length",
    RATES,
    "tokens/s",
    "target alone",
    "speed-up",
    "theoretical",
    "lossless",
)
# The same columns in three tables that fit a terminal.
TABLES = (
    ("source", "prompts", "drafts", "accepted length", "lossless"),
    ("source", RATES),
    ("source", "tokens/s", "target alone", "speed-up", "theoretical"),
)


def lines(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the cells under ``HEADER``, one source per line, totals last."""
    sources = [*result["per_source"].items()]
    if len(sources) > 1 or sources[0][0] != UNNAMED:
        sources.append((UNNAMED, result))
    return [(name, *_cells(row)) for name, row in sources]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    error = row["mean_accepted_length_se"]
    gain = row["theoretical_gain"]
    if row.get("stages") and gain is not None:  # a share there, a factor here
        gain += 1
    length = _number(row["mean_accepted_length"], 3) + ("" if error is None else f" ± {error:.3f}")
    rates = " ".join(f"{x:.2f}" for x in row["accept_rate"] or []) or "-"
    lossless = {True: "yes", False: "NO", None: "-"}[row["lossless"]]
    return (
        str(row["prompts"]),
        str(row["drafts"]),
        length,
        rates,
        _number(row["tokens_per_second"], 1),
        _number(row["tokens_per_second_target"], 1),
        _number(row["speedup"], 2, "x"),
        _number(gain, 2, "x"),
        lossless,
    )


def _number(value: float | None, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def markdown(result: dict[str, Any]) -> str:
    """Format the table in Markdown, with a line on how it was measured."""
    body = [HEADER, ("---",) * len(HEADER), *lines(result)]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in body) + f"\n{how(result)}\n"


def how(result: dict[str, Any]) -> str:
    """Return one sentence: engine, dtype, temperature, limits; what the columns mean."""
    if result.get("stages"):
        return _how_piped(result)
    compared = result["compared"]
    alone = "the first prompt" if compared == 1 else f"the first {compared} prompts"
    decoding = "greedy" if result["temperature"] == 0 else f"temperature {result['temperature']}"
    return (
        f"{result['engine']}, {result['dtype']}, {decoding}, one prompt at a time, at most "
        f"{result['max_tokens']} new tokens, blocks of "
        f"{result['block_size']}; ± is the standard error over prompts; the target alone on "
        f"{alone}."
    )


def in_steps(result: dict[str, Any]) -> str:
    """The speed-up in passes of the target, which no machine changes; a prefill is one of them."""
    tokens, steps = result["tokens"], result["drafts"] + result["prompts"]
    line = (
        f"speed-up in target steps: {tokens / steps:.2f}x ({tokens:,} tokens in {steps:,} steps; "
        f"the target alone takes {tokens:,})"
    )
    if result["engine"] == "transformers" and result["speedup"] is not None:
        line += ". Tokens/s here are a plain decoder's; --engine vllm times a server's."
    return line


def _how_piped(result: dict[str, Any]) -> str:
    """Return the same for a pipeline, with its additional figures."""

    def said(name: str, digits: int = 4) -> str:
        return _number(result[name], digits)

    return (
        f"{result['engine']}, {result['dtype']}, temperature {result['temperature']}, one prompt "
        f"at a time, with an emulated pipeline of {result['stages']} stages: "
        f"{result['tokens']} tokens in {result['steps']} steps; acceptance_rate (tokens "
        f"per step) {said('acceptance_rate')}, equivalent accept length "
        f"{said('equivalent_accept_length')} ({said('equivalent_accept_length_drafted')} "
        f"without the prefill tokens); theoretical gain {said('theoretical_gain')} "
        f"(pooled {said('theoretical_gain_pooled')}); drafts accepted "
        f"{result['drafts_accepted']} of {result['drafts_judged']}. Tokens per second are "
        "those of the emulation, not of a pipeline."
    )
