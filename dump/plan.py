"""The plan: everything a dump decides before it starts; it is printed, and checked against the free
disk space.

With a preset, a plan needs neither network nor weights. Estimates come from the corpus itself: rows
are counted, a spread of them is tokenised.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dspark.cache.errors import DataError, MismatchError, StoreWriteError, UsageError
from dspark.cache.files.urls import beside, where
from dspark.cache.records import last_rows
from dspark.cache.repeats import Repeats
from dspark.cache.settings import DEFAULT_PACKING, FALLBACK
from dspark.cache.shared.command import duration
from dspark.cache.target import taps
from dspark.dump.config import DEFAULT_SEQ_LENGTH, DumpConfig
from dspark.dump.engines.options import NO_OPTIONS, EngineOptions
from dspark.dump.engines.registry import choose_dtype, choose_engine, engine_kind
from dspark.dump.pace import Pace, stated
from dspark.dump.shard import Shard
from dspark.dump.target.layers import Shapes, check_layers
from dspark.dump.target.presets import Preset
from dspark.dump.workers import default_workers

if TYPE_CHECKING:
    from dspark.cache.codec.base import Codec
    from dspark.cache.files.calibration import Supplied
    from dspark.cache.sizing import RowBytes
    from dspark.dump.corpus.masks import SampleMaker
    from dspark.dump.corpus.rows import Corpus
    from dspark.dump.target.chain import Link

METADATA = 13_000, 21_000, 50  # bytes of a store, of each part, of each sample
# rows tokenised for the estimate: half a second; 128 of them, scaled by rows, were 10 % off on
# 18,438 chats
SPREAD_ROWS = 512
PART_BYTES = (
    512 << 20
)  # of states in memory, of a part on a GPU: long enough to batch well, short enough to lose
PART_TOKENS = (8192, 262144)
BLOCK_ROWS = 1 << 16  # of a part, at most
CPU_PART_TOKENS = 32768  # a CPU takes a minute or more for so many
GPU_BYTES = 80e9  # of the GPUs that a plan counts in
WEIGHTS_SHARE = 0.8  # of a GPU's memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What will be done. ``bytes_per_token``: expected on disk if the last state were stored for
    every token; ``bytes``: with the share for which it is.
    """

    model: str
    preset: str | None
    data: tuple[str, ...]  # one per source; empty = not named yet, which only a dry run allows
    output: str
    engine: str
    device: str
    dtype: str
    shapes: Shapes
    layers: tuple[int, ...]
    drafts: dict[str, tuple[int, ...]]  # drafter type -> which of the layers it reads
    seq_length: int
    codec: str  # full name
    pack: str
    assistant_pattern: str | None
    bytes_per_token: int
    free_bytes: int | None  # None: unknown, as for an object store
    part_tokens: int
    workers: int
    engine_options: EngineOptions = NO_OPTIONS
    engine_why: str | None = None  # why this engine, and not the one that auto prefers
    confirmed: bool = True
    rows: int | None = None
    tokens: int | None = None
    bytes: int | None = None
    last_rows: int | None = None  # stored last states
    repeats: Repeats | None = None  # of the rows looked at
    chain: tuple[Link, ...] = ()  # from the target to a served draft
    draft: dict[str, Any] | None = None  # shape of a draft's layers, as training derives it
    weights: int | None = None  # bytes of the target's weights
    looked_at: int = 0  # rows made into samples for the plan
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)  # of them, by reason
    # what the samples of the others lack
    notes: dict[str, int] = dataclasses.field(default_factory=dict)
    block_rows: int | None = None  # source rows per part
    sources: tuple[tuple[str, int], ...] = ()  # name and rows of each, where there are several
    codec_why: str | None = None  # this one, and not the default
    calibration_tokens: int = 0  # whose states the codec learns from
    calibration_bytes: int = 0  # of host memory that they take
    calibration: str | None = None  # the file that it has learnt from instead
    shard: str | None = None  # of several dumps, this one
    file_bytes: int = 0  # of the target's tokenizer and template, which every store keeps
    frozen_bytes: int | None = None  # of embedding and head as stored; None: not looked at
    answer_tokens: int = 0  # of the tokens, those that the target is to generate
    measured: Pace | None = None  # None: a rate is stated

    @property
    def pace(self) -> Pace:
        """How fast this goes: measured, or stated with its source."""
        return self.measured or stated(self.device, self.weights)

    @property
    def seconds(self) -> float | None:
        """Of the whole dump; None where tokens or rate are not known."""
        if self.tokens is None:
            return None
        return self.pace.seconds(self.tokens, self.answer_tokens, self._learns_from(self.tokens))

    def _learns_from(self, tokens: int) -> int:
        """Of ``tokens``, those that the codec sees before the first part."""
        from dspark.cache.quality import budget_of

        codec = self.make_codec()
        if self.calibration or not codec.needs_calibration:
            return 0
        budget = budget_of(codec, len(self.layers), self.shapes.hidden_size, tokens)
        return min(self.calibration_tokens or budget, tokens)

    @property
    def fits(self) -> bool | None:
        """Whether the store fits the free space; None where one of them is not known."""
        if self.bytes is None or self.free_bytes is None:
            return None
        return self.bytes <= self.free_bytes

    @property
    def spool(self) -> str:
        """Return the folder for files exchanged between a vLLM worker and this dump."""
        suffix = Shard.parse(self.shard).suffix(".spool") if self.shard else ".spool"
        return str(beside(where(self.output), suffix))

    def make_codec(self) -> Codec:
        """Make the store's codec, not yet calibrated."""
        from dspark.cache.codec import registry

        return registry.make(self.codec, self.pack)

    @property
    def target_layer_ids(self) -> list[int]:
        return [i + 1 for i in self.layers]

    def to_json(self) -> dict[str, Any]:
        out = dataclasses.asdict(self)
        out["target_layer_ids"] = self.target_layer_ids
        out["data"] = ", ".join(self.data) or None
        out["aux_bits"], out["last_bits"] = self.make_codec().bits
        out["pace"] = dataclasses.asdict(self.pace)
        out["fixed_bytes"] = fixed_bytes(self)
        out["repeats"] = self.repeats._asdict() if self.repeats else None
        return out | {"seconds": self.seconds, "fits": self.fits}

    def lines(self) -> list[str]:
        """Return the lines to print before the run."""
        size = "unknown" if self.bytes is None else f"about {human(self.bytes)}"
        if self.tokens is None:
            size += f", {human(1e6 * self.bytes_per_token)} per million tokens"
        rows = "unknown" if self.rows is None else f"{self.rows:,}"
        tokens = "unknown" if self.tokens is None else f"about {self.tokens:,}"
        return [
            f"target   {self.model}"
            + (
                f" (preset {self.preset}{'' if self.confirmed else ', shapes not confirmed'})"
                if self.preset
                else ""
            )
            + f": {self.shapes.num_layers} layers, hidden {self.shapes.hidden_size}, "
            f"vocabulary {self.shapes.vocab_size}",
            f"layers   --layers {','.join(map(str, self.layers))} (output of layer i) "
            f"= --target-layer-ids {','.join(map(str, self.target_layer_ids))} (entering layer "
            "i+1), and the last state after the final norm",
            *self._drafts(),
            f"data     {', '.join(self.data) or 'none named (--data)'}: rows {rows}, tokens "
            f"{tokens}, at most {self.seq_length} per row",
            f"engine   {self.engine}, {self.dtype} on {self.device}"
            + (f" ({self.engine_why})" if self.engine_why else "")
            + self._gpus(),
            f"store    {self.output}: codec "
            f"{self.codec}{', not packed' if self.pack == 'none' else ''}, "
            f"about {self.bytes_per_token:,} bytes per token"
            + (f" ({self.codec_why})" if self.codec_why else ""),
            *(
                f"source   {n}: {name}: {rows:,} rows"
                for n, (name, rows) in enumerate(self.sources)
            ),
            *self._calibration(),
            f"size     {size}{'' if self.measured is None else ', measured'}; {self._free()}"
            + (f"; shard {self.shard} of it" if self.shard else ""),
            f"time     {self._time()}",
            *(
                f"  {what}: {n:,} of {self.looked_at:,} sampled rows"
                for what, n in [
                    *((f"dropped: {r}", n) for r, n in self.dropped.items()),
                    *self.notes.items(),
                ]
            ),
        ]

    def _drafts(self) -> list[str]:
        """Say which layers each type reads, and how to tell the training if its default differs."""
        groups: dict[str, list[str]] = {}
        for kind, layers in self.drafts.items():
            ids = ",".join(map(str, layers))
            own = taps.chosen(kind, self.layers, self.shapes.num_layers) == layers
            groups.setdefault(ids if own else f"{ids} (dspark-train --layers {ids})", []).append(
                kind
            )
        lines = [f"{', '.join(kinds)}: {ids}" for ids, kinds in groups.items()]
        return [f"drafts   {'; '.join(lines)}"] if lines else []

    def _free(self) -> str:
        if self.free_bytes is None:
            return "free space unknown"
        fits = {None: "", True: "fits: ", False: "DOES NOT FIT: "}[self.fits]
        return f"{fits}free {human(self.free_bytes)}"

    def _time(self) -> str:
        """Minutes, hours or days, and what they rest on."""
        pace, answers = self.pace, self.answer_tokens > 0
        if self.tokens is None:
            seconds = pace.seconds(10**6)
            took = "" if seconds is None else f"{duration(seconds)} per million tokens "
        else:
            took = "" if self.seconds is None else f"about {duration(self.seconds)} "
        return took + pace.words(answers)

    def _calibration(self) -> list[str]:
        """Say what the codec is calibrated on, if that is more than a few batches."""
        if self.calibration:
            return [f"codec    calibrated from {self.calibration}"]
        if not self.calibration_bytes:
            return []
        return [
            f"codec    calibrated on {self.calibration_tokens:,} tokens before the first part; "
            f"their states take {human(self.calibration_bytes)} of host memory"
        ]

    def _gpus(self) -> str:
        """Say how many GPUs the weights need, if their size is known."""
        if self.weights is None:
            return ""
        if self.device == "cpu":
            return f"; weights about {human(self.weights)}"
        count = math.ceil(self.weights / (WEIGHTS_SHARE * GPU_BYTES))
        return (
            f"; weights about {human(self.weights)}: {count} GPU{'s' if count > 1 else ''} of "
            f"{human(GPU_BYTES)}"
        )


