"""``dspark-dump --measure``: the plan with a time and a size that were measured. The target is
read, checked and calibrated on as a dump does it, and then a dump of some rows is timed, into a
store that is removed again.
"""

from __future__ import annotations

import dataclasses
import io
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from dspark.cache.codec.base import axis_of
from dspark.cache.errors import DataError
from dspark.cache.files.layout import PARTS, PLAIN_ARRAYS
from dspark.cache.files.place import place_of
from dspark.cache.files.urls import Url, beside
from dspark.cache.stored_manifest import read_manifest
from dspark.dump.committing import Written
from dspark.dump.corpus.rows import FirstRows
from dspark.dump.job import Job, first_samples, load_engine, prepare, tokenisers
from dspark.dump.pace import Pace
from dspark.dump.progress import Display
from dspark.dump.regenerate.conversations import PART_ROWS, Prompts
from dspark.dump.run import run_engine
from dspark.dump.writing.writers import writers

if TYPE_CHECKING:
    from dspark.cache.records import TokenSample
    from dspark.dump.config import DumpConfig
    from dspark.dump.corpus.rows import Corpus, Row
    from dspark.dump.engines.engine import Engine
    from dspark.dump.plan import Plan

# Of a first trial. On a CPU it takes seconds; a GPU needs more of them to be busy.
TRIAL_TOKENS = 8192
TRIAL_ANSWERS = {"cpu": 4, "cuda": PART_ROWS}  # rows; a dump answers a part's rows at once
ENOUGH_SECONDS = 5.0  # a trial shorter than this is made again, longer
MOST_TRIALS = 3
UNSEEN = Display(Console(file=io.StringIO()))  # of a trial; its calibration has a bar of its own


