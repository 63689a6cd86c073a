"""The dump, start to end: plan -> samples -> states -> codes -> parts on disk.

Rows are read and tokenised ahead (``ahead.py``, ``tokenise.py``), the engine runs in this thread,
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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.cache.errors import (
    DamagedCacheError,
    DataError,
    EngineError,
    MismatchError,
)
from dspark.cache.files.atomic import write_file
from dspark.cache.files.calibration import codec_info
from dspark.cache.files.lock import OLD, Lock
from dspark.cache.files.lock_files import owned
from dspark.cache.files.place import place_of
from dspark.cache.files.urls import Where, beside
from dspark.cache.manifest import Manifest
from dspark.cache.parts.committed import by_source, scan_parts, totals
from dspark.cache.quality import Known, Probe, budget_of, probe_of
from dspark.cache.quality import quality as quality_of
from dspark.cache.reader import Cache
from dspark.cache.records import TokenSample
from dspark.cache.settings import FALLBACK, NAMED
from dspark.cache.shared import config_file
from dspark.cache.shared.command import bar
from dspark.cache.shared.own_process import starting
from dspark.cache.shared.stopping import parts_of, stoppable
from dspark.cache.stored_manifest import read_manifest
from dspark.cache.stores.rebuild import rebuild
from dspark.cache.target.logits import PLAIN, Logits
from dspark.cache.writer import StoreWriter, refuse_to_replace
from dspark.dump import plan as planning
from dspark.dump.centring import (
    Calibration,
    calibration_samples,
    captured,
    learning_device,
    release,
)
from dspark.dump.checks.coded import check_coded
from dspark.dump.checks.states import check
from dspark.dump.config import DumpConfig
from dspark.dump.corpus.ahead import ahead
from dspark.dump.corpus.parts import SourcesReader
from dspark.dump.corpus.tokenise import Tokenisers
from dspark.dump.job import (
    Job,
    first_samples,
    load_engine,
    part_reader,
    prepare,
    sources_reader,
    tokenisers,
)
from dspark.dump.progress import log_file
from dspark.dump.regenerate.answer_files import AnswerFiles
from dspark.dump.regenerate.conversations import Prompts, Regenerator, batches_of
from dspark.dump.target.weights import compact
from dspark.dump.workers import WorkerPool
from dspark.dump.writing.pipeline import Pipeline, writers

if TYPE_CHECKING:
    from dspark.cache.codec.base import Codec
    from dspark.dump.engines.engine import Engine, States
    from dspark.dump.progress import Display

STOPPING = "discarding unfinished parts, committing finished ones"

log = logging.getLogger("dspark.dump")


TURN = 3600.0  # seconds that a shard waits for another one to create or finish their store


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
    answers = AnswerFiles(local(config.output))
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
            # they start while the weights are read
            make, write = tokenisers(job), writers(job.plan.workers)
            for processes in (make, write):
                if processes is not None:
                    stack.callback(processes.close)
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


def local(output: Where) -> Path:
    """Return where a store's answers go; only a local store has them."""
    return beside(output, "")


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
    make: Tokenisers | None = None,
    write: WorkerPool | None = None,
    guard: Callable[[], None] = lambda: None,
) -> tuple[Manifest, Written]:
    """Check the engine, then capture what is missing; returns the finished manifest and what was
    written. ``guard``: see StoreWriter.
    """
    config = job.config
    frozen = engine.frozen()
    logits = Logits.of_config(job.target.config)
    agreement, states = check(
        engine, probe, frozen, job.plan.dtype, job.plan.layers, logits, job.corpus.id
    )
    if logits != PLAIN:
        show.say(
            f"note: the target {logits}; the store keeps the last states from before that step, "
            "and its config.json describes it"
        )
    show.say(
        f"self-check passed: states and engine agree at {agreement.agree:.1%} of "
        f"{agreement.positions} positions "
        f"(largest log-probability difference {agreement.worst:.2g})"
    )
    raw = [states[i] for i in sorted(states)]
    if writer is None:
        writer = begun(job, engine, probe, raw, show, guard)
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
    if isinstance(job.maker, Prompts):
        with writer:
            return regenerate_parts(job, job.maker, writer, engine, measured, show, write)
    with writer:
        if make is not None:
            make.wait_until_started()
            if write is not None:
                write.wait_until_started()
        reader = sources_reader(job, log.info, make)
        began = time.monotonic()
        written = write_parts(writer, reader, engine, job.rows, show, write)
        written.seconds = time.monotonic() - began
        reader.check_dropped(at_end=True)
        for note, n in reader.notes.items():
            show.say(f"  {note}: {n:,}")
        if config.shard is not None:
            with owned(config.output, "dspark-dump --shard", wait=TURN):
                rows = {i: one.total for i, one in enumerate(reader.readers)}
                manifest = writer.finish_shard(rows, quality=measured, sources=job.manifest.sources)
            return manifest, written
        return finished(writer, job, measured), written


