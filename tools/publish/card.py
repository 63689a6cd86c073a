"""The model card (README.md) of an exported draft, generated from what the run left in its folder. Missing files are left out, not guessed.

Read: training.json (recipe), store.json (target and data), metrics.jsonl (validations), calibration.json, and reports of ``eval --output``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark.tools import records
from dspark.tools.check.files import vllm_at_least
from dspark.train.draft.config import DraftConfig

RECIPE = ("num_layers", "block_size", "markov_rank", "markov_head_type", "draft_vocab_size", "loss_fn", "confidence_head_alpha",
          "optimizer", "lr", "epochs", "max_steps", "rows_per_step", "total_seq_len", "max_anchors", "val_fraction", "seed")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Run:
    """What a draft folder holds beside the weights; ``validations`` are the held-out rows of metrics.jsonl, in order."""

    config: DraftConfig
    training: dict[str, Any]
    store: dict[str, Any]
    metrics: list[dict[str, Any]]
    calibration: dict[str, Any]

    @property
    def validations(self) -> list[dict[str, Any]]:
        return [r for r in self.metrics if r.get("validation") and r.get("mean_accepted_length")]

    @classmethod
    def read(cls, folder: Path, config: DraftConfig) -> Run:
        return cls(
            config,
            records.training(folder),
            records.store(folder),
            records.metrics(folder),
            records.calibration(folder),
        )


def pictures(run: Run, folder: Path, reports: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Draw what there is; title -> file name beside the card."""
    from dspark.cache.shared.command import warn
    from dspark.tools.judge import plots

    if not plots.can_draw():
        warn(f"no pictures on the card: {plots.NEEDED}")
        return {}
    out = {}
    curves = {"held out, expected": run.validations[-1]["accept_rate"]} if run.validations else {}
    curves |= {
        f"{r['engine']}, accepted up to here": r["accept_rate"] for r in reports if r.get("accept_rate")
    }
    if curves:
        plots.accept_rates(curves, folder / "accept_rate.svg")
        out["Accept rate by position"] = "accept_rate.svg"
    if len(run.validations) > 1:
        plots.training(run.metrics, folder / "training.svg")
        out["Mean accepted length over training"] = "training.svg"
    if run.calibration:
        plots.reliability(run.calibration, folder / "reliability.svg")
        out["Reliability of the confidence head"] = "reliability.svg"
    return out


def card(
    run: Run,
    manifest: dict[str, Any],
    reports: Sequence[dict[str, Any]],
    images: dict[str, str],
    name: str,
    serving: str | None = None,
) -> str:
    """README.md. ``reports``: of ``dspark-tools eval --output``; ``name``: what the draft is called in commands; ``serving``: what is known of servers
    for the target's family."""
    from dspark.tools.judge.eval_report import markdown

    target, config = manifest["target"], run.config
    parts = [
        "---\n"
        + f"base_model: {json.dumps(target)}\n"
        + "library_name: vllm\ntags: [speculative-decoding, dspark]\n---\n",
        f"# {config.speculator_type} draft for {target}\n",
        f"A speculative-decoding draft: it proposes {config.block_size} tokens at a time and the target verifies them, so the output stays the "
        "target's own and only the speed changes.\n",
        "## Serve\n"
        + _code(serve_command(target, name, config.block_size))
        + _servable(config, manifest["format"])
        + (
            f"\nServers for this target's family (docs/targets.md says what the words mean): {serving}.\n"
            if serving
            else ""
        ),
        "## Draft\n" + _table(("", ""), _shape(config, manifest)),
    ]
    if run.store:
        parts.append("## Data\n" + _table(("", ""), [(k, v) for k, v in run.store.items() if v is not None]))
    if run.training:
        recipe = [(k, run.training[k]) for k in RECIPE if run.training.get(k) is not None]
        parts.append("## Recipe\n" + _table(("", ""), recipe))
    if run.validations:
        parts.append("## Held-out metrics\nTeacher-forced, on prompts kept out of training; accept rate is the probability that a position is accepted "
                     "if all before it were.\n\n" + _metrics(run.validations))  # fmt: skip
    for report in reports:
        parts.append(f"## Decoding ({report['engine']})\n" + markdown(report))
    if run.calibration:
        from dspark.tools.judge.calibrate import table

        parts.append("## Confidence\nSurvival by position on held-out data; temperatures fitted on other samples.\n\n" + table(run.calibration) + "\n")  # fmt: skip
    parts += [f"![{title}]({file})\n" for title, file in images.items()]
    if run.training:
        parts.append("## Reproduce\n" + _code(reproduce(run, target)))
    return "\n".join(parts)


