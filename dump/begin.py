"""Begin a store: calibrate its codec, check the codec on known states, and make the folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from dspark.cache.codec.klt.warm import warming
from dspark.cache.files.lock_files import owned
from dspark.cache.files.place import place_of
from dspark.cache.quality import Known, Probe, budget_of, probe_of
from dspark.cache.records import TokenSample
from dspark.cache.shared.command import bar
from dspark.cache.shared.phases import Phases
from dspark.cache.writer import StoreWriter
from dspark.dump import plan as planning
from dspark.dump.centring import (
    Calibration,
    calibration_samples,
    captured,
    learning_device,
    release,
)
from dspark.dump.checks.coded import check_coded
from dspark.dump.job import Job
from dspark.dump.regenerate.answer_files import AnswerFiles
from dspark.dump.target.weights import compact

if TYPE_CHECKING:
    from dspark.cache.codec.base import Codec
    from dspark.dump.engines.engine import Engine, States
    from dspark.dump.progress import Display

Wait = Callable[[], None]

TURN = 3600.0  # seconds that a shard waits for another one to create or finish their store


def warmed(job: Job, engine: Engine, resuming: bool) -> AbstractContextManager[Wait]:
    """Warm the GPU that the codec of a new store will be learnt on (``warming``)."""
    codec, device = job.plan.make_codec(), None
    if not resuming and job.supplied is None and codec.needs_calibration:
        device = learning_device(job.plan, engine, codec)
    shapes = len(job.plan.layers), job.plan.shapes.hidden_size
    return warming(codec, *shapes, device, job.plan.dtype)


def begun(
    job: Job,
    engine: Engine,
    probe: Sequence[TokenSample],
    raw: Sequence[States],
    show: Display,
    guard: Callable[[], None],
    ready: Wait,
) -> StoreWriter:
    """Begin the store. Of several dumps into one the first calibrates and makes it, while the
    others wait; they go on with it. ``ready`` waits for what learning needs (``warmed``).
    """
    config = job.config
    if config.shard is None:
        return created(job, engine, probe, raw, show, guard, ready)
    with owned(config.output, "dspark-dump --shard", wait=TURN):
        if not place_of(config.output).exists():
            return created(job, engine, probe, raw, show, guard, ready)
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
    ready: Wait,
) -> StoreWriter:
    """Calibrate the codec, check it on the probe's states ``raw`` and make the new store."""
    config = job.config
    codec = job.plan.make_codec()
    codec = job.supplied.codec(codec) if job.supplied else codec
    known = probe_states(engine, probe, raw, codec)
    found = calibration(job, engine, known, codec, show, ready)
    release()  # what learning took of a GPU is an engine's, in another process
    planning.check_disk(planning.sized(job.plan, found.size), 0, config.part_of)
    # While an older store that is to be replaced is still there.
    check_coded(engine, probe, raw, found.codec, job.plan.layers)
    release()
    guard()
    answers = AnswerFiles.of(config.output)
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


def calibration(
    job: Job, engine: Engine, probe: Probe, codec: Codec, show: Display, ready: Wait
) -> Calibration:
    """Return codec and size of a new store, from states from all over the corpus, or from those of
    the self-check (``probe``) if the codec has nothing (more) to learn.
    """
    assert job.plan.rows is not None
    assert job.plan.tokens is not None
    began, learnt, phases = time.monotonic(), None, Phases()
    if codec.needs_calibration and job.supplied is None:
        shapes = len(job.plan.layers), job.plan.shapes.hidden_size
        budget = budget_of(codec, *shapes, job.plan.tokens)
        rows, tokens = job.plan.rows, job.plan.tokens
        with phases.phase("rows"):
            samples = calibration_samples(job.corpus, job.maker, rows, tokens, budget)
        device = learning_device(job.plan, engine, codec)
        seen = sum(len(s.input_ids) for s in samples)
        with bar("calibration: tokens") as progress, phases.phase("capture"):
            about = job.plan.layers, job.corpus.id, device, tokens
            probe = captured(engine, samples, codec, budget, *about, progress) or probe
        with phases.phase("compiling"):
            ready()
        if codec.least_tokens(*shapes):
            show.say(f"learning {codec.name} from the states of {probe.aux.shape[0]:,} tokens")
        learnt = f"{len(samples):,} samples spread over the corpus, {seen:,} tokens"
    out = Calibration.of(probe, codec, learns=job.supplied is None, phases=phases)
    if learnt is not None:
        show.say(f"calibrated on {learnt}, in {time.monotonic() - began:.1f} s ({phases})")
    plan = planning.sized(job.plan, out.size)
    show.say(
        f"size     about {planning.human(plan.bytes or 0)}, measured on {probe.aux.shape[0]:,} "
        "tokens"
    )
    return out
