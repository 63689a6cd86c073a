"""``dspark-tools``: the table of its commands. Each lives with its code and is imported when it is
run.
"""

from __future__ import annotations

import click

from dspark.cache.shared.command import SETTINGS, LazyGroup, version_flag

# Name -> module below dspark.tools, callback, summary for `--help` (a test compares it with the
# command's own).
VERBS = {
    "info": ("stores.info", "info_command", "What a store is: target, layers, tokens, sizes."),
    "stats": ("stores.stats", "stats_command", "Rms, extremes and SNR per layer; lengths."),
    "verify": ("stores.verify", "verify_command", "Check every checksum and every count."),
    "show": ("stores.show", "show_command", "Print a sample as text, its supervised part marked."),
    "data": (
        "stores.data",
        "data_command",
        "What of a file of chats would be supervised, and why not.",
    ),
    "estimate": (
        "stores.estimate",
        "estimate_command",
        "Bytes, files and time of a dump before it is run.",
    ),
    "score": ("judge.score", "score_command", "Teacher-forced metrics of a draft on a store."),
    "recode": ("stores.recode", "recode_command", "Write a store again with another codec."),
    "merge": ("stores.merge", "merge_command", "Join stores of one plan into a new one."),
    "append": (
        "stores.merge",
        "append_command",
        "Add a second corpus to a store of the same plan.",
    ),
    "subset": ("stores.merge", "subset_command", "Write the samples that conditions choose."),
    "import": (
        "importers.command",
        "import_command",
        "Convert a DeepSpec or speculators cache to a store.",
    ),
    "compare": (
        "stores.compare",
        "compare_command",
        "What one store's code loses against another's.",
    ),
    "eval": (
        "judge.eval",
        "eval_command",
        "Decode prompts with a draft: lengths, speed, losslessness.",
    ),
    "check": (
        "check.command",
        "check_command",
        "Find what can be wrong with a draft before it is served.",
    ),
    "calibrate": (
        "judge.calibrate",
        "calibrate_command",
        "Calibrate confidences; recommend a threshold.",
    ),
    "report": (
        "report.command",
        "report_command",
        "Draw stores, runs and evaluations on one page.",
    ),
    "watch": ("report.watch", "watch_command", "Live view of a dump or a training."),
    "export": (
        "publish.export",
        "export_command",
        "Write a draft as it is published, with a model card.",
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
