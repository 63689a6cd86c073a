"""``dspark-tools``: one command a verb. Heavy imports stay inside them, so that ``--help`` is instant."""

from __future__ import annotations

import sys
from typing import Any

import click

from dspark.cache.shared.command import SETTINGS, bar, codec_options, emit, guarded
from dspark.cache.shared.peers import Group
from dspark.tools.check.command import check_command
from dspark.tools.flags import COUNT, COUNT_OR_ALL, DEVICE, SHARE, TOKEN_ID, Finite, coding_device_is_here
from dspark.tools.judge.calibrate import calibrate_command
from dspark.tools.judge.eval import eval_command
from dspark.tools.publish.export import export_command

json_flag = click.option(
    "--json", "as_json", is_flag=True, help="One JSON object on stdout, all else on stderr."
)


@click.group(cls=Group, context_settings=SETTINGS)
def main() -> None:
    """Inspect, verify, plan, score and evaluate stores of hidden states and the drafts trained from them."""


def table(rows: list[tuple[str, str]]) -> None:
    """Two columns on stdout."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


@main.command("info")
@click.argument("cache")
@json_flag
@guarded
def info_command(cache: str, as_json: bool) -> None:
    """What CACHE is: target, layers, tokens, samples, bits, sizes, ratio, complete or not."""
    from dspark.tools.stores.info import info

    data = info(cache)
    if as_json:
        emit(data)
        return
    ratio = f"{data['ratio']:.2f} x smaller than" if data["ratio"] else "nothing stored yet, against"
    per_token = f"{data['bytes_per_token']:.0f}" if data["bytes_per_token"] else "-"
    table([
        ("store", f"{data['path']}  (format {data['format_version']}, {'complete' if data['complete'] else 'NOT COMPLETE: dspark-dump --resume'})"),
        ("target", f"{data['target']}  {data['num_layers']} layers, hidden {data['hidden_size']}, vocabulary {data['vocab_size']}"),
        ("aux layers", f"{data['layers']}  (output of layer i; vLLM's ids: {data['target_layer_ids']})"),
        ("samples", f"{data['samples']:,}  in {data['parts']:,} parts"),
        ("tokens", f"{data['tokens']:,}  supervised {data['supervised_tokens']:,}, last states {data['last_rows']:,}"),
        ("codec", f"{data['codec']}: aux {data['aux_bits']:g} bits per value, last state (after the final norm) {data['last_bits']:g}, packed by {data['pack']}"),
        ("bytes", f"{data['bytes_on_disk']:,} on disk, of which {data['frozen_bytes']:,} are the target's frozen weights and the index"),
        ("a token", f"{per_token} bytes; {ratio} the raw bf16 layout's {data['raw_bytes_per_token']}"),
        ("engine", f"{data['engine']} {data['engine_version']}, {data['dtype']}, sequences up to {data['seq_length']} tokens"),
        ("source", f"{data['source']}  {data['rows_read']:,} rows read, {data['truncated']:,} cut, dropped: {data['dropped'] or 'none'}"),
    ])  # fmt: skip


@main.command("stats")
@click.argument("cache")
@click.option("--limit", default=200, type=COUNT_OR_ALL, help="Samples to read, spread evenly; 0 = all.")
@json_flag
@guarded
def stats_command(cache: str, limit: int, as_json: bool) -> None:
    """Per layer rms, absmax, outlier share and SNR of the stored code; histogram of lengths."""
    import dspark.cache
    from dspark.tools.stores.stats import stats

    with bar("stats") as progress:
        data = stats(dspark.cache.open(cache), limit, progress)
    if as_json:
        emit(data)
        return
    snr = data["quality"].get("aux_snr_db") or [None] * len(data["layers"])
    print(f"{'layer':>6} {'rms':>10} {'absmax':>10} {'> 20 rms':>10} {'SNR dB':>7}")
    for row, db in zip(
        [*data["layers"], {"layer": "last", **data["last"]}],
        [*snr, data["quality"].get("last_snr_db")],
        strict=True,
    ):
        if row["rms"] is not None:
            print(
                f"{row['layer']:>6} {row['rms']:>10.4g} {row['absmax']:>10.4g} {row['outlier_share']:>10.2e} {'-' if db is None else f'{db:.1f}':>7}"
            )
    length = data["length"]
    print(
        f"length  min {length['min']}  median {length['median']:.0f}  mean {length['mean']:.0f}  max {length['max']}"
    )
    for span, count in length["histogram"].items():
        print(f"{span:>14} {count:>9} {'#' * max(1, round(50 * count / max(length['histogram'].values())))}")


@main.command("verify")
@click.argument("cache")
@click.option(
    "--drop-damaged",
    is_flag=True,
    help="Delete the damaged parts; dspark-dump --resume then writes exactly those again.",
)
@json_flag
@guarded
def verify_command(cache: str, drop_damaged: bool, as_json: bool) -> None:
    """Every chunk's checksum and every count. Names what is damaged; exit 1 if anything is."""
    from dspark.cache import verify

    with bar("verify") as progress:
        report = verify.verify(cache, progress)
    dropped = verify.drop_damaged(cache, report) if drop_damaged else []
    if as_json:
        emit({"ok": report.ok, "checked_chunks": report.checked_chunks, "checked_parts": report.checked_parts,
              "findings": report.findings, "damaged_parts": sorted(report.damaged), "dropped_parts": dropped})  # fmt: skip
    else:
        for finding in report.findings:
            print(finding)
        print(
            f"{'sound' if report.ok else 'DAMAGED'}: {report.checked_parts} parts, {report.checked_chunks} chunks, {len(report.findings)} findings"
        )
        if dropped:
            print(f"deleted, or gone already: {', '.join(dropped)}")
        if drop_damaged and not report.ok:
            print("run the same dspark-dump command with --resume to write again what is missing")
    sys.exit(0 if report.ok else 1)


