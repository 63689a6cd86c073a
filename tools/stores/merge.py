"""``dspark-tools merge``, ``append`` and ``subset``: join stores with the same plan, or take
samples out of one; the work is in ``dspark.cache``.
"""

from __future__ import annotations

import click

from dspark.cache.shared.command import bar, command, emit, json_flag, table
from dspark.tools.stores.info import info


def _report(store: str, as_json: bool) -> None:
    data = info(store)
    if as_json:
        emit(data)
        return
    table(
        [
            ("store", f"{store}: {data['samples']:,} samples in {data['parts']:,} parts"),
            ("tokens", f"{data['tokens']:,}, supervised {data['supervised_tokens']:,}"),
            ("sources", ", ".join(data["sources"])),
        ]
    )


@command(
    "merge",
    epilog="\b\nExamples:\n  dspark-tools merge hs.zarr shard-0.zarr shard-1.zarr shard-2.zarr",
)
@click.argument("out")
@click.argument("stores", nargs=-1, required=True, metavar="STORE...")
@json_flag
def merge_command(out: str, stores: tuple[str, ...], as_json: bool) -> None:
    """Join stores with the same plan, such as those of dspark-dump --shard, into the new store OUT.
    The given stores are not changed.

    Refuses, naming them, if rows of a source are missing.
    """
    from dspark.cache.stores.merge import merge

    with bar("merge") as progress:
        merge(out, stores, progress=progress)
    _report(out, as_json)


@command("append", epilog="\b\nExamples:\n  dspark-tools append hs.zarr second-corpus.zarr")
@click.argument("store")
@click.argument("others", nargs=-1, required=True, metavar="OTHER...")
@json_flag
def append_command(store: str, others: tuple[str, ...], as_json: bool) -> None:
    """Add the corpora of complete stores with the same plan to STORE. The other stores are not
    changed.
    """
    from dspark.cache.stores.merge import append

    with bar("append") as progress:
        append(store, others, progress=progress)
    _report(store, as_json)


@command(
    "subset",
    epilog="\b\nExamples:\n  dspark-tools subset hs.zarr small.zarr --where share=0.1 --where "
    "'tokens<=2048'",
)
@click.argument("store")
@click.argument("out")
@click.option(
    "--where",
    "conditions",
    multiple=True,
    required=True,
    metavar="CONDITION",
    help="Condition that a sample must meet; if repeated, all must hold: tokens<=N, tokens>=N, "
    "supervised<=N, supervised>=N, source=NUMBER|ID, rows=A-B, conversation=HEX, share=F "
    "or share=F:SEED (of the conversations, at random).",
)
@json_flag
def subset_command(store: str, out: str, conditions: tuple[str, ...], as_json: bool) -> None:
    """Copy the samples of STORE that meet all conditions to the new store OUT, with unchanged
    codes.
    """
    from dspark.cache.stores.subset import subset

    with bar("subset") as progress:
        subset(store, out, conditions, progress=progress)
    _report(out, as_json)