def serve_command(target: str, draft: str, size: int) -> str:
    settings = {
        "method": "dspark",
        "model": draft,
        "num_speculative_tokens": size,
        "draft_sample_method": "probabilistic",
    }
    return f"vllm serve {target} --speculative-config '{json.dumps(settings)}'"


def reproduce(run: Run, target: str) -> str:
    """The three commands, with every setting of the run that is not the default."""
    from dspark.train.config import TrainConfig

    defaults = TrainConfig(cache="").to_json()
    where = (
        "cache",
        "output",
        "device",
        "workers",
        "tensorboard",
        "compile",
        "log_every",
        "keep_checkpoints",
        "betas",
    )
    flags = [
        f"--{k.replace('_', '-')} {json.dumps(v) if not isinstance(v, str) else chr(39) + v + chr(39)}"
        for k, v in run.training.items()
        if k in defaults and k not in where and v is not None and v != defaults[k]
    ]
    layers = run.store.get("layers") or list(run.config.target_layer_ids)
    bits = (
        f" --aux-bits {run.store['aux_bits']} --last-bits {run.store['last_bits']}"
        if None not in (run.store.get("aux_bits"), run.store.get("last_bits"))
        else ""
    )
    data = f" --data {run.store['source']}" if run.store.get("source") else ""
    return "\n".join((
        f"dspark-dump --model {target}{data} --layers {','.join(map(str, layers))}{bits} --output ./hs.zarr",
        f"dspark-train --cache ./hs.zarr {' '.join(flags)}".rstrip(),
        "dspark-tools score --cache ./hs.zarr --draft ./draft --split validation",
    ))  # fmt: skip


def _servable(config: DraftConfig, form: str) -> str:
    if config.servable_by_vllm:
        first, why = vllm_at_least(config, form)
        return f"\nvLLM {first} or later: {why}.\n"
    return f"\nNot by vLLM: it has no {config.markov_head_type} Markov head. `dspark-tools eval --engine transformers` decodes with it.\n"


def _shape(config: DraftConfig, manifest: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        ("format", manifest["format"]),
        (
            "tensors",
            f"{manifest['tensors']}, {manifest['parameters']:,} parameters, {manifest['dtype']}, {manifest['bytes']:,} bytes",
        ),
        (
            "layers",
            f"{config.num_layers}, hidden {config.hidden_size}, {config.num_heads} heads of {config.head_dim}, {config.num_kv_heads} for keys",
        ),
        (
            "target layers",
            f"{list(config.target_layer_ids)} (outputs, 0-based; entering layers {[i + 1 for i in config.target_layer_ids]})",
        ),
        ("vocabulary", f"{config.draft_vocab_size:,} of {config.vocab_size:,}"),
        ("mask token", config.mask_token_id),
        (
            "Markov head",
            f"{config.markov_head_type}, rank {config.markov_rank}" if config.markov_rank else "none",
        ),
    ]


def _metrics(rows: Sequence[dict[str, Any]]) -> str:
    size = len(rows[-1]["accept_rate"])
    head = ("epoch", "step", "mean accepted length", *(f"accept {k + 1}" for k in range(size)))
    body = [
        (
            _short(r.get("epoch")),
            r["step"],
            f"{r['mean_accepted_length']:.3f}",
            *(f"{a:.3f}" for a in r["accept_rate"]),
        )
        for r in rows
    ]
    return _table(head, body)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |\n" for cells in lines)


def _code(text: str) -> str:
    return f"```bash\n{text}\n```\n"
