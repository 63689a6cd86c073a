"""``dspark-tools verify``: check every checksum and every count of a store; the work is in
``dspark.cache.stores.verify``.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext

import click

from dspark.cache.shared.command import bar, break_lock_flag, command, emit, json_flag, printable


@command("verify")
@click.argument("cache")
@click.option(
    "--drop-damaged",
    is_flag=True,
    help="Delete damaged parts; dspark-dump --resume then rewrites exactly those.",
)
@click.option(
    "--rebuild-index",
    is_flag=True,
    help="First rebuild the index and the manifest from the parts.",
)
@break_lock_flag
@json_flag
def verify_command(
    cache: str, drop_damaged: bool, rebuild_index: bool, break_lock: bool, as_json: bool
) -> None:
    """Check every chunk's checksum and every count, and name what is damaged. Exit code 1 if
    anything is.
    """
    from dspark.cache.files.lock_files import owned
    from dspark.cache.files.urls import where
    from dspark.cache.stores import verify
    from dspark.cache.stores.rebuild import rebuild

    changes = drop_damaged or rebuild_index
    lock = (
        owned(where(cache), "dspark-tools verify", break_lock=break_lock)
        if changes
        else nullcontext()
    )
    with lock:
        made = rebuild(cache) if rebuild_index else None
        with bar("verify") as progress:
            report = verify.verify(cache, progress)
        dropped = verify.drop_damaged(cache, report) if drop_damaged else []
    if as_json:
        emit(
            {
                "ok": report.ok,
                "checked_chunks": report.checked_chunks,
                "checked_parts": report.checked_parts,
                "findings": report.findings,
                "damaged_parts": sorted(report.damaged),
                "unreadable_parts": sorted(report.unreadable),
                "dropped_parts": dropped,
                "rebuilt": made is not None,
            }
        )
    else:
        if made is not None:
            more = (
                ""
                if made.complete
                else "; the store is not complete: continue with dspark-dump --resume"
            )
            print(f"rebuilt from the parts: manifest{' and index' if made.complete else ''}{more}")
        for finding in report.findings:
            print(printable(finding))
        print(
            f"{report.verdict}: {report.checked_parts} parts, {report.checked_chunks} chunks, "
            f"{len(report.findings)} findings"
        )
        if dropped:
            print(f"deleted or already missing: {', '.join(dropped)}")
        if report.unreadable:
            print(
                "could not be read now, and was left unchanged: "
                f"{', '.join(sorted(report.unreadable))}"
            )
        if drop_damaged and report.damaged - report.stray:
            print("rerun the same dspark-dump command with --resume to restore what is missing")
    sys.exit(0 if report.ok else 1)
