"""The dump, start to end: plan -> samples -> states -> codes -> parts on disk.

The engine runs and states are encoded in this thread; background threads commit the parts before. A part is on disk whole or not at all, so
whatever stops a dump (Ctrl-C, a full disk, kill -9) loses only what was not committed yet (three parts at most), and ``--resume`` writes the same store as an unbroken run.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.cache.codec import Bf16, Codec, codec_for, field_info, to_numpy
from dspark.cache.errors import DataError, DsparkError, EngineError, ExistsError
from dspark.cache.manifest import DumpInfo, Manifest, SourceInfo, TargetInfo
from dspark.cache.reader import read_manifest
from dspark.cache.recode import snr_db
from dspark.cache.records import CodedSample, TokenSample
from dspark.cache.writer import StoreWriter
from dspark.dump import plan as planning
from dspark.dump.calibrate import calibrate, calibration_samples, centred_as
from dspark.dump.config import DumpConfig
from dspark.dump.corpus import Corpus, TokenRow, open_corpus
from dspark.dump.parts import PartReader, PartRows
from dspark.dump.presets import check_shapes, find
from dspark.dump.progress import log_file
from dspark.dump.selfcheck import PROBE_TOKENS, check, probe_samples
from dspark.dump.target import Target, choose_mask_token, compact, load_target, tokenizer_info
from dspark.dump.tokens import SampleMaker

if TYPE_CHECKING:
    from dspark.cache.part import PartRecord
    from dspark.dump.capture import Engine, States
    from dspark.dump.progress import Bar, Display

log = logging.getLogger("dspark.dump")


# Parts that are compressed and synced at once: one alone leaves cores idle while it waits for the disk.
COMMITS = 2


class Stopped(DsparkError):
    """The dump was interrupted; what is committed is whole."""


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that is settled before weights are read."""

    config: DumpConfig
    plan: planning.Plan
    target: Target
    corpus: Corpus
    maker: SampleMaker
    manifest: Manifest


def plan_only(config: DumpConfig) -> planning.Plan:
    """The plan of ``--dry-run``: no weights; with a preset no network and no tokenizer either."""
    preset = find(config.model)
    if preset is None or Path(config.model).is_dir():
        return prepare(config).plan
    plan = planning.resolve(config, preset, preset.shapes)
    return (
        planning.estimate(plan, open_corpus(plan.data), None, config.limit)
        if Path(plan.data).is_file()
        else plan
    )


def prepare(config: DumpConfig) -> Job:
    """Read config, tokenizer and corpus; check them against one another; estimate the size."""
    preset = find(config.model)
    target = load_target(config.model)
    if preset is not None:
        check_shapes(preset, target.shapes)
    plan = planning.resolve(config, preset, target.shapes)
    corpus = open_corpus(plan.data)
    first = next(corpus.rows(), None)
    tokenised = first is not None and isinstance(first.value, TokenRow)
    maker = SampleMaker(
        target.tokenizer,
        tokenised=tokenised,
        vocab_size=target.shapes.vocab_size,
        seq_length=plan.seq_length,
        min_supervised=config.min_supervised,
        assistant_pattern=plan.assistant_pattern,
        eos_token_ids=target.eos_token_ids,
    )
    plan = planning.estimate(plan, corpus, maker, config.limit)
    mask_token = choose_mask_token(target, config.mask_token_id, preset.mask_token_id if preset else None)
    aux, last = codec_for(config.aux_bits), codec_for(config.last_bits)
    manifest = Manifest(
        target=TargetInfo(
            id=target.id,
            revision=target.revision,
            config=target.config,
            hidden_size=target.shapes.hidden_size,
            vocab_size=target.shapes.vocab_size,
            num_layers=target.shapes.num_layers,
            mask_token_id=mask_token,
            eos_token_ids=target.eos_token_ids,
            weights_sha256="",
        ),
        layers=list(plan.layers),
        aux=field_info(aux),
        last=field_info(last),
        tokenizer=tokenizer_info(target, tokenised),
        source=SourceInfo(id=corpus.id, sha256=corpus.sha256, limit=config.limit),
        dump=DumpInfo(
            engine=plan.engine,
            engine_version=planning.engine_version(plan.engine),
            dtype=plan.dtype,
            seq_length=plan.seq_length,
            min_supervised=config.min_supervised,
            assistant_pattern=None if tokenised else plan.assistant_pattern,
            mask_rule=maker.mask_rule,
            part_tokens=config.part_tokens,
        ),
    )
    return Job(config, plan, target, corpus, maker, manifest)


