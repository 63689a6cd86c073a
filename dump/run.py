"""The dump, start to end: plan -> samples -> states -> codes -> parts on disk.

Rows are read and tokenised ahead (``reading.py``, ``tokenise.py``), the engine runs in this thread,
and what it captures is coded and written in the background (``pipeline.py``). A part is on disk
completely or not at all, so whatever stops a dump (Ctrl-C, a full disk, kill -9) loses only what
was not yet committed (the few parts in memory), and ``--resume`` writes the same store as an
unbroken run.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from dspark.cache.errors import DamagedCacheError, MismatchError
from dspark.cache.files.atomic import write_file
from dspark.cache.files.calibration import codec_info
from dspark.cache.files.lock import OLD, Lock
from dspark.cache.files.lock_files import owned
from dspark.cache.files.place import place_of
from dspark.cache.files.urls import Where
from dspark.cache.manifest import Manifest
from dspark.cache.parts.committed import scan_parts
from dspark.cache.quality import quality as quality_of
from dspark.cache.reader import Cache
from dspark.cache.records import TokenSample
from dspark.cache.settings import FALLBACK, NAMED
from dspark.cache.shared import config_file
from dspark.cache.shared.own_process import starting
from dspark.cache.shared.stopping import parts_of, stoppable
from dspark.cache.stored_manifest import read_manifest
from dspark.cache.stores.rebuild import rebuild
from dspark.cache.target.logits import PLAIN, Logits
from dspark.cache.writer import StoreWriter, refuse_to_replace
from dspark.dump import plan as planning
from dspark.dump.begin import TURN, begun, probe_states, warmed
from dspark.dump.checks.coded import check_coded
from dspark.dump.checks.states import check
from dspark.dump.committing import Written, finished, regenerate_parts, write_parts
from dspark.dump.config import DumpConfig
from dspark.dump.corpus.ahead import ahead
from dspark.dump.corpus.reading import RowsProcess
from dspark.dump.corpus.tokenise import Tokenisers
from dspark.dump.job import (
    Job,
    first_samples,
    load_engine,
    prepare,
    sources_reader,
    tokenisers,
)
from dspark.dump.progress import log_file
from dspark.dump.regenerate.answer_files import AnswerFiles
from dspark.dump.regenerate.conversations import Prompts
from dspark.dump.report import report, summary
from dspark.dump.target.weights import compact
from dspark.dump.workers import WorkerPool
from dspark.dump.writing.writers import writers

if TYPE_CHECKING:
    from dspark.dump.corpus.parts import PartRows, SourcesReader
    from dspark.dump.engines.engine import Engine
    from dspark.dump.progress import Display

STOPPING = "discarding unfinished parts, committing finished ones"

log = logging.getLogger("dspark.dump")


def dump(
    config: DumpConfig,
    show: Display,
    engine_for: Callable[[planning.Plan, int | None], Engine] = load_engine,
) -> dict[str, Any]:
    """Run the whole dump; returns the report that ``--json`` prints. Raises LockedError if another
    process is writing the store.
    """
    safe = parts_of(config.output, resume=config.resume)
    # A shard holds the store's own lock only while it creates or finishes the store. The next
    # attempt of a shard that was killed elsewhere waits until its lock shows no sign of life.
    wait = OLD + 60 if config.shard and config.break_lock else 0.0
    own = owned(config.lock, "dspark-dump", break_lock=config.break_lock, wait=wait)
    with stoppable(STOPPING, safe), own as lock:
        return _dump(config, show, engine_for, lock)


def _dump(
    config: DumpConfig,
    show: Display,
    engine_for: Callable[[planning.Plan, int | None], Engine],
    lock: Lock,
) -> dict[str, Any]:
    began = time.monotonic()
    place = place_of(config.output)
    exists = place.exists()
    resuming = (config.resume or config.shard is not None) and exists
    if not resuming:
        refuse_to_replace(place, overwrite=config.overwrite)
    stored = read_manifest(config.output) if resuming else None
    answers = AnswerFiles.of(config.output)
    if not stored and (config.regenerate or (exists and answers.go_with_the_store())):
        answers.refuse_other(config.sources, config.overwrite)
    # Everything that can be refused without weights is refused before they are loaded.
    with starting():
        job = prepare(config, stored.dump.template_date if stored else None)
    if stored:
        job = continued(job, stored)
        stored.same_plan(job.manifest, str(config.output))
        if stored.complete and len(stored.sources) == len(job.manifest.sources):
            if mended(config.output):
                show.say(
                    f"{config.output / 'index'} was missing or damaged; it was rebuilt "
                    "from the parts"
                )
            check_unchanged(job, stored)
            # Stopped between the end of the store and theirs.
            if config.regenerate and answers.folder.exists():
                answers.join(scan_parts(config.output))
                answers.clear()
                show.say(f"answers  {answers.joined}")
            show.say(
                f"{config.output} is complete ({stored.counts.samples:,} samples, "
                f"{stored.counts.tokens:,} tokens): nothing to resume."
            )
            return report(config.output, stored, time.monotonic() - began, Written())
    with log_file(config.beside(".log")):
        # The parts' records must not say who wrote them: they are the same from any writer.
        log.info("writer   process %d on %s", os.getpid(), socket.gethostname())
        for line in job.plan.lines():
            show.say(line)
        writer = StoreWriter.resume(config.output, job.manifest) if stored else None
        own = config.part_of.takes if config.part_of else lambda part: True
        mine = [r.tokens for i, r in writer.committed.items() if own(i)] if writer else []
        done = sum(mine)
        if writer:
            others = len(writer.committed) - len(mine)
            show.say(
                f"resuming: {len(mine)} parts with {done:,} tokens are already stored"
                + (f", and {others} of other shards" if config.part_of else "")
            )
            if config.regenerate:
                answers.check(writer.committed)
        planning.check_disk(job.plan, done, config.part_of)
        probe = first_samples(job)
        with ExitStack() as stack:
            # They start while the weights are read. Each is to be closed before the next is made,
            # which a signal may interrupt.
            if (make := tokenisers(job)) is not None:
                stack.callback(make.close)
            if (write := writers(job.plan.workers)) is not None:
                stack.callback(write.close)
            engine = engine_for(job.plan, config.batch_tokens)
            stack.callback(engine.close)
            manifest, written = run_engine(
                job, engine, probe, writer, show, make, write, lock.check
            )
        out = report(config.output, manifest, time.monotonic() - began, written)
        out["codec_why"] = job.plan.codec_why
        for line in summary(out):
            show.say(line)
        return out


def mended(store: Where) -> bool:
    """Rebuild the index of a complete store if it cannot be used; returns whether that was done."""
    try:
        _ = Cache(store, read_manifest(store)).index
    except DamagedCacheError:
        rebuild(store)
        return True
    return False


def check_unchanged(job: Job, stored: Manifest) -> None:
    """Raise MismatchError, naming the part, where rows of a finished store are others by now. Reads
    the corpus only where a file's checksum has changed.
    """
    before, now = ([s.sha256 for s in m.sources] for m in (stored, job.manifest))
    if before == now:
        return
    committed = scan_parts(job.config.output)
    for reader in sources_reader(job, log.info).readers:
        for part, _ in reader.blocks(committed):
            raise MismatchError(
                f"{job.config.output} is complete, and {reader.corpus.id} has changed since: rows "
                f"from {part.row_start:,} on are in none of its parts. Dump them into a store of "
                "their own and join the two with dspark-tools merge, or give --overwrite."
            )


def continued(job: Job, stored: Manifest) -> Job:
    """Return ``job`` with what a resumed store has fixed: the rows per part, which were estimated
    from a corpus that may have changed since.
    """
    rows = stored.dump.block_rows
    plan = dataclasses.replace(job.plan, block_rows=rows)
    name = stored.codec.name
    if (
        not job.config.codec_asked
        and job.supplied is None
        and name in (NAMED["default"], FALLBACK)
        and name != plan.codec
    ):
        plan = planning.with_codec(plan, name, "as the store was started", own_parts=False)
    manifest = dataclasses.replace(
        job.manifest,
        dump=dataclasses.replace(job.manifest.dump, block_rows=rows),
        codec=dataclasses.replace(
            codec_info(plan.make_codec()), calibration_sha256=job.manifest.codec.calibration_sha256
        ),
    )
    return dataclasses.replace(job, plan=plan, manifest=manifest)


def run_engine(
    job: Job,
    engine: Engine,
    probe: Sequence[TokenSample],
    writer: StoreWriter | None,
    show: Display,
    make: Tokenisers | RowsProcess | None = None,
    write: WorkerPool | None = None,
    guard: Callable[[], None] = lambda: None,
) -> tuple[Manifest, Written]:
    """Check the engine, then capture what is missing; returns the finished manifest and what was
    written. ``guard``: see StoreWriter.
    """
    if isinstance(job.maker, Prompts):
        writer, measured = begin_or_resume(job, engine, probe, writer, show, guard)
        with writer:
            return regenerate_parts(job, job.maker, writer, engine, measured, show, write)
    reader = sources_reader(job, log.info, make)
    with ExitStack() as stack:
        parts = None
        if isinstance(make, RowsProcess) and (writer is not None or job.config.shard is None):
            # The first parts are made while the target is checked and the codec learns, by other
            # processes. A shard knows which parts there are only once the store is there.
            parts = stack.enter_context(rows_ahead(reader, writer, make))
        writer, measured = begin_or_resume(job, engine, probe, writer, show, guard)
        stack.enter_context(writer)
        if make is not None:
            make.wait_until_started()
            if write is not None:
                write.wait_until_started()
        if parts is None:
            parts = stack.enter_context(rows_ahead(reader, writer, make))
        began = time.monotonic()
        written = write_parts(writer, parts, engine, job.rows, show, write)
        written.seconds = time.monotonic() - began
        if make is not None:
            make.close()  # its processes end while the store is finished
        reader.check_dropped(at_end=True)
        for note, n in reader.notes.items():
            show.say(f"  {note}: {n:,}")
        if job.config.shard is not None:
            with owned(job.config.output, "dspark-dump --shard", wait=TURN):
                rows = {i: one.total for i, one in enumerate(reader.readers)}
                manifest = writer.finish_shard(rows, quality=measured, sources=job.manifest.sources)
            return manifest, written
        return finished(writer, job, measured), written


@contextmanager
def rows_ahead(
    reader: SourcesReader, writer: StoreWriter | None, make: Tokenisers | RowsProcess | None
) -> Iterator[Iterator[PartRows]]:
    """Yield the parts that are missing in the store, if there is one, read ahead by a thread."""
    with ahead(reader.parts(dict(writer.committed) if writer else {}), 1) as parts:
        try:
            yield parts
        finally:
            if isinstance(make, RowsProcess):
                make.close()  # or the thread would wait for the part that the process is at


def begin_or_resume(
    job: Job,
    engine: Engine,
    probe: Sequence[TokenSample],
    writer: StoreWriter | None,
    show: Display,
    guard: Callable[[], None],
) -> tuple[StoreWriter, dict[str, Any]]:
    """Check the engine on ``probe``, and begin the store if it is new (None) or go on with it;
    returns its writer and what its codec loses.
    """
    config = job.config
    frozen = engine.frozen()
    logits = Logits.of_config(job.target.config)
    with warmed(job, engine, resuming=writer is not None) as ready:
        agreement, states = check(
            engine, probe, frozen, job.plan.dtype, job.plan.layers, logits, job.corpus.id
        )
        if logits != PLAIN:
            show.say(
                f"note: the target {logits}; the store keeps the last states from before that "
                "step, and its config.json describes it"
            )
        show.say(
            f"self-check passed: states and engine agree at {agreement.agree:.1%} of "
            f"{agreement.positions} positions "
            f"(largest log-probability difference {agreement.worst:.2g})"
        )
        raw = [states[i] for i in sorted(states)]
        if writer is None:
            writer = begun(job, engine, probe, raw, show, guard, ready)
        else:
            if restored := writer.restore_target(compact(frozen), job.target.files):
                show.say(f"restored in {config.output / 'target'}: {', '.join(restored)}")
            check_coded(engine, probe, raw, writer.codec, job.plan.layers)
            writer.append(job.manifest.sources)
    writer.guard = guard
    # Only now: an old store that could not be replaced keeps what was asked of it.
    settings = config_file.resolved(dataclasses.asdict(config), "dspark-dump")
    write_file(config.beside(".yaml"), settings)
    measured = quality_of(probe_states(engine, probe, raw, writer.codec), writer.codec)
    return writer, measured