@main.command("show")
@click.argument("cache")
@click.argument("index", type=click.IntRange(min=0))
@json_flag
@guarded
def show_command(cache: str, index: int, as_json: bool) -> None:
    """Sample INDEX of CACHE as text; the supervised part between [[ and ]]."""
    import dspark.cache
    from dspark.cache.errors import UsageError
    from dspark.tools.stores.show import runs

    store = dspark.cache.open(cache, allow_incomplete=True)
    if not 0 <= index < len(store):
        raise UsageError(f"{cache} has samples 0 to {len(store) - 1}; {index} is not one")
    data = runs(store, index)
    if as_json:
        emit(data)
        return
    print(
        f"sample {index}: source row {data['row']}, {data['tokens']} tokens, {data['supervised_tokens']} supervised",
        file=sys.stderr,
    )
    print("".join(f"[[{r['text']}]]" if r["supervised"] else r["text"] for r in data["runs"]))


@main.command(
    "estimate",
    epilog="""\b
Examples:
  dspark-tools estimate --model zai-org/GLM-5.2-FP8 --samples 500000 --mean-tokens 2000 --codec small
  dspark-tools estimate --model ./model --data chat.jsonl
""",
)
@click.option("--model", required=True, help="Model id or folder. A known model needs no network.")
@click.option("--data", help="Corpus: its rows are counted and a spread of them tokenised.")
@click.option("--samples", type=click.IntRange(1, 10**12), help="Rows of the corpus, without --data.")
@click.option("--mean-tokens", type=Finite(1, 10**9), help="Tokens a sample, prompt and answer.")
@codec_options
@click.option(
    "--last-share", type=SHARE, default=0.6, help="Share of tokens that are supervised, without --data."
)
@click.option(
    "--like", help="Store of a few hundred rows of this target and layers: sizes are measured on it."
)
@click.option(
    "--tokens-per-second", type=Finite(0.001, 10**12), default=20000.0, help="Prefill rate of your engine."
)
@json_flag
@guarded
def estimate_command(as_json: bool, **flags: Any) -> None:
    """Bytes, files and hours of a dump before it is run."""
    from dspark.dump.plan import human
    from dspark.tools.stores.estimate import estimate

    data = estimate(**flags)
    if as_json:
        emit(data)
        return
    table(
        [
            ("model", f"{data['model']}, layers {data['layers']} (vLLM's ids: {data['target_layer_ids']})"),
            ("tokens", f"{data['tokens']:,} in {data['samples']:,} samples"),
            (
                "bytes",
                f"{human(data['bytes'])}, {data['ratio']:.2f} x smaller than {human(data['raw_bytes'])} of raw bf16 "
                + (f"(measured on {data['measured_on']})" if data["measured_on"] else "(formula)"),
            ),
            ("free here", human(data["free_bytes"])),
            ("files", f"{data['files']:,}"),
            ("hours", f"{data['hours']:.1f} at {data['tokens_per_second']:,.0f} tokens/s"),
        ]
    )