def load_engine(plan: planning.Plan, batch_tokens: int | None) -> Engine:
    """Start the engine the plan names."""
    if plan.engine == "vllm":
        from dspark.dump.engine_vllm import VllmEngine

        return VllmEngine.load(
            plan.model,
            plan.shapes,
            plan.layers,
            dtype=plan.dtype,
            seq_length=plan.seq_length,
            spool=Path(plan.output + ".spool"),
            batch_tokens=batch_tokens,
        )
    from dspark.dump.engine_transformers import TransformersEngine

    return TransformersEngine.load(
        plan.model,
        plan.shapes,
        plan.layers,
        device=plan.device,
        dtype=plan.dtype,
        batch_tokens=batch_tokens or (16384 if plan.device == "cuda" else 2048),
    )


def dump(
    config: DumpConfig, show: Display, engine_for: Callable[[planning.Plan, int | None], Engine] = load_engine
) -> dict[str, Any]:
    """Run the whole dump; returns the report that ``--json`` prints."""
    began = time.monotonic()
    resuming = config.resume and config.output.exists()
    if config.output.exists() and not (resuming or config.overwrite):
        raise ExistsError(
            f"{config.output} exists. Use --resume to go on with it, --overwrite to replace it, or another --output."
        )
    stored = read_manifest(config.output) if resuming else None
    if stored and stored.complete:
        show.say(
            f"{config.output} is complete ({stored.counts.samples:,} samples, {stored.counts.tokens:,} tokens): nothing to resume."
        )
        return report(config.output, stored, time.monotonic() - began, 0)
    # Everything that can be refused without weights is refused before they are loaded.
    job = prepare(config)
    with log_file(config.output.with_name(config.output.name + ".log")):
        for line in job.plan.lines():
            show.say(line)
        if stored:
            job = dataclasses.replace(job, manifest=centred_as(job.manifest, stored))
        writer = StoreWriter.resume(config.output, job.manifest) if stored else None
        done = sum(r.tokens for r in writer.committed.values()) if writer else 0
        if writer:
            show.say(f"resuming: {len(writer.committed)} parts with {done:,} tokens are there")
        planning.check_disk(job.plan, done)
        probe = first_samples(job)
        engine = engine_for(job.plan, config.batch_tokens)
        try:
            manifest, new_tokens = run_engine(job, engine, probe, writer, show)
        finally:
            engine.close()
        out = report(config.output, manifest, time.monotonic() - began, new_tokens)
        for line in summary(out):
            show.say(line)
        return out


def run_engine(
    job: Job, engine: Engine, probe: Sequence[TokenSample], writer: StoreWriter | None, show: Display
) -> tuple[Manifest, int]:
    """Check the engine, then capture what is missing; returns the finished manifest and the number of tokens captured."""
    config = job.config
    frozen = engine.frozen()
    agreement, states = check(engine, probe, frozen, job.plan.dtype)
    show.say(
        f"self-check passed: states and engine agree at {agreement.agree:.1%} of {agreement.positions} positions "
        f"(largest log-probability difference {agreement.worst:.2g})"
    )
    if writer is None:
        aux, last = calibrated_codecs(job, engine, probe, show)
        manifest = dataclasses.replace(job.manifest, aux=field_info(aux), last=field_info(last))
        writer = StoreWriter.create(
            config.output, manifest, compact(frozen), job.target.files, overwrite=config.overwrite
        )
    codecs = writer.codecs
    quality = measure([states[i] for i in sorted(states)], *codecs)
    with writer:
        reader = part_reader(job, config.part_tokens, log.info)
        tail, new_tokens = write_parts(writer, reader, engine, codecs, show, job.plan.rows)
        reader.check_dropped(at_end=True)
        return writer.finish(rows_read=reader.rows_read, dropped=tail.dropped, quality=quality), new_tokens


def calibrated_codecs(
    job: Job, engine: Engine, probe: Sequence[TokenSample], show: Display
) -> tuple[Codec, Codec]:
    """The codecs of a new store, centred on states from all over the corpus (on the first ones if every row picked was dropped)."""
    plain = codec_for(job.config.aux_bits), codec_for(job.config.last_bits)
    if all(isinstance(c, Bf16) for c in plain):
        return plain
    began = time.monotonic()
    assert job.plan.rows is not None
    assert job.plan.tokens is not None
    samples = calibration_samples(job.corpus, job.maker, job.plan.rows, job.plan.tokens) or list(probe)
    codecs = calibrate(engine, samples, plain)
    show.say(
        f"calibrated on {len(samples):,} samples spread over the corpus, {sum(len(s.input_ids) for s in samples):,} tokens, "
        f"in {time.monotonic() - began:.1f} s"
    )
    return codecs


def part_reader(job: Job, part_tokens: int, note: Callable[[str], None]) -> PartReader:
    return PartReader(
        job.corpus,
        job.maker,
        part_tokens=part_tokens,
        limit=job.config.limit,
        max_dropped=job.config.max_dropped,
        note=note,
    )


