"""``dspark-tools verify``: every checksum and every count of a store; the work is in ``dspark.cache.verify``."""

from __future__ import annotations

import sys

import click

from dspark.cache.shared.command import bar, command, emit, json_flag


@command("verify")
@click.argument("cache")
@click.option(
    "--drop-damaged",
    is_flag=True,
    help="Delete the damaged parts; dspark-dump --resume then writes exactly those again.",
)
@json_flag
def verify_command(cache: str, drop_damaged: bool, as_json: bool) -> None:
    """Check every chunk's checksum and every count; name what is damaged, and exit with 1 if anything is."""
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
