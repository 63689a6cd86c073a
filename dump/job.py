"""A dump before its engine runs: what config, tokenizer and corpus determine, and how rows are
read. Only ``load_engine`` reads weights.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.cache.errors import DataError, TargetError
from dspark.cache.files.calibration import Supplied, codec_info
from dspark.cache.manifest import DumpInfo, Manifest, SourceInfo
from dspark.cache.records import TokenSample
from dspark.cache.target.shape import shape_for
from dspark.dump import plan as planning
from dspark.dump.checks.states import PROBE_TOKENS, probe_samples
from dspark.dump.config import DumpConfig, template_keywords
from dspark.dump.corpus.masks import SampleMaker
from dspark.dump.corpus.parts import Making, PartReader, SourcesReader
from dspark.dump.corpus.reading import RowsProcess
from dspark.dump.corpus.rows import BadRow, Corpus, Row, is_read_by_lines
from dspark.dump.corpus.shapes import TokenRow
from dspark.dump.corpus.sources import joined, open_corpus
from dspark.dump.corpus.template import today
from dspark.dump.corpus.tokenise import Tokenisers
from dspark.dump.engines import registry
from dspark.dump.engines.answers import recommended
from dspark.dump.engines.engine import EngineRun
from dspark.dump.progress import Display
from dspark.dump.regenerate import conversations
from dspark.dump.regenerate.conversations import Prompts
from dspark.dump.target import chain
from dspark.dump.target.config import Target, load_target, target_info, tokenizer_info
from dspark.dump.target.loading import weight_bytes
from dspark.dump.target.presets import check_shapes, find
from dspark.dump.target.weights import find_frozen

if TYPE_CHECKING:
    from dspark.dump.engines.engine import Engine

log = logging.getLogger("dspark.dump")

# a corpus shorter than this is tokenised before worker processes would have started
PROCESS_ROWS = 2000


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that is settled before weights are read."""

    config: DumpConfig
    plan: planning.Plan
    target: Target
    corpus: Corpus  # all sources together
    maker: SampleMaker
    manifest: Manifest
    sources: tuple[Corpus, ...]
    supplied: Supplied | None = None  # the codec's calibration, made elsewhere
    chosen_rows: int | None = None  # that ``sources`` are cut to, of the plan's

    @property
    def rows(self) -> int | None:
        """Source rows that are read, of all sources."""
        return self.plan.rows if self.chosen_rows is None else self.chosen_rows


def plan_only(config: DumpConfig) -> planning.Plan:
    """Make the plan of ``--dry-run``: no weights; with a preset, no network and no tokenizer
    either. Raises BrokenChain. A corpus is read if one is named and is local; without one, sizes
    are per million tokens.
    """
    preset = find(config.model)
    named = config.sources or ((preset.data,) if preset and preset.data else ())
    if named and (preset is None or Path(config.model).is_dir()):
        return prepare(config).plan
    plan = plan_target(config)
    if named and all(Path(name).is_file() for name in named):
        plan = planning.estimate(
            plan, joined([open_corpus(n) for n in named], config.limit), None, None
        )
    return planning.settle_codec(plan, config, supplied(config))


def supplied(config: DumpConfig) -> Supplied | None:
    """Read the calibration that ``--calibration`` names."""
    return None if config.calibration is None else Supplied.read(config.calibration)


def plan_target(config: DumpConfig, *, whole: bool = True) -> planning.Plan:
    """Make the plan as far as the target determines it, with its chain. Raises BrokenChain if a
    link is missing and the chain must be ``whole``.
    """
    preset = find(config.model)
    if preset is None or Path(config.model).is_dir():
        return _examined(config, checked_target(config), whole)
    plan = planning.resolve(config, preset, preset.shapes)
    return with_chain(
        plan, preset.config, [preset.config.get("model_type")], None, preset.weight_bytes, whole
    )