def first_samples(job: Job) -> list[TokenSample]:
    """The first samples of the corpus: what the self-check and the measured quality are taken from, in every run of this store alike."""
    reader = part_reader(job, PROBE_TOKENS, log.debug)
    part = next(reader.parts({}))
    if not part.samples:
        reader.check_dropped(at_end=True)
        raise DataError(
            f"{job.corpus.id}: no row of {reader.rows_read:,} gave a sample: {dict(part.dropped)}."
        )
    return probe_samples(part.samples)


def write_parts(
    writer: StoreWriter,
    reader: PartReader,
    engine: Engine,
    codecs: tuple[Codec, Codec],
    show: Display,
    rows: int | None,
) -> tuple[PartRows, int]:
    """Capture and commit every part that is missing; returns the tail of the corpus and the number of tokens written."""
    committed = dict(writer.committed)
    pending: deque[Future[PartRecord]] = deque()
    new_tokens = 0
    with ThreadPoolExecutor(COMMITS, thread_name_prefix="commit") as pool, show.progress(rows) as bar:
        try:
            for part in reader.parts(committed):
                if not part.samples:
                    settle(pending, 0)
                    return part, new_tokens
                samples = capture_part(part, engine, codecs, bar)
                settle(
                    pending, COMMITS - 1
                )  # their errors, if they had any; and no more parts in memory than commits, plus one
                pending.append(
                    pool.submit(
                        writer.commit,
                        part.index,
                        samples,
                        row_start=part.row_start,
                        row_stop=part.row_stop,
                        dropped=part.dropped,
                        truncated=part.truncated,
                    )
                )
                new_tokens += part.tokens
                bar.part(part.index, part.row_stop)
        except KeyboardInterrupt as error:
            show.say("stopping: the part in work is given up, the ones before it are being committed")
            settle(pending, 0)
            raise Stopped(
                f"stopped; {len(writer.committed)} parts are whole in {writer.path}. Go on with the same command and --resume."
            ) from error
    raise AssertionError("the reader ends with a tail")


def settle(pending: deque[Future[PartRecord]], leave: int) -> None:
    """Wait for the oldest commits until ``leave`` are under way; raises what they raised."""
    while len(pending) > leave:
        pending.popleft().result()


def capture_part(part: PartRows, engine: Engine, codecs: tuple[Codec, Codec], bar: Bar) -> list[CodedSample]:
    """The part's samples with their coded states, in row order."""
    aux, last = codecs
    coded: list[CodedSample | None] = [None] * len(part.samples)
    for i, states in engine.capture(part.samples):
        sample = part.samples[i]
        coded[i] = CodedSample(sample, to_numpy(aux.encode(states.aux)), to_numpy(last.encode(states.last)))
        bar.tokens(len(sample.input_ids))
    whole = [c for c in coded if c is not None]
    if len(whole) != len(coded):
        raise EngineError(
            f"the {engine.name} engine gave states for {len(whole)} of {len(coded)} samples of part {part.index}."
        )
    return whole


def measure(states: Sequence[States], aux: Codec, last: Codec) -> dict[str, Any]:
    """What the stored code loses, measured on the first samples: SNR in dB a layer and of the last state (None: nothing lost)."""
    import torch

    with torch.inference_mode():
        a = torch.cat([s.aux for s in states])
        b = torch.cat([s.last for s in states])
        hidden = a.shape[-1]
        return {
            "tokens": a.shape[0],
            "aux_snr_db": [
                snr_db(a[:, i], aux.decode(aux.encode(a), hidden)[:, i]) for i in range(a.shape[1])
            ],
            "last_snr_db": snr_db(b, last.decode(last.encode(b), hidden)),
        }


def report(output: Path, manifest: Manifest, seconds: float, new_tokens: int) -> dict[str, Any]:
    """What the command says at the end."""
    return {
        "output": str(output),
        "complete": manifest.complete,
        **dataclasses.asdict(manifest.counts),
        "layers": manifest.layers,
        "target_layer_ids": manifest.target_layer_ids,
        "engine": manifest.dump.engine,
        "quality": manifest.quality,
        "seconds": round(seconds, 2),
        "new_tokens": new_tokens,
    }


def summary(out: dict[str, Any]) -> list[str]:
    """The report for a person: what is there, what was cut, what was dropped and why."""
    rate = f", {out['new_tokens'] / out['seconds']:,.0f} a second in all" if out["new_tokens"] else ""
    return [
        f"{out['output']}: {out['samples']:,} samples, {out['tokens']:,} tokens ({out['supervised_tokens']:,} supervised{rate}) in "
        f"{out['parts']:,} parts; {out['truncated']:,} truncated, {sum(out['dropped'].values()):,} of {out['rows_read']:,} rows dropped",
        *(f"  dropped: {reason}: {n:,}" for reason, n in out["dropped"].items()),
    ]
