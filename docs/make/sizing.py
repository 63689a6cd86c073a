"""Write the tables of docs/sizing.md with ``dspark-tools estimate``: ``python
docs/make/sizing.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from dspark.dump.plan import human
from dspark.tools.cli import main

PAGE = Path(__file__).parents[1] / "sizing.md"
BEGIN, END = "<!-- begin: docs/make/sizing.py -->", "<!-- end: docs/make/sizing.py -->"
CODECS = ("lossless", "default", "small", "smallest")
MODELS = (
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "Qwen/Qwen3-4B",
    "Qwen/Qwen3-8B",
    "Qwen/Qwen3-14B",
    "google/gemma-4-12B-it",
    "zai-org/GLM-4.7-Flash",
    "zai-org/GLM-5.2-FP8",
)
SAMPLES = (5_000, 50_000, 500_000)
MEAN_TOKENS = 1000


def estimate(model: str, samples: int, codec: str) -> dict[str, float]:
    """What ``dspark-tools estimate --json`` says; no network, no weights."""
    arguments = (
        f"--model {model} --samples {samples} --mean-tokens {MEAN_TOKENS} --codec {codec} --json"
    )
    result = CliRunner().invoke(main, ["estimate", *arguments.split()])
    assert result.exit_code == 0, result.output
    found: dict[str, float] = json.loads(result.stdout)
    return found


def tables() -> str:
    """Bytes per token by target and codec, then bytes of whole corpora."""
    out = [f"| target | raw bf16 | {' | '.join(CODECS)} |", "|---|---|" + "---|" * len(CODECS)]
    for model in MODELS:
        found = [estimate(model, SAMPLES[-1], codec) for codec in CODECS]
        raw = found[0]["raw_bytes"] / found[0]["tokens"]
        cells = [f"{each['bytes'] / each['tokens']:,.0f}" for each in found]
        out.append(f"| {model} | {raw:,.0f} | {' | '.join(cells)} |")
    out = ["Bytes per token:", "", *out, "", f"A corpus of {MEAN_TOKENS:,} tokens per sample:", ""]
    out += [
        "| target | samples | raw bf16 | default | smallest | files |",
        "|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for samples in SAMPLES:
            default, smallest = (
                estimate(model, samples, codec) for codec in ("default", "smallest")
            )
            sizes = (default["raw_bytes"], default["bytes"], smallest["bytes"])
            cells = " | ".join(human(int(size)) for size in sizes)
            out.append(f"| {model} | {samples:,} | {cells} | {int(default['files']):,} |")
    return "\n".join(out)


def page(text: str) -> str:
    """Return ``text`` with what stands between the marks replaced by the tables of today."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{tables()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