@main.command(
    "score", epilog="\b\nExamples:\n  dspark-tools score --cache ./hs.zarr --draft ./draft --split validation"
)
@click.option("--cache", required=True, help="Store of the draft's target and layers.")
@click.option("--draft", required=True, help="Draft folder: config.json and model.safetensors.")
@click.option(
    "--max-anchors",
    default=0,
    type=COUNT_OR_ALL,
    help="Anchors a row; 0 = every eligible one, no randomness.",
)
@click.option(
    "--split",
    "which",
    default="all",
    type=click.Choice(["all", "validation", "train"]),
    help="Which samples, by the draft's own split.",
)
@click.option(
    "--total-seq-len",
    type=COUNT,
    help="Tokens of a packed row; does not change the result.  [default: as in training]",
)
@click.option("--device", default="auto", type=DEVICE, help="auto, cpu, cuda or cuda:N.")
@click.option("--dtype", default="float32", type=click.Choice(["float32", "bfloat16"]))
@json_flag
@guarded
def score_command(cache: str, draft: str, max_anchors: int, which: str, as_json: bool, **where: Any) -> None:
    """Teacher-forced metrics of a draft: losses, accept rate by slot, mean accepted length (tau), calibration."""
    import dspark.cache
    from dspark.tools.judge.score import score

    with bar("score") as progress:
        data = score(
            dspark.cache.open(cache), draft, max_anchors=max_anchors, which=which, progress=progress, **where
        )
    if as_json:
        emit(data)
        return

    def number(value: Any) -> str:
        if isinstance(value, list):
            return "  ".join(f"{v:.3f}" for v in value)
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    table([(name, number(value)) for name, value in data.items()])


@main.command("recode", epilog="\b\nExamples:\n  dspark-tools recode hs.zarr small.zarr --codec small")
@click.argument("source")
@click.argument("destination")
@codec_options
@click.option(
    "--calibrate/--no-calibrate",
    default=True,
    help="Centre the code on states spread over the source (about 3 dB).",
)
@click.option("--workers", type=COUNT, help="Parts in work at once.  [default: a core each, 8 at most]")
@click.option("--device", default="cpu", type=click.Choice(["cpu", "cuda"]), help="Where states are coded.")
@click.option("--resume", is_flag=True, help="Go on with DESTINATION.")
@click.option("--overwrite", is_flag=True, help="Replace DESTINATION.")
@json_flag
@guarded
def recode_command(source: str, destination: str, as_json: bool, **flags: Any) -> None:
    """Store SOURCE again as DESTINATION with other bits, or packed in the other way."""
    from dspark.cache.recode import recode
    from dspark.tools.stores.info import info

    coding_device_is_here(flags["device"])
    with bar("recode") as progress:
        manifest = recode(source, destination, progress=progress, **flags)
    data = info(destination)
    if as_json:
        emit(data)
        return
    table(
        [
            ("store", f"{destination}: codec {data['codec']}"),
            ("a token", f"{data['bytes_per_token']:.0f} bytes, {data['ratio']:.2f} x smaller than raw bf16"),
            ("SNR", f"aux {manifest.quality['aux_snr_db']} dB, last {manifest.quality['last_snr_db']} dB"),
        ]
    )