def _examined(config: DumpConfig, target: Target, whole: bool = True) -> planning.Plan:
    preset = find(config.model)
    if preset is not None:
        check_shapes(preset, target.shapes)
    plan = planning.resolve(config, preset, target.shapes, target.whole.architectures or ())
    plan = dataclasses.replace(plan, file_bytes=sum(map(len, target.files.values())))
    size: int | None = None

    def frozen() -> str:
        nonlocal size
        found = find_frozen(config.model, target.shapes, target.whole)
        size = found.size(target.shapes, plan.dtype)
        return str(found)

    chained = with_chain(
        plan,
        target.config,
        [getattr(target.whole, "model_type", None), target.config.get("model_type")],
        frozen,
        weight_bytes(config.model),
        whole,
    )
    return dataclasses.replace(chained, frozen_bytes=size)


def with_chain(
    plan: planning.Plan,
    config: Mapping[str, Any],
    model_types: Sequence[str | None],
    frozen: Callable[[], str] | None,
    weights: int | None,
    whole: bool,
) -> planning.Plan:
    """Return ``plan`` with its chain. Raises BrokenChain if a link is missing and the chain must be
    ``whole``.
    """
    links = chain.examine(
        config=config,
        model_types=model_types,
        shapes=plan.shapes,
        layers=plan.layers,
        engine=plan.engine,
        version=registry.engine_version(plan.engine),
        frozen=frozen,
    )
    if whole:
        chain.require(links)
    sized = any(link.name == "draft" and link.state == chain.FOUND for link in links)
    draft = dataclasses.asdict(shape_for(config)) if sized else None
    return dataclasses.replace(plan, chain=links, draft=draft, weights=weights)


def checked_target(config: DumpConfig) -> Target:
    """Read the target's config and tokenizer. Raises BrokenChain if they are not a language
    model's.
    """
    try:
        return load_target(config.model, config.trust_remote_code)
    except TargetError as error:
        raise chain.BrokenChain([chain.Link("config", chain.MISSING, str(error))]) from error


def first_good(corpus: Corpus) -> Row | None:
    """Return the first row that is not malformed; None for an empty corpus. Raises the first row's
    DataError if all are malformed.
    """
    bad = None
    for row in corpus.rows():
        if not isinstance(row.value, BadRow):
            return row
        bad = bad or row.value
    if bad is not None:
        raise DataError(bad.detail)
    return None


def prepare(config: DumpConfig, day: str | None = None) -> Job:
    """Read config, tokenizer and corpus; check them against one another; estimate the size.
    ``day``: the date that a resumed store has fixed for a template that writes one.
    """
    preset = find(config.model)
    target = checked_target(config)
    plan = _examined(config, target)
    corpora = [open_corpus(data) for data in planning.data_of(plan)]
    corpus = joined(corpora, config.limit)
    first = first_good(corpus)
    tokenised = first is not None and isinstance(first.value, TokenRow)
    maker: SampleMaker
    day = day or today()
    keywords = template_keywords(config.template_kwargs)
    if config.regenerate:
        sampling = recommended(
            config.model,
            config.temperature,
            config.top_p,
            config.max_tokens,
            config.thinking,
            config.answers or 1,
        )
        maker = Prompts(
            target.tokenizer, sampling, plan.seq_length, template_kwargs=keywords, day=day
        )
    else:
        maker = SampleMaker(
            target.tokenizer,
            tokenised=tokenised,
            vocab_size=target.shapes.vocab_size,
            seq_length=plan.seq_length,
            min_supervised=config.min_supervised,
            assistant_pattern=plan.assistant_pattern,
            turns=config.turns,
            template_kwargs=keywords,
            day=day,
        )
    plan = planning.estimate(plan, corpus, maker, None)
    if len(corpora) > 1:
        counts = [min(c.count(), config.limit or c.count()) for c in corpora]
        plan = dataclasses.replace(
            plan, sources=tuple(zip((c.id for c in corpora), counts, strict=True))
        )
    if isinstance(maker, Prompts):
        plan = planning.with_answers(plan, maker.sampling.max_tokens, maker.sampling.answers)
    given = supplied(config)
    plan = planning.settle_codec(plan, config, given, target.config)
    there = planning.blocks_of(given, config.part_tokens)
    plan = planning.blocks(plan, conversations.PART_ROWS if isinstance(maker, Prompts) else there)
    assert plan.block_rows is not None
    manifest = Manifest(
        target=target_info(target, config.mask_token_id, preset),
        layers=list(plan.layers),
        codec=dataclasses.replace(
            codec_info(plan.make_codec()), calibration_sha256=given.sha256 if given else None
        ),
        tokenizer=tokenizer_info(target, tokenised),
        sources=[SourceInfo(id=c.id, sha256=c.sha256, limit=config.limit) for c in corpora],
        dump=DumpInfo(
            engine=plan.engine,
            engine_version=registry.engine_version(plan.engine),
            dtype=plan.dtype,
            seq_length=plan.seq_length,
            min_supervised=config.min_supervised,
            assistant_pattern=None if tokenised else plan.assistant_pattern,
            mask_rule=maker.mask_rule,
            block_rows=plan.block_rows,
            turns=config.turns,
            template_kwargs=keywords,
            template_date=None if tokenised or not maker.template.dated else day,
        ),
    )
    return Job(config, plan, target, corpus, maker, manifest, tuple(corpora), given)


