"""Capture and commit every part that is missing: of rows, or of the target's own answers."""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dspark.cache.errors import DataError, EngineError
from dspark.cache.manifest import Manifest
from dspark.cache.records import TokenSample
from dspark.cache.writer import StoreWriter
from dspark.dump.job import Job, part_reader
from dspark.dump.regenerate.answer_files import AnswerFiles
from dspark.dump.regenerate.conversations import Prompts, Regenerator, batches_of
from dspark.dump.workers import WorkerPool
from dspark.dump.writing.pipeline import Pipeline

if TYPE_CHECKING:
    from dspark.dump.corpus.parts import PartRows
    from dspark.dump.engines.engine import Engine
    from dspark.dump.progress import Display

SWITCH = 0.0005  # seconds that a thread may keep Python's lock
log = logging.getLogger("dspark.dump")


@dataclass(slots=True)
class Written:
    """What a run added: tokens, seconds from the first part of rows asked for to the last part on
    disk, and how they were spent (stages overlap).
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


@contextmanager
def short_turns() -> Iterator[None]:
    """Within it, a thread of pure Python gives its lock up after ``SWITCH`` seconds instead of 5
    ms. The thread that launches the target's kernels gives it up at every one of them, and must
    have it back before the GPU has done what is waiting.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(SWITCH, before))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def write_parts(
    writer: StoreWriter,
    parts: Iterator[PartRows],
    engine: Engine,
    rows: int | None,
    show: Display,
    write: WorkerPool | None = None,
) -> Written:
    """Capture and commit ``parts``, all that are missing, of ``rows`` source rows (None: unknown);
    returns what was written.
    """
    out = Written()
    with (
        short_turns(),
        show.progress(rows) as shown,
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
    answers = AnswerFiles.of(job.config.output)
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


def finished(writer: StoreWriter, job: Job, quality: dict[str, Any]) -> Manifest:
    """Finish the store; its source is recorded as it is now."""
    writer.manifest = dataclasses.replace(writer.manifest, sources=job.manifest.sources)
    return writer.finish(quality=quality)
