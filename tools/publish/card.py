"""The model card (README.md) of an exported draft, generated from what the run left in its folder.
Missing files are omitted, not guessed. Sources: training.json (recipe), history.json (what it
started from, its sessions), store.json (target and data), metrics.jsonl (validations),
calibration.json, and reports of ``eval --output``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark.tools import records
from dspark.tools.check.servers import vllm_at_least
from dspark.train.draft.config import DraftConfig

RECIPE = (
    "num_layers",
    "block_size",
    "markov_rank",
    "markov_head_type",
    "draft_vocab_size",
    "loss_fn",
    "confidence_head_alpha",
    "optimizer",
    "lr",
    "epochs",
    "max_steps",
    "rows_per_step",
    "total_seq_len",
    "max_anchors",
    "val_fraction",
    "seed",
)


@dataclass(frozen=True, slots=True)
class DraftRun:
    """The contents of a draft folder beside the weights; ``validations`` are the held-out rows of
    metrics.jsonl, in order.
    """

    config: DraftConfig
    training: dict[str, Any]
    store: dict[str, Any]
    metrics: list[dict[str, Any]]
    calibration: dict[str, Any]
    history: dict[str, Any]

    @property
    def validations(self) -> list[dict[str, Any]]:
        return [r for r in self.metrics if r.get("validation") and r.get("mean_accepted_length")]

    @classmethod
    def read(cls, folder: Path, config: DraftConfig) -> DraftRun:
        return cls(
            config,
            records.training(folder),
            records.store(folder),
            records.metrics(folder),
            records.calibration(folder),
            records.history(folder),
        )


def pictures(run: DraftRun, folder: Path, reports: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Draw the available pictures; returns title -> file name beside the card."""
    from dspark.cache.shared.command import warn
    from dspark.tools.judge import plots

    if not plots.can_draw():
        warn(f"no pictures on the card: {plots.NEEDED}")
        return {}
    out = {}
    curves = {"held out, expected": run.validations[-1]["accept_rate"]} if run.validations else {}
    curves |= {
        f"{r['engine']}, accepted up to here": r["accept_rate"]
        for r in reports
        if r.get("accept_rate")
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
    run: DraftRun,
    manifest: dict[str, Any],
    reports: Sequence[dict[str, Any]],
    images: dict[str, str],
    name: str,
    serving: str | None = None,
) -> str:
    """Return README.md. ``reports``: from ``dspark-tools eval --output``; ``name``: the draft's
    name in commands; ``serving``: what is known about servers for the target's family.
    """
    from dspark.tools.judge.eval_report import markdown

    target, config = manifest["target"], run.config
    parts = [
        "---\n"
        + f"base_model: {json.dumps(target)}\n"
        + "library_name: vllm\ntags: [speculative-decoding, dspark]\n---\n",
        f"# {config.speculator_type} draft for {target}\n",
        f"A speculative-decoding draft: it proposes {config.block_size} tokens at a time and the "
        "target verifies them, so the output stays the "
        "target's own and only the speed changes.\n",
        "## Serve\n"
        + _serving(config, manifest, name)
        + (
            f"\nServers for this target's family (docs/targets.md explains the terms): {serving}.\n"
            if serving
            else ""
        ),
        "## Draft\n" + _table(("", ""), _shape(config, manifest)),
    ]
    if run.store:
        parts.append("## Data\n" + _table(("", ""), _data(run.store)))
    if run.training:
        recipe = [(k, run.training[k]) for k in RECIPE if run.training.get(k) is not None]
        parts.append("## Recipe\n" + _table(("", ""), recipe))
    if run.history:
        from dspark.train.run.history import sentences

        parts.append("## History\n" + "".join(f"- {s}\n" for s in sentences(run.history)))
    if run.validations:
        parts.append(
            "## Held-out metrics\nTeacher-forced, on prompts kept out of training; accept rate "
            "is the probability that a position is accepted "
            "if all before it were.\n\n" + _metrics(run.validations)
        )
    for report in reports:
        parts.append(f"## Decoding ({report['engine']})\n" + markdown(report))
    if run.calibration:
        from dspark.tools.judge.calibrate import table

        parts.append(
            "## Confidence\nSurvival by position on held-out data; temperatures fitted on other "
            "samples.\n\n" + table(run.calibration) + "\n"
        )
    parts += [f"![{title}]({file})\n" for title, file in images.items()]
    if run.training:
        parts.append("## Reproduce\n" + _code(reproduce(run, target)))
    return "\n".join(parts)