def resolve(
    config: DumpConfig, preset: Preset | None, shapes: Shapes, architectures: Sequence[str] = ()
) -> Plan:
    """Make every choice that does not need the corpus. ``architectures``: the target's, if its
    config was read.
    """
    from dspark.cache.files.place import place_of

    data = config.sources or ((preset.data,) if preset and preset.data else ())
    layers, drafts = choose_layers(config, preset, shapes)
    engine, device, why = choose_engine(config.engine, config.device, architectures)
    only = config.engine_options.only_vllm(engine)
    if only:
        raise UsageError(f"{only[0]}: {why or f'the {engine} engine has no such option'}. Omit it.")
    bytes_per_token = disk_bytes(shapes, layers, config.make_codec())
    workers = default_workers(device) if config.workers is None else config.workers
    plan = Plan(
        model=config.model,
        preset=preset.name if preset else None,
        data=data,
        output=str(config.output),
        engine=engine,
        device=device,
        dtype=choose_dtype(config.dtype, device),
        shapes=shapes,
        layers=layers,
        drafts=drafts,
        seq_length=choose_length(config, preset, shapes, engine),
        codec=config.codec_name,
        pack=config.pack,
        assistant_pattern=config.assistant_pattern
        or (preset.assistant_pattern if preset else None),
        bytes_per_token=round(bytes_per_token),
        free_bytes=place_of(config.output).free(),
        part_tokens=config.part_tokens or CPU_PART_TOKENS,
        workers=workers,
        engine_options=config.engine_options,
        engine_why=why,
        shard=config.shard,
        confirmed=preset is None or preset.confirmed or shapes != preset.shapes,
    )
    if config.part_tokens is None and device == "cuda":
        plan = dataclasses.replace(
            plan, part_tokens=nearest_power(PART_BYTES / memory_bytes(plan), PART_TOKENS)
        )
    return plan