def begun(
    job: Job,
    engine: Engine,
    probe: Sequence[TokenSample],
    raw: Sequence[States],
    show: Display,
    guard: Callable[[], None],
) -> StoreWriter:
    """Begin the store. Of several dumps into one the first calibrates and makes it, while the
    others wait; they go on with it.
    """
    config = job.config
    if config.shard is None:
        return created(job, engine, probe, raw, show, guard)
    with owned(config.output, "dspark-dump --shard", wait=TURN):
        if not place_of(config.output).exists():
            return created(job, engine, probe, raw, show, guard)
    writer = StoreWriter.resume(config.output, job.manifest)
    writer.restore_target(compact(engine.frozen()), job.target.files)
    check_coded(engine, probe, raw, writer.codec, job.plan.layers)
    return writer


def created(
    job: Job,
    engine: Engine,
    probe: Sequence[TokenSample],
    raw: Sequence[States],
    show: Display,
    guard: Callable[[], None],
) -> StoreWriter:
    """Calibrate the codec, check it on the probe's states ``raw`` and make the new store."""
    config = job.config
    codec = job.plan.make_codec()
    codec = job.supplied.codec(codec) if job.supplied else codec
    found = calibration(job, engine, probe_states(engine, probe, raw, codec), codec, show)
    release()  # what learning took of a GPU is an engine's, in another process
    planning.check_disk(planning.sized(job.plan, found.size), 0, config.part_of)
    # While an older store that is to be replaced is still there.
    check_coded(engine, probe, raw, found.codec, job.plan.layers)
    release()
    guard()
    answers = AnswerFiles(local(config.output))
    stale = config.overwrite and answers.go_with_the_store()
    writer = StoreWriter.create(
        config.output,
        job.manifest,
        compact(engine.frozen()),
        job.target.files,
        codec=found.codec,
        overwrite=config.overwrite,
        weights_sha256=job.supplied.made_for.weights_sha256 if job.supplied else None,
    )
    if stale:  # only now: an old store that could not be replaced keeps its answers
        answers.begin()
    return writer


def probe_states(
    engine: Engine, samples: Sequence[TokenSample], states: Sequence[States], codec: Codec
) -> Probe:
    """Return the self-check's ``samples`` and their ``states``, for ``codec``."""
    known = [Known(t, *s) for t, s in zip(samples, states, strict=True)]
    return probe_of(known, codec, engine.frozen)


def calibration(job: Job, engine: Engine, probe: Probe, codec: Codec, show: Display) -> Calibration:
    """Return codec and size of a new store, from states from all over the corpus, or from those of
    the self-check (``probe``) if the codec has nothing (more) to learn.
    """
    assert job.plan.rows is not None
    assert job.plan.tokens is not None
    began, learnt = time.monotonic(), None
    if codec.needs_calibration and job.supplied is None:
        shapes = len(job.plan.layers), job.plan.shapes.hidden_size
        budget = budget_of(codec, *shapes, job.plan.tokens)
        samples = calibration_samples(job.corpus, job.maker, job.plan.rows, job.plan.tokens, budget)
        device = learning_device(job.plan, engine, codec)
        seen = sum(len(s.input_ids) for s in samples)
        with bar("calibration: tokens") as progress:
            whole = job.plan.tokens
            about = job.plan.layers, job.corpus.id, device, whole
            probe = captured(engine, samples, codec, budget, *about, progress) or probe
        if codec.least_tokens(*shapes):
            show.say(f"learning {codec.name} from the states of {probe.aux.shape[0]:,} tokens")
        learnt = f"{len(samples):,} samples spread over the corpus, {seen:,} tokens"
    out = Calibration.of(probe, codec, learns=job.supplied is None)
    if learnt is not None:
        show.say(f"calibrated on {learnt}, in {time.monotonic() - began:.1f} s")
    plan = planning.sized(job.plan, out.size)
    show.say(
        f"size     about {planning.human(plan.bytes or 0)}, measured on {probe.aux.shape[0]:,} "
        "tokens"
    )
    return out


def finished(writer: StoreWriter, job: Job, quality: dict[str, Any]) -> Manifest:
    """Finish the store; its source is recorded as it is now."""
    writer.manifest = dataclasses.replace(writer.manifest, sources=job.manifest.sources)
    return writer.finish(quality=quality)


@dataclass(slots=True)
class Written:
    """What a run added: tokens, seconds from the first row to the last part on disk, and how they
    were spent (stages overlap).
    """

    tokens: int = 0
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)


@contextmanager
def settled(pipeline: Pipeline) -> Iterator[None]:
    """On Ctrl-C, commit the complete parts and raise again."""
    try:
        yield
    except KeyboardInterrupt:
        # Of states in flight, which an interrupted engine may never send.
        with suppress(EngineError):
            pipeline.settle()
        raise


