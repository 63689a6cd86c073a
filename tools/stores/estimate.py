"""``dspark-tools estimate``: estimate bytes, files and hours of a dump before it runs. Reads a
config and, if given, the corpus; no weights.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dspark.cache.errors import MismatchError, UsageError
from dspark.cache.settings import DEFAULT_PACKING
from dspark.cache.shared.command import (
    codec_options,
    command,
    duration,
    emit,
    json_flag,
    table,
    warn,
)
from dspark.tools.flags import SHARE, Finite

if TYPE_CHECKING:
    from dspark.cache.sizing import RowBytes
    from dspark.dump.plan import Plan

# Metadata and a shard for each array of a part (compact codecs: one array more per field), and the
# part's own metadata.
FILES_A_PART = 2 * 8 + 1
FILES_A_STORE = 20  # root, target, index

MEASURED = (
    # tokens of --like; two halves of a SmolLM2 store, 15,000 tokens each, differ by 1.2 to 1.7 %
    32768
)


def estimate(
    model: str,
    *,
    data: str | None,
    samples: int | None,
    mean_tokens: float | None,
    codec: str | None = None,
    aux_bits: int | None = None,
    last_bits: int | None = None,
    last_share: float,
    tokens_per_second: float,
    pack: str = DEFAULT_PACKING,
    like: str | None = None,
    regenerate: bool = False,
    answers: int | None = None,
    max_tokens: int | None = None,
    generated_per_second: float | None = None,
    gpus: int = 8,
    trained_per_second: float = 80_000.0,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Estimate for ``samples`` x ``mean_tokens``, or for the rows of ``data``. ``last_share``:
    stored last states / tokens, if there is no corpus. ``pack``: exact if "none".

    ``like``: a store of the same target and layers (of a few hundred rows, at any bits) whose
    states are coded and compressed to measure a row's size; without it the formula is used, which
    ignores the text.

    ``regenerate``: the target writes the answers, ``generated_per_second`` tokens of them (None: a
    tenth of ``tokens_per_second``); of a corpus, ``answers`` a row, of half ``max_tokens`` each.

    ``gpus`` that train, each on ``trained_per_second`` tokens, read ``read_bits_per_second``; the
    dump writes ``written_bits_per_second``.
    """
    from dspark.cache.files.layout import raw_bytes_per_token
    from dspark.dump import plan as planning
    from dspark.dump.config import DumpConfig
    from dspark.dump.job import plan_target, prepare
    from dspark.dump.pace import ANSWER_SHARE, Pace

    counted = samples is not None and mean_tokens is not None
    if counted == (data is not None):
        raise UsageError("give --samples and --mean-tokens, or --data FILE")
    if not regenerate and generated_per_second is not None:
        raise UsageError("--generated-per-second is of --regenerate: give that too.")
    config = DumpConfig(
        model=model,
        data=data,
        output=Path("hs.zarr"),
        codec=codec,
        aux_bits=aux_bits,
        last_bits=last_bits,
        pack=pack,
        regenerate=regenerate,
        answers=answers,
        max_tokens=max_tokens,
        trust_remote_code=trust_remote_code,
    )
    if data is not None:
        plan = prepare(config).plan
    else:
        plan = plan_target(config, whole=False)  # sizes follow from a config alone
        assert samples is not None
        assert mean_tokens is not None
        tokens = round(samples * mean_tokens)
        plan = planning.settle_codec(dataclasses.replace(plan, tokens=tokens), config)
        rate = planning.disk_bytes(plan.shapes, plan.layers, plan.make_codec(), last_share)
    if plan.tokens is not None and plan.bytes is not None:
        samples, tokens, size = plan.rows, plan.tokens, plan.bytes
    else:
        size = round(tokens * rate) + planning.fixed_bytes(plan)
    if like is not None:
        stored = round(tokens * last_share) if plan.last_rows is None else plan.last_rows
        size = row_bytes(like, plan).store(tokens, stored) + planning.fixed_bytes(plan)
    written = plan.answer_tokens if data is not None else round(tokens * last_share)
    pace = Pace(
        tokens=tokens_per_second,
        answers=generated_per_second or tokens_per_second * ANSWER_SHARE["cuda"],
        why="--tokens-per-second",
    )
    seconds = pace.seconds(tokens, written if regenerate else 0, plan.calibration_tokens)
    assert seconds is not None
    raw = tokens * raw_bytes_per_token(len(plan.layers), plan.shapes.hidden_size)
    parts = -(-tokens // plan.part_tokens)
    bits = plan.make_codec().bits
    return {
        "model": model,
        "layers": list(plan.layers),
        "target_layer_ids": plan.target_layer_ids,
        "codec": plan.codec,
        "codec_why": plan.codec_why,
        "calibration_tokens": plan.calibration_tokens,
        "calibration_host_bytes": plan.calibration_bytes,
        "aux_bits": bits[0],
        "last_bits": bits[1],
        "pack": pack,
        "samples": samples,
        "tokens": tokens,
        "bytes": size,
        "raw_bytes": raw,
        "ratio": raw / size,
        "files": FILES_A_STORE + FILES_A_PART * parts,
        "written_bits_per_second": 8 * size / seconds,
        "gpus": gpus,
        "trained_per_second": trained_per_second,
        "read_bits_per_second": 8 * size / tokens * gpus * trained_per_second,
        "seconds": seconds,
        "hours": seconds / 3600,
        "tokens_per_second": tokens_per_second,
        "generated_tokens": written if regenerate else 0,
        "generated_per_second": pace.answers if regenerate else None,
        "free_bytes": plan.free_bytes,
        "measured_on": like,
        "chain": [dataclasses.asdict(link) for link in plan.chain],
        "draft": plan.draft,
        "weights": plan.weights,
    }


def row_bytes(like: str, plan: Plan) -> RowBytes:
    """Return the bytes of a row with the plan's codec, measured on states of the store ``like``."""
    import dspark.cache
    from dspark.cache.codec import registry
    from dspark.cache.quality import spread_states
    from dspark.cache.sizing import RowBytes

    store = dspark.cache.open(like)
    m = store.manifest
    if (m.target.hidden_size, m.layers) != (plan.shapes.hidden_size, list(plan.layers)):
        raise MismatchError(
            f"--like {like}: its states are {m.target.hidden_size} wide, from layers {m.layers}; "
            f"the plan's are {plan.shapes.hidden_size} wide, from layers "
            f"{list(plan.layers)}. Dump a few hundred rows with the plan's flags and give "
            "that store."
        )
    codec = plan.make_codec()
    registry.suited(codec.name, True, m.counts.tokens, len(m.layers), m.target.hidden_size)
    probe = spread_states(store, codec, MEASURED)
    return RowBytes.of(codec.calibrated(*probe), *probe.beginning(MEASURED))


def _generated(data: dict[str, Any]) -> str:
    if not data["generated_tokens"]:
        return ""
    return (
        f"; {data['generated_tokens']:,} tokens are generated, at "
        f"{data['generated_per_second']:,.0f} per second (--generated-per-second)"
    )


@command(
    "estimate",
    epilog="""\b
Examples:
  dspark-tools estimate --model zai-org/GLM-5.2-FP8 --samples 500000 --mean-tokens 2000
  dspark-tools estimate --model ./model --data chat.jsonl
""",
)
@click.option("--model", required=True, help="Model id or folder. A known model needs no network.")
@click.option(
    "--data", help="Corpus: its rows are counted, and a sample spread over them is tokenised."
)
@click.option(
    "--samples",
    type=click.IntRange(1, 10**12),
    help="Number of rows in the corpus, without --data.",
)
@click.option(
    "--mean-tokens",
    type=Finite(1, 10**9),
    help="Mean tokens per sample, prompt and answer together.",
)
@codec_options
@click.option(
    "--last-share",
    type=SHARE,
    default=0.6,
    help="Share of tokens that are supervised, without --data.",
)
@click.option(
    "--like",
    help="Store of a few hundred rows, of this target and layers, on which sizes are measured.",
)
@click.option(
    "--tokens-per-second",
    type=Finite(0.001, 10**12),
    default=20000.0,
    help="Prefill rate of your engine.",
)
@click.option(
    "--regenerate",
    is_flag=True,
    help="The target is to write the answers: those tokens are counted at its generation rate.",
)
@click.option(
    "--answers", type=click.IntRange(1, 10**6), help="With --regenerate and --data: per prompt."
)
@click.option(
    "--max-tokens",
    type=click.IntRange(2, 10**9),
    help="With --regenerate and --data: most tokens per answer; half of it is counted.",
)
@click.option(
    "--generated-per-second",
    type=Finite(0.001, 10**12),
    help="With --regenerate: generation rate of your engine.  [default: a tenth of the prefill "
    "rate, an assumption]",
)
@click.option(
    "--gpus",
    type=click.IntRange(1, 10**6),
    default=8,
    help="GPUs of a training, for the network that it needs.",
)
@click.option(
    "--trained-per-second",
    type=Finite(0.001, 10**12),
    default=80000.0,
    help="Tokens on which each GPU trains per second (an H100, a draft for Qwen3-4B: 80,000).",
)
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run Python code that the target's repository brings; read it first.",
)
@json_flag
def estimate_command(as_json: bool, **flags: Any) -> None:
    """Estimate the bytes, files and hours of a dump before you run it."""
    from dspark.dump.plan import human

    data = estimate(**flags)
    if data["free_bytes"] is not None and data["bytes"] > data["free_bytes"]:
        warn(
            f"{human(data['bytes'])} do not fit: {human(data['free_bytes'])} are free here. A "
            "dump would refuse; use fewer bits (--codec), fewer --layers or fewer rows."
        )
    for link in data["chain"]:
        if link["state"] == "missing":
            warn(f"a dump would refuse: {link['name']}: {link['text']}")
    if as_json:
        emit(data)
        return
    learns = ""
    if data["calibration_host_bytes"]:
        learns = (
            f", calibrated on {data['calibration_tokens']:,} tokens, whose states take "
            f"{human(data['calibration_host_bytes'])} of host memory"
        )
    table(
        [
            (
                "model",
                f"{data['model']}, layers {data['layers']} (vLLM's ids: "
                f"{data['target_layer_ids']})",
            ),
            ("tokens", f"{data['tokens']:,} in {data['samples']:,} samples"),
            (
                "codec",
                data["codec"] + (f" ({data['codec_why']})" if data["codec_why"] else "") + learns,
            ),
            (
                "bytes",
                f"{human(data['bytes'])}, {data['ratio']:.2f} x smaller than "
                f"{human(data['raw_bytes'])} of raw bf16 "
                + (f"(measured on {data['measured_on']})" if data["measured_on"] else "(formula)"),
            ),
            (
                "free here",
                human(data["free_bytes"]) if data["free_bytes"] is not None else "unknown",
            ),
            ("files", f"{data['files']:,}"),
            (
                "time",
                f"{duration(data['seconds'])} at {data['tokens_per_second']:,.0f} tokens "
                "per second (--tokens-per-second)" + _generated(data),
            ),
            (
                "network",
                f"{data['written_bits_per_second'] / 1e9:.3g} Gbit/s while it is dumped; "
                f"{data['gpus']} GPUs read {data['read_bits_per_second'] / 1e9:.3g} Gbit/s, at "
                f"{data['trained_per_second']:,.0f} tokens per second each (--trained-per-second)",
            ),
            (
                "local cache",
                f"DSPARK_CACHE_GB={-(-data['bytes'] // 10**9)} keeps a remote store's pieces on a "
                "node's disk for the next epochs; with less, each epoch reads them again",
            ),
            *((link["name"], f"{link['state']}: {link['text']}") for link in data["chain"]),
        ]
    )