def choose_layers(
    config: DumpConfig, preset: Preset | None, shapes: Shapes
) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]]]:
    """Choose the layers of the store and, per drafter type, which of them it reads. Raises
    UsageError if a requested type cannot be trained on them.
    """
    count, kinds = shapes.num_layers, config.for_ or ()
    blocks = preset.layers if preset else None
    if kinds and config.asked_layers is None:
        drafts = taps.serving(kinds, count, blocks)
        layers = check_layers(sorted({i for read in drafts.values() for i in read}), count)
    else:
        layers = check_layers(config.asked_layers or blocks or taps.default_layers(count), count)
        drafts = {}
    for kind in kinds or taps.READERS:
        try:
            read = taps.chosen(kind, layers, count)
        except MismatchError as error:
            if kinds:
                raise UsageError(f"--for {kind}: {error}") from error
            continue
        drafts.setdefault(kind, read)
    return layers, drafts


def data_of(plan: Plan) -> tuple[str, ...]:
    """Open the corpora that ``plan`` names. Raises UsageError if it names none."""
    if not plan.data:
        raise UsageError(
            f"--data is needed: no preset names a corpus for {plan.model}. Give a JSONL file or "
            "a data set id."
        )
    return plan.data


def memory_bytes(plan: Plan) -> float:
    """Return the bytes of coded states per token before compression, with the last state at every
    token.
    """
    from dspark.cache.files.layout import stored_bytes_per_token

    return stored_bytes_per_token(len(plan.layers), plan.shapes.hidden_size, plan.make_codec())