class Every:
    """Every ``step``-th row of a corpus, numbered anew: a small corpus that is spread over all of
    it.
    """

    def __init__(self, whole: Corpus, step: int) -> None:
        self.whole, self.step = whole, step
        self.id, self.sha256 = whole.id, whole.sha256

    def takes(self, number: int) -> bool:
        return number % self.step == self.step // 2

    def count(self) -> int:
        return sum(map(self.takes, range(self.whole.count())))

    def weights(self) -> list[int]:
        return [w for n, w in enumerate(self.whole.weights()) if self.takes(n)]

    def rows(self, start: int = 0) -> Iterator[Row]:
        return self.pick(lambda n: n >= start)

    def pick(self, wanted: Callable[[int], bool]) -> Iterator[Row]:
        for i, row in enumerate(self.whole.pick(self.takes)):
            if wanted(i):
                yield dataclasses.replace(row, number=i)


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """A dump of some rows: how many, its tokens and stored last states, its bytes by what they grow
    with, and its seconds.
    """

    rows: int
    tokens: int
    last_rows: int
    seconds: float
    token_bytes: int  # of arrays with a row per token
    last_bytes: int  # of those with a row per stored last state
    sample_bytes: int  # of those with a row per sample, and of the index
    parts: int
    part_bytes: int  # metadata of the parts
    fixed_bytes: int  # target, calibration, the store's own metadata

    def size(self, plan: Plan) -> int:
        """Bytes of the whole store of ``plan``."""
        assert plan.rows is not None
        assert plan.tokens is not None
        assert plan.last_rows is not None
        parts = -(-plan.rows // (plan.block_rows or 1))
        return round(
            self.fixed_bytes
            + self.part_bytes / self.parts * parts
            + self.sample_bytes / self.rows * plan.rows
            + self.token_bytes / self.tokens * plan.tokens
            + self.last_bytes / max(self.last_rows, 1) * plan.last_rows
        )


def measure(
    config: DumpConfig,
    show: Display,
    engine_for: Callable[[Plan, int | None], Engine] = load_engine,
) -> Plan:
    """The plan of ``config`` with its pace and size measured. Nothing stays on disk."""
    began = time.monotonic()
    job = prepare(config)
    probe = first_samples(job)
    engine = engine_for(job.plan, config.batch_tokens)
    loaded = time.monotonic() - began
    trial, before = None, 0.0
    try:
        rows = first_rows(job)
        for _ in range(MOST_TRIALS):
            show.say(f"timing a dump of about {rows:,} rows, which is removed again")
            trial, before = tried(job, rows, engine, probe, UNSEEN)
            if trial.seconds >= ENOUGH_SECONDS or trial.rows >= (job.plan.rows or 0):
                break
            rows = round(rows * 1.5 * ENOUGH_SECONDS / max(trial.seconds, 0.01))
    finally:
        engine.close()
    assert trial is not None
    return with_trial(job.plan, trial, loaded + before)


def with_trial(plan: Plan, trial: Trial, before: float) -> Plan:
    """``plan`` with what a ``trial`` says of it; ``before``: seconds until a first part."""
    rate = trial.tokens / max(trial.seconds, 1e-6)
    pace = Pace(
        tokens=rate, answers=rate, before=before, why=f"measured on {trial.tokens:,} tokens"
    )
    if plan.answer_tokens:  # how long the target's answers are is known only now
        assert plan.rows is not None
        share = plan.rows / trial.rows
        last = round(trial.last_rows * share)
        plan = dataclasses.replace(
            plan, tokens=round(trial.tokens * share), last_rows=last, answer_tokens=last
        )
    return dataclasses.replace(plan, measured=pace, bytes=trial.size(plan))


def first_rows(job: Job) -> int:
    """Rows of the first trial."""
    plan = job.plan
    assert plan.rows is not None
    assert plan.tokens is not None
    if isinstance(job.maker, Prompts):
        return min(TRIAL_ANSWERS.get(plan.device, PART_ROWS), plan.rows)
    return max(round(TRIAL_TOKENS * plan.rows / max(plan.tokens, 1)), 1)


def tried(
    job: Job, rows: int, engine: Engine, probe: list[TokenSample], show: Display
) -> tuple[Trial, float]:
    """Dump about ``rows`` rows spread over the corpus; returns the trial, and the seconds before
    its first part.
    """
    assert job.plan.rows is not None
    step = max(job.plan.rows // rows, 1)
    limit = job.config.limit
    sources = tuple(Every(c if limit is None else FirstRows(c, limit), step) for c in job.sources)
    with scratch(job.config) as output, ExitStack() as stack:
        config = dataclasses.replace(job.config, output=output, overwrite=False, shard=None)
        chosen = sum(map(sources[0].takes, range(job.plan.rows)))  # whatever source they are of
        small = dataclasses.replace(
            job,
            config=config,
            sources=sources,
            chosen_rows=chosen,
            plan=dataclasses.replace(job.plan, free_bytes=None),  # too little is said, not refused
        )
        make, write = tokenisers(small), writers(job.plan.workers)
        for processes in (make, write):
            if processes is not None:
                stack.callback(processes.close)
        began = time.monotonic()
        _, written = run_engine(small, engine, probe, None, show, make, write)
        before = time.monotonic() - began - written.seconds
        return of_store(output, written), before


def of_store(path: Path, written: Written) -> Trial:
    """What the finished store at ``path`` says of a larger one."""
    counts = read_manifest(path).counts
    if not counts.tokens:
        raise DataError(
            f"no token in {counts.rows_read:,} rows to measure with: {dict(counts.dropped)}."
        )
    by_axis = {"token": 0, "last": 0, "sample": 0, "part": 0, "fixed": 0}
    for name, size in place_of(path).sizes("").items():
        by_axis[_grows_with(name)] += size
    return Trial(
        rows=counts.rows_read,
        tokens=counts.tokens,
        last_rows=counts.last_rows,
        seconds=written.seconds,
        token_bytes=by_axis["token"],
        last_bytes=by_axis["last"],
        sample_bytes=by_axis["sample"],
        parts=counts.parts,
        part_bytes=by_axis["part"],
        fixed_bytes=by_axis["fixed"],
    )


def _grows_with(name: str) -> str:
    """What the size of file ``name`` of a store grows with."""
    folder, _, rest = name.partition("/")
    if folder == "index":
        return "sample"
    if folder != PARTS or rest.count("/") < 1:
        return "fixed"
    array = rest.split("/")[1]
    if name.endswith("zarr.json"):
        return "part"
    if array.startswith("sample_"):
        return "sample"
    if array in PLAIN_ARRAYS:
        return "token"
    return "last" if axis_of(array) == "last" else "token"


@contextmanager
def scratch(config: DumpConfig) -> Iterator[Path]:
    """A store's path on the disk of ``--output``, and nothing there afterwards; on this machine's
    own for a store in a bucket.
    """
    output = config.output
    parent = None if isinstance(output, Url) else beside(output, "").resolve().parent
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".measure-", dir=parent))
    try:
        yield folder / "hs.zarr"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