@main.command(
    "import",
    epilog="""\b
Examples:
  dspark-tools import ./deepspec_cache hs.zarr --model Qwen/Qwen3-4B
  dspark-tools import ./speculators_data hs.zarr --model Qwen/Qwen3-8B --target-layer-ids "2 18 33"
""",
)
@click.argument("source")
@click.argument("destination")
@click.option("--model", required=True, help="The target that the states are of: id or folder.")
@click.option("--layers", help="Output of decoder layer i, where SOURCE does not say (speculators).")
@click.option("--target-layer-ids", help="The same as vLLM counts, j = i + 1, without the last state's.")
@codec_options
@click.option(
    "--mask-token-id", type=TOKEN_ID, help="As for dspark-dump.  [default: the preset's, or an unused id]"
)
@click.option(
    "--last-state",
    type=click.Choice(["after-norm", "before-norm"]),
    help="Where the last state was taken.  [default: after for DeepSpec, before for speculators]",
)
@click.option("--part-tokens", default=32768, type=COUNT, help="Tokens to a part.")
@click.option(
    "--max-dropped",
    default=0.5,
    type=SHARE,
    help="Fail when more than this share of the rows gives no sample.",
)
@click.option("--device", default="cpu", type=click.Choice(["cpu", "cuda"]), help="Where states are coded.")
@click.option("--resume", is_flag=True, help="Go on with DESTINATION.")
@click.option("--overwrite", is_flag=True, help="Replace DESTINATION.")
@json_flag
@guarded
def import_command(
    source: str,
    destination: str,
    layers: str | None,
    target_layer_ids: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """A DeepSpec target cache, or speculators' data and hidden states, as a store."""
    from dspark.cache.errors import UsageError
    from dspark.dump.target.layers import parse_ids
    from dspark.tools.importers.importer import import_store
    from dspark.tools.stores.info import info

    if layers and target_layer_ids:
        raise UsageError("give --layers or --target-layer-ids, not both")
    ids = parse_ids(layers, "--layers") if layers else None
    if target_layer_ids:
        ids = tuple(j - 1 for j in parse_ids(target_layer_ids, "--target-layer-ids"))
    coding_device_is_here(flags["device"])
    with bar("import") as progress:
        import_store(source, destination, layers=ids, progress=progress, **flags)
    data = info(destination)
    if as_json:
        emit(data)
        return
    table([
        ("store", f"{destination}: {data['samples']:,} samples, {data['tokens']:,} tokens, layers {data['layers']}"),
        ("dropped", f"{data['dropped'] or 'none'} of {data['rows_read']:,} rows"),
        ("a token", f"{data['bytes_per_token']:.0f} bytes, {data['ratio']:.2f} x smaller than raw bf16"),
    ])  # fmt: skip


@main.command("compare")
@click.argument("a")
@click.argument("b")
@click.option("--limit", default=50, type=COUNT_OR_ALL, help="Samples to read, spread evenly; 0 = all.")
@json_flag
@guarded
def compare_command(a: str, b: str, limit: int, as_json: bool) -> None:
    """Two stores of the same samples: SNR a layer, and the target's distribution by B's last states against A's."""
    import dspark.cache
    from dspark.tools.stores.compare import compare

    with bar("compare") as progress:
        data = compare(dspark.cache.open(a), dspark.cache.open(b), limit, progress)
    if as_json:
        emit(data)
        return
    for layer, db in zip([*data["layers"], "last"], [*data["aux_snr_db"], data["last_snr_db"]], strict=True):
        print(f"layer {layer!s:>4}  {'equal' if db is None else f'{db:.2f} dB'}")
    if data["last_rows"]:
        print(
            f"target distribution: TV {data['last_tv']:.4f}, top-1 agreement {data['last_top1_agreement']:.2%} of {data['last_rows']:,}"
        )


main.add_command(eval_command)
main.add_command(check_command)
main.add_command(calibrate_command)
main.add_command(export_command)