def nearest_power(value: float, limits: tuple[int, int]) -> int:
    """Return the power of two nearest to ``value``, within ``limits``."""
    return int(min(max(2 ** round(math.log2(value)), limits[0]), limits[1]))


def choose_length(config: DumpConfig, preset: Preset | None, shapes: Shapes, engine: str) -> int:
    """Choose the sequence length: the requested one, else the preset's, else DEFAULT_SEQ_LENGTH; at
    most what the target takes.
    """
    behind = engine_kind(engine).lookahead
    room = None if shapes.max_positions is None else shapes.max_positions - behind
    if config.seq_length is not None:
        if room is not None and config.seq_length > room:
            raise UsageError(
                f"--seq-length {config.seq_length}: the target takes at most {room} tokens with "
                f"the {engine} engine."
            )
        return config.seq_length
    default = preset.seq_length if preset else DEFAULT_SEQ_LENGTH
    return default if room is None else min(default, room)


def estimate(plan: Plan, corpus: Corpus, maker: SampleMaker | None, limit: int | None) -> Plan:
    """Count the rows, tokenise some spread over the corpus, and scale up by the bytes of their
    lines. Without a tokenizer, only the number of rows is known.
    """
    weights = corpus.weights()[:limit]
    rows = len(weights)
    if rows == 0:
        raise DataError(f"--data {', '.join(plan.data)}: no rows.")
    if maker is None:
        return dataclasses.replace(plan, rows=rows)
    step = max(rows // SPREAD_ROWS, 1)
    picked = list(corpus.pick(lambda n: n % step == 0 and n < rows))
    made = [maker.make(row) for row in picked]
    kept = [s for m in made for s in m.samples]
    sampled = sum(len(s.input_ids) for s in kept)
    stored = sum(int(last_rows(s.loss_mask).sum()) for s in kept)
    tokens = round(sampled / sum(weights[row.number] for row in picked) * sum(weights))
    share = stored / max(sampled, 1)
    repeats = Repeats.of(kept)
    rate = disk_bytes(plan.shapes, plan.layers, plan.make_codec(), share, repeats)
    plan = dataclasses.replace(plan, rows=rows, tokens=tokens, last_rows=round(tokens * share))
    return dataclasses.replace(
        plan,
        bytes=round(tokens * rate) + fixed_bytes(plan),
        repeats=repeats,
        looked_at=len(made),
        dropped=dict(Counter(m.dropped for m in made if m.dropped)),
        notes=dict(sum((m.notes for m in made), Counter())),
    )


def with_answers(plan: Plan, max_tokens: int, count: int = 1) -> Plan:
    """Return a plan whose tokens are prompts, with ``count`` answers each, assumed to be half the
    maximum length; all of an answer's last states are stored.
    """
    if plan.rows is None or plan.tokens is None:
        return plan
    answers = plan.rows * max_tokens // 2 * count
    tokens = plan.tokens * count + answers
    share = answers / tokens
    rate = disk_bytes(plan.shapes, plan.layers, plan.make_codec(), share, plan.repeats)
    plan = dataclasses.replace(plan, tokens=tokens, last_rows=answers, answer_tokens=answers)
    return dataclasses.replace(plan, bytes=round(tokens * rate) + fixed_bytes(plan))


def settle_codec(
    plan: Plan,
    config: DumpConfig,
    supplied: Supplied | None = None,
    target: dict[str, Any] | None = None,
) -> Plan:
    """Return ``plan`` with the codec that its corpus allows and what it is calibrated on; with the
    codec of a ``supplied`` calibration if none was requested. Raises UsageError if the requested
    codec cannot be calibrated on the corpus, and MismatchError if ``supplied`` is for another
    codec, other layers or another ``target`` (its config; None = not known yet).
    """
    from dspark.cache.codec import registry
    from dspark.cache.quality import budget_of, calibration_bytes

    if supplied is not None:
        name = supplied.made_for.codec
        if name != plan.codec and not config.codec_asked and config.pack == DEFAULT_PACKING:
            plan = with_codec(plan, name, "that of --calibration", config.part_tokens is None)
        supplied.check(plan.make_codec(), plan.layers, target)
        return dataclasses.replace(plan, calibration=str(supplied.path))

    layers, hidden = len(plan.layers), plan.shapes.hidden_size
    codec = plan.make_codec()
    name, why = plan.codec, None
    if config.regenerate and codec.least_tokens(layers, hidden):
        why = f"{name} is calibrated on answers, and with --regenerate there are none yet"
        if config.codec_asked:
            raise UsageError(
                f"--codec {why}. Choose --codec {FALLBACK}, or dump to lossless and use "
                "dspark-tools recode."
            )
        name = FALLBACK
    elif plan.tokens is not None:
        name, why = registry.suited(name, config.codec_asked, plan.tokens, layers, hidden)
    if why is not None:
        plan = with_codec(plan, name, why, config.part_tokens is None)
        codec = plan.make_codec()
    if not codec.least_tokens(layers, hidden):
        return plan
    tokens = budget_of(codec, layers, hidden, plan.tokens)
    return dataclasses.replace(
        plan, calibration_tokens=tokens, calibration_bytes=calibration_bytes(tokens, layers, hidden)
    )


def with_codec(plan: Plan, name: str, why: str | None, own_parts: bool) -> Plan:
    """Return ``plan`` with codec ``name`` and its sizes. ``own_parts``: the plan chooses the tokens
    per part.
    """
    plan = dataclasses.replace(plan, codec=name, codec_why=why)
    codec = plan.make_codec()
    changes: dict[str, Any] = {
        "bytes_per_token": round(disk_bytes(plan.shapes, plan.layers, codec))
    }
    if plan.tokens is not None and plan.last_rows is not None:
        share = plan.last_rows / max(plan.tokens, 1)
        rate = disk_bytes(plan.shapes, plan.layers, codec, share, plan.repeats)
        changes["bytes"] = round(plan.tokens * rate) + fixed_bytes(plan)
    if own_parts and plan.device == "cuda":
        changes["part_tokens"] = nearest_power(PART_BYTES / memory_bytes(plan), PART_TOKENS)
    return dataclasses.replace(plan, **changes)


def blocks(plan: Plan, rows: int | None = None) -> Plan:
    """Return ``plan`` with the rows per part: ``rows``, or as many as hold about ``part_tokens``
    tokens.
    """
    if rows is None and plan.rows and plan.tokens:
        rows = _rows_per_part(plan.part_tokens, plan.tokens / plan.rows)
    return dataclasses.replace(plan, block_rows=rows or 1)


def _rows_per_part(part_tokens: int, row_tokens: float) -> int:
    return nearest_power(part_tokens / row_tokens, (1, BLOCK_ROWS))


def blocks_of(supplied: Supplied | None, part_tokens: int | None) -> int | None:
    """Return the rows per part of the store that a calibration was taken from, so that the new
    store can be appended to it; None to choose: where these are not known, or ``--part-tokens``
    asks for other parts than the same flag gave there.
    """
    if supplied is None or supplied.block_rows is None:
        return None
    if part_tokens is None:
        return supplied.block_rows
    same = supplied.row_tokens and (
        _rows_per_part(part_tokens, supplied.row_tokens) == supplied.block_rows
    )
    return supplied.block_rows if same else None


def sized(plan: Plan, size: RowBytes) -> Plan:
    """Return ``plan`` with the size measured on its first states, which depends on the text, unlike
    the formula.
    """
    if plan.tokens is None or plan.last_rows is None:
        return plan
    parts = size.store(plan.tokens, plan.last_rows)
    return dataclasses.replace(plan, bytes=parts + fixed_bytes(plan))


def disk_bytes(
    shapes: Shapes,
    layers: tuple[int, ...],
    codec: Codec,
    last_share: float = 1.0,
    repeats: Repeats | None = None,
) -> float:
    """Return the expected bytes per token on disk; ``last_share`` = stored last states / tokens;
    ``repeats``: of the text, if it was looked at.
    """
    from dspark.cache.files.layout import disk_bytes_per_token

    return disk_bytes_per_token(len(layers), shapes.hidden_size, codec, last_share, repeats)


def weight_bytes(shapes: Shapes) -> int:
    """Return the bytes of the target's 16-bit embedding, which every store holds; an untied head
    doubles it.
    """
    return 2 * shapes.vocab_size * shapes.hidden_size


def fixed_bytes(plan: Plan) -> int:
    """What a store of ``plan`` takes beside its states: the target's frozen weights and files, what
    the codec has learnt, and the metadata of store, parts and samples.
    """
    learnt = plan.make_codec().learnt_bytes(len(plan.layers), plan.shapes.hidden_size)
    frozen = weight_bytes(plan.shapes) if plan.frozen_bytes is None else plan.frozen_bytes
    store, part, sample = METADATA
    parts = math.ceil((plan.tokens or 0) / plan.part_tokens)
    return frozen + plan.file_bytes + learnt + store + part * parts + sample * (plan.rows or 0)


def check_disk(plan: Plan, done_tokens: int, shard: Shard | None = None) -> None:
    """Refuse a dump, or one ``shard`` of it, that is not expected to fit; ``done_tokens`` of it are
    already stored.
    """
    if plan.tokens is None or plan.bytes is None or plan.free_bytes is None:
        return
    share = 1 / shard.count if shard else 1.0
    left = max(share - done_tokens / max(plan.tokens, 1), 0.0)
    need = round(plan.bytes * left)
    if need > plan.free_bytes:
        raise StoreWriteError(
            f"{plan.output}: about {round(plan.tokens * left):,} tokens need about "
            f"{human(need)}, but only {human(plan.free_bytes)} are free. Free space, "
            "choose another --output, or dump less: fewer bits (--aux-bits, "
            "--last-bits), fewer --layers, or fewer rows (--limit)."
        )


def human(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"