def write_parts(
    writer: StoreWriter,
    reader: SourcesReader,
    engine: Engine,
    rows: int | None,
    show: Display,
    write: WorkerPool | None = None,
) -> Written:
    """Capture and commit every part that is missing, of ``rows`` source rows (None: unknown);
    returns what was written.
    """
    out = Written()
    with (
        show.progress(rows) as shown,
        ahead(reader.parts(dict(writer.committed)), 1) as parts,
        Pipeline(
            writer,
            writer.codec,
            embedding=engine.frozen().embed_tokens if writer.codec.needs_tokens else None,
            pool=write,
            bar=shown,
            groups=engine.groups_at_once,
        ) as pipeline,
        settled(pipeline),
    ):

        def groups() -> Iterator[list[TokenSample]]:
            while True:
                began = time.perf_counter()
                part = next(parts, None)
                pipeline.seconds["wait for rows"] += time.perf_counter() - began
                if part is None:
                    return
                if pipeline.begin(part):
                    out.tokens += part.tokens
                    yield part.samples

        for captured in engine.stream(groups(), writer.codec):
            pipeline.put(captured)
        pipeline.finish()
        out.stages = dict(pipeline.seconds)
    return out


def regenerate_parts(
    job: Job,
    prompts: Prompts,
    writer: StoreWriter,
    engine: Engine,
    quality: dict[str, Any],
    show: Display,
    write: WorkerPool | None,
) -> tuple[Manifest, Written]:
    """Write the parts and finish the store when the target answers."""
    out, began = Written(), time.monotonic()
    answers = AnswerFiles(local(job.config.output))
    if not writer.committed:
        answers.begin()
    reader = part_reader(job, log.info)
    maker = Regenerator(
        engine,
        prompts,
        job.target.eos_token_ids,
        writer.codec,
        reader,
        answers,
        job.config.min_supervised,
    )
    with (
        show.progress(job.rows) as shown,
        Pipeline(writer, writer.codec, pool=write, bar=shown) as pipeline,
        settled(pipeline),
    ):
        group = 0
        for part, states in maker.parts(dict(writer.committed)):
            if pipeline.begin(part):
                for captured in batches_of(group, part.samples, states):
                    pipeline.put(captured)
                group += 1
                out.tokens += part.tokens
        pipeline.finish()
        out.stages = dict(pipeline.seconds)
    out.seconds = time.monotonic() - began
    if not any(record.samples for record in writer.committed.values()):
        raise DataError(f"{job.corpus.id}: no row gave an answer: {dict(reader.dropped)}.")
    reader.check_dropped(at_end=True)
    for note, n in reader.notes.items():
        show.say(f"  {note}: {n:,}")
    # In this order, so that --resume can do the rest whatever stops us between two of them.
    answers.join(writer.committed)
    manifest = finished(writer, job, quality)
    answers.clear()
    show.say(f"answers  {answers.joined}")
    return manifest, out


def report(output: Where, manifest: Manifest, seconds: float, written: Written) -> dict[str, Any]:
    """Return what the command prints at the end."""
    counts = manifest.counts if manifest.complete else totals(list(scan_parts(output).values()))
    return {
        "output": str(output),
        "complete": manifest.complete,
        **dataclasses.asdict(counts),
        "codec": manifest.codec.name,
        "layers": manifest.layers,
        "target_layer_ids": manifest.target_layer_ids,
        "engine": manifest.dump.engine,
        "quality": manifest.quality,
        "per_source": per_source(output, manifest),
        "seconds": round(seconds, 2),
        "new_tokens": written.tokens,
        "capture_seconds": round(written.seconds, 2),
        "stages": {name: round(seconds, 2) for name, seconds in written.stages.items()},
    }


def per_source(output: Where, manifest: Manifest) -> list[dict[str, Any]]:
    """Return the counts of each source, if there are several."""
    return (
        by_source(list(scan_parts(output).values()), manifest) if len(manifest.sources) > 1 else []
    )


def summary(out: dict[str, Any]) -> list[str]:
    """Format the report: what is stored, what was cut, what was dropped and why."""
    rate = (
        f", {out['new_tokens'] / max(out['capture_seconds'], 0.01):,.0f} per second"
        if out["new_tokens"]
        else ""
    )
    left = "" if out["complete"] else "; NOT COMPLETE: other shards have still to write their parts"
    return [
        f"{out['output']}: {out['samples']:,} samples, {out['tokens']:,} tokens "
        f"({out['supervised_tokens']:,} supervised{rate}) in "
        f"{out['parts']:,} parts; {out['truncated']:,} truncated, "
        f"{sum(out['dropped'].values()):,} of {out['rows_read']:,} rows dropped{left}",
        *(f"  dropped: {reason}: {n:,}" for reason, n in out["dropped"].items()),
        *(
            f"  source {s['number']}: {s['id']}: {s['samples']:,} samples, {s['tokens']:,} "
            f"tokens from {s['rows']:,} rows"
            for s in out["per_source"]
        ),
        f"codec    {out['codec']}" + (f" ({out['codec_why']})" if out.get("codec_why") else ""),
    ]