def _data(store: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return rows about the store; for several, what they have in common and then each one."""
    rows = [(k, v) for k, v in store.items() if v is not None and k != "stores"]
    for number, one in enumerate(store.get("stores") or [], 1):
        rows += [
            (f"{k} of store {number}", v)
            for k, v in one.items()
            if v is not None and store.get(k) != v
        ]
    return rows


def _serving(config: Any, manifest: dict[str, Any], name: str) -> str:
    from dspark.train.draft.types import drafter

    kind = drafter(config.speculator_type)
    if kind.method is None:
        return f"Servers for drafts of type {kind.name}: {kind.servers}.\n"
    return _code(
        serve_command(manifest["target"], name, config.block_size, kind.serving(config))
    ) + _servable(config, manifest["format"])


def serve_command(target: str, draft: str, size: int, own: dict[str, Any] | None = None) -> str:
    """Return the serve command. ``own``: what vLLM must know about the draft's type
    (``DrafterType.serving``); None for dspark.
    """
    settings = {
        **(own or {"method": "dspark"}),
        "model": draft,
        "num_speculative_tokens": size,
        "draft_sample_method": "probabilistic",
    }
    return f"vllm serve {target} --speculative-config '{json.dumps(settings)}'"


def reproduce(run: DraftRun, target: str) -> str:
    """Return the three commands, with every setting of the run that differs from the default."""
    from dspark.train.config import TrainConfig, with_passes

    defaults = TrainConfig(cache="").to_json()
    where = (
        "cache",
        "caches",
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
        f"--{k.replace('_', '-')} {_word(v)}"
        for k, v in run.training.items()
        if k in defaults and k not in where and v is not None and v != defaults[k]
    ]
    layers = run.store.get("layers") or list(run.config.target_layer_ids)
    each = run.store.get("stores") or [run.store]
    names = ["./hs.zarr", *(f"./hs{i}.zarr" for i in range(2, len(each) + 1))]
    counts = [with_passes(given)[1] for given in run.training.get("caches") or []]
    caches = [f"--cache {name}" for name in names]
    if len(counts) == len(names):
        caches = [
            f"{cache}={n:g}" if n != 1 else cache for cache, n in zip(caches, counts, strict=True)
        ]
    return "\n".join((
        *(_dumped(store, target, layers, name) for store, name in zip(each, names, strict=True)),
        f"dspark-train {' '.join([*caches, *flags])}",
        "dspark-tools score --cache ./hs.zarr --draft ./draft --split validation",
    ))  # fmt: skip


def _dumped(store: dict[str, Any], target: str, layers: list[int], name: str) -> str:
    bits = (
        f" --aux-bits {store['aux_bits']} --last-bits {store['last_bits']}"
        if None not in (store.get("aux_bits"), store.get("last_bits"))
        else ""
    )
    data = f" --data {store['source']}" if store.get("source") else ""
    return (
        f"dspark-dump --model {target}{data} --layers {','.join(map(str, layers))}{bits} "
        f"--output {name}"
    )


def _word(value: Any) -> str:
    """Format a setting as its flag takes it."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"'{value}'" if isinstance(value, str) else json.dumps(value)


def _servable(config: DraftConfig, form: str) -> str:
    from dspark.train.draft.types import drafter

    kind = drafter(config.speculator_type)
    if config.servable_by_vllm and kind.method != "dspark":
        return f"\n{kind.servers}. vLLM 0.32 was compared with our decoder, block by block.\n"
    if config.servable_by_vllm:
        first, why = vllm_at_least(config, form)
        return f"\nvLLM {first} or later: {why}.\n"
    return (
        f"\nNot vLLM: it has no {config.markov_head_type} Markov head. SGLang loads it unchanged "
        "(`--speculative-algorithm DSPARK`), and `dspark-tools eval --engine "
        "transformers` decodes with it.\n"
    )


def _shape(config: DraftConfig, manifest: dict[str, Any]) -> list[tuple[str, Any]]:
    window = f"{', '.join(config.layer_types)}; window of {config.sliding_window} tokens"
    return [
        ("attention", window if config.sliding_window else "full"),
        (
            "RoPE",
            json.dumps(
                {"rope_type": "default"}
                | dict(config.rope_scaling or {})
                | {"rope_theta": config.rope_theta}
            ),
        ),
        ("format", manifest["format"]),
        (
            "tensors",
            f"{manifest['tensors']}, {manifest['parameters']:,} parameters, {manifest['dtype']}, "
            f"{manifest['bytes']:,} bytes",
        ),
        (
            "layers",
            f"{config.num_layers}, hidden {config.hidden_size}, {config.num_heads} heads of "
            f"{config.head_dim}, {config.num_kv_heads} for keys",
        ),
        (
            "target layers",
            f"{list(config.target_layer_ids)} (outputs, 0-based; entering layers "
            f"{[i + 1 for i in config.target_layer_ids]})",
        ),
        ("vocabulary", f"{config.draft_vocab_size:,} of {config.vocab_size:,}"),
        ("mask token", config.mask_token_id),
        (
            "Markov head",
            f"{config.markov_head_type}, rank {config.markov_rank}"
            if config.markov_rank
            else "none",
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
    return "".join(
        "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |\n" for cells in lines
    )


def _code(text: str) -> str:
    return f"```bash\n{text}\n```\n"
