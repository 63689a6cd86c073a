"""``dspark-tools import``: the flags; the work is in ``dspark.tools.importers.importer``."""

from __future__ import annotations

from typing import Any

import click

from dspark.cache.shared.command import (
    bar,
    break_lock_flag,
    codec_options,
    command,
    emit,
    json_flag,
    table,
    warn,
)
from dspark.cache.shared.process import choose_device
from dspark.tools.flags import COUNT, SHARE, TOKEN_ID


@command(
    "import",
    epilog="""\b
Examples:
  dspark-tools import ./deepspec_cache hs.zarr --model Qwen/Qwen3-4B
  dspark-tools import ./speculators_data hs.zarr --model Qwen/Qwen3-8B --target-layer-ids "2 18 33"
""",
)
@click.argument("source")
@click.argument("destination")
@click.option(
    "--model", required=True, help="Target that produced the states: a model id or a folder."
)
@click.option(
    "--layers", help="Output of decoder layer i, if SOURCE does not say which (speculators)."
)
@click.option(
    "--target-layer-ids", help="The same in vLLM's numbering (j = i + 1), without the last state."
)
@codec_options
@click.option(
    "--mask-token-id",
    type=TOKEN_ID,
    help="As for dspark-dump.  [default: the preset's, or an unused id]",
)
@click.option(
    "--last-state",
    type=click.Choice(["after-norm", "before-norm"]),
    help="Whether the last state was taken after or before the final norm.  [default: after for "
    "DeepSpec, before for speculators]",
)
@click.option("--part-tokens", default=32768, type=COUNT, help="Tokens per part.")
@click.option(
    "--max-dropped",
    default=0.5,
    type=SHARE,
    help="Fail when more than this share of the rows gives no sample.",
)
@click.option(
    "--device",
    default="cpu",
    type=click.Choice(["cpu", "cuda"]),
    help="Device that encodes the states.",
)
@click.option("--resume", is_flag=True, help="Continue DESTINATION.")
@click.option("--overwrite", is_flag=True, help="Replace DESTINATION.")
@break_lock_flag
@json_flag
def import_command(
    source: str,
    destination: str,
    layers: str | None,
    target_layer_ids: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Convert a DeepSpec target cache, or speculators' data and hidden states, to a store."""
    from dspark.cache.errors import UsageError
    from dspark.cache.target.taps import parse_ids
    from dspark.tools.importers.importer import import_store
    from dspark.tools.stores.info import info

    if layers and target_layer_ids:
        raise UsageError("give --layers or --target-layer-ids, not both")
    ids = parse_ids(layers, "--layers") if layers else None
    if target_layer_ids:
        ids = tuple(j - 1 for j in parse_ids(target_layer_ids, "--target-layer-ids"))
    flags["device"] = str(choose_device(flags["device"]))
    with bar("import") as progress:
        import_store(source, destination, layers=ids, progress=progress, say=warn, **flags)
    data = info(destination)
    if as_json:
        emit(data)
        return
    table(
        [
            (
                "store",
                f"{destination}: {data['samples']:,} samples, {data['tokens']:,} tokens, layers "
                f"{data['layers']}",
            ),
            ("dropped", f"{data['dropped'] or 'none'} of {data['rows_read']:,} rows"),
            (
                "a token",
                f"{data['bytes_per_token']:.0f} bytes, {data['ratio']:.2f} x smaller than raw bf16",
            ),
        ]
    )
