"""``dspark-tools recode``: rewrite a store with another codec; the work is in
``dspark.cache.stores.recode``.
"""

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
from dspark.tools.flags import COUNT


@command("recode", epilog="\b\nExamples:\n  dspark-tools recode hs.zarr small.zarr --codec small")
@click.argument("source")
@click.argument("destination")
@codec_options
@click.option(
    "--calibrate/--no-calibrate",
    default=True,
    help="Centre the code on states spread over the source (about 3 dB).",
)
@click.option(
    "--workers", type=COUNT, help="Parts processed at once.  [default: one per core, at most 8]"
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
def recode_command(source: str, destination: str, as_json: bool, **flags: Any) -> None:
    """Rewrite SOURCE as DESTINATION with another codec or packing."""
    from dspark.cache.stores.recode import recode
    from dspark.tools.stores.info import info

    flags["device"] = str(choose_device(flags["device"]))
    with bar("recode") as progress:
        manifest = recode(source, destination, progress=progress, say=warn, **flags)
    data = info(destination)
    if as_json:
        emit(data)
        return
    table(
        [
            ("store", f"{destination}: codec {data['codec']}"),
            (
                "a token",
                f"{data['bytes_per_token']:.0f} bytes, {data['ratio']:.2f} x smaller than raw bf16",
            ),
            (
                "SNR",
                f"aux {manifest.quality['aux_snr_db']} dB, last "
                f"{manifest.quality['last_snr_db']} dB",
            ),
        ]
    )