def load_engine(plan: planning.Plan, batch_tokens: int | None) -> Engine:
    """Start the engine the plan names, with room beside it for learning the codec."""
    shapes = plan.shapes
    fitting = plan.make_codec().fitting_bytes(
        len(plan.layers), shapes.hidden_size, shapes.vocab_size
    )
    run = EngineRun(
        model=plan.model,
        shapes=plan.shapes,
        layers=plan.layers,
        device=plan.device,
        dtype=plan.dtype,
        seq_length=plan.seq_length,
        spool=Path(plan.spool),
        batch_tokens=batch_tokens,
        options=plan.engine_options,
        say=Display().say,
        leave=fitting if plan.calibration_tokens and not plan.calibration else 0,
        answers=plan.answer_tokens > 0,
    )
    return registry.load_engine(plan.engine, run)


def all_parts(part: int) -> bool:
    """Tell that every part is to be made."""
    return True


def part_reader(
    job: Job, note: Callable[[str], None], make: Making | None = None, source: int = 0
) -> PartReader:
    """Return the reader of source number ``source``."""
    return PartReader(
        job.sources[source],
        job.maker,
        block_rows=job.manifest.dump.block_rows,
        limit=job.config.limit,
        max_dropped=job.config.max_dropped,
        source=source,
        note=note,
        make=make,
        takes=job.config.part_of.takes if job.config.part_of else all_parts,
    )


def sources_reader(
    job: Job, note: Callable[[str], None], make: Making | RowsProcess | None = None
) -> SourcesReader:
    """Return the reader of all sources."""
    numbers = range(len(job.sources))
    if isinstance(make, RowsProcess):
        return make.reader([part_reader(job, note, None, n) for n in numbers])
    return SourcesReader([part_reader(job, note, make, n) for n in numbers])


def first_samples(job: Job) -> list[TokenSample]:
    """Return the first samples of the corpus, which the self-check and the measured quality use,
    the same in every run of this store.
    """
    samples: list[TokenSample] = []
    dropped: Counter[str] = Counter()
    tokens = read = 0
    for row in job.corpus.rows():
        made = job.maker.make(row)
        read += 1
        samples += made.samples
        tokens += sum(len(s.input_ids) for s in made.samples)
        if made.dropped:
            dropped[made.dropped] += 1
            log.debug("%s: dropped: %s (%s)", row.where, made.dropped, made.detail)
        if tokens >= PROBE_TOKENS:
            break
    if not samples:
        raise DataError(f"{job.corpus.id}: none of {read:,} rows gave a sample: {dict(dropped)}.")
    return probe_samples(samples)


def tokenisers(job: Job) -> Tokenisers | RowsProcess | None:
    """Start processes that turn rows into samples, if the corpus is long enough to need them, and
    one that reads them, if it can.
    """
    short = job.plan.rows is not None and job.plan.rows < PROCESS_ROWS
    if not job.plan.workers or short or isinstance(job.maker, Prompts):
        return None
    apart = all(is_read_by_lines(corpus) for corpus in job.sources)
    return (RowsProcess if apart else Tokenisers)(job.maker, job.plan.workers)
