"""``dspark-tools``: the table of its commands. Each command lives with its code and is imported
only when it runs.
"""

from __future__ import annotations

import click

from dspark.cache.shared.command import SETTINGS, LazyGroup, version_flag

# Name -> module below dspark.tools, callback, summary for `--help` (a test compares it with the
# command's own).
VERBS = {
    "info": ("stores.info", "info_command", "Describe a store: target, layers, tokens, sizes."),
    "stats": (
        "stores.stats",
        "stats_command",
        "Show rms, extremes and SNR per layer, and lengths.",
    ),
    "verify": ("stores.verify", "verify_command", "Check every checksum and every count."),
    "show": (
        "stores.show",
        "show_command",
        "Print a sample as text with its supervised part marked.",
    ),
    "data": (
        "stores.data",
        "data_command",
        "Show which parts of a chat file would be supervised, and why others would not.",
    ),
    "estimate": (
        "stores.estimate",
        "estimate_command",
        "Estimate bytes, files and hours of a dump before running it.",
    ),
    "score": (
        "judge.score",
        "score_command",
        "Compute teacher-forced metrics of a draft on a store.",
    ),
    "recode": ("stores.recode", "recode_command", "Rewrite a store with another codec."),
    "merge": ("stores.merge", "merge_command", "Join stores with the same plan into a new one."),
    "append": (
        "stores.merge",
        "append_command",
        "Add a second corpus to a store with the same plan.",
    ),
    "subset": (
        "stores.merge",
        "subset_command",
        "Copy the samples that meet conditions to a new store.",
    ),
    "import": (
        "importers.command",
        "import_command",
        "Convert a DeepSpec or speculators cache to a store.",
    ),
    "compare": (
        "stores.compare",
        "compare_command",
        "Show what one store's codec loses against another's.",
    ),
    "eval": (
        "judge.eval",
        "eval_command",
        "Decode prompts with a draft: accepted lengths, speed, losslessness.",
    ),
    "check": (
        "check.command",
        "check_command",
        "Find problems in a draft before serving it.",
    ),
    "calibrate": (
        "judge.calibrate",
        "calibrate_command",
        "Calibrate a draft's confidence; recommend a threshold.",
    ),
    "report": (
        "report.command",
        "report_command",
        "Plot stores, runs and evaluations on one page.",
    ),
    "watch": ("report.watch", "watch_command", "Watch a dump or a training live."),
    "export": (
        "publish.export",
        "export_command",
        "Write a draft for publication, with a model card.",
    ),
}


@click.group(
    cls=LazyGroup,
    context_settings=SETTINGS,
    table={
        name: (f"dspark.tools.{module}", call, text) for name, (module, call, text) in VERBS.items()
    },
    epilog="""\b
Examples:
  dspark-tools info ./hs.zarr
  dspark-tools score --cache ./hs.zarr --draft ./draft --split validation
  dspark-tools COMMAND -h
""",
)
@version_flag
def main() -> None:
    """Inspect, verify, plan, score and evaluate stores of hidden states and the drafts trained from
    them.
    """
