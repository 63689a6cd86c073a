"""The settings of a dump, validated as far as possible without the target or the corpus."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.cache import json_text
from dspark.cache.errors import UsageError
from dspark.cache.files.urls import Url, Where, beside, where
from dspark.cache.settings import DEFAULT_PACKING, choose_codec, is_asked, refuse_two_names
from dspark.cache.target.taps import BOTH
from dspark.dump.engines.answers import (
    check_answers,
    check_max_tokens,
    check_temperature,
    check_top_p,
)
from dspark.dump.engines.options import EngineOptions, parse_arguments
from dspark.dump.shard import MOST, Shard

if TYPE_CHECKING:
    from dspark.cache.codec.base import Codec

DEFAULT_SEQ_LENGTH = 4096
LARGEST = 2**53  # counts; every JSON reader represents whole numbers up to here exactly
MOST_WORKERS = 256
TURNS = ("auto", "each", "last", "whole")


@dataclass(frozen=True, kw_only=True, slots=True)
class DumpConfig:
    """One run of ``dspark-dump``. None = decided by preset, target or machine; see ``plan.py``."""

    model: str
    data: tuple[str, ...] | str | None = None  # a source each
    output: Where = Path("hs.zarr")
    engine: str = "auto"
    layers: tuple[int, ...] | None = None  # output of decoder layer i
    target_layer_ids: tuple[int, ...] | None = None  # state entering layer j = i + 1
    for_: tuple[str, ...] | None = None  # drafter types that the store is to serve
    seq_length: int | None = None
    codec: str | None = None  # a name; None: the default
    aux_bits: int | None = None  # these two name a rotated codec
    last_bits: int | None = None
    pack: str = DEFAULT_PACKING  # of the codes: cache/settings.py
    limit: int | None = None  # rows of each source
    resume: bool = False
    overwrite: bool = False
    break_lock: bool = False  # of another machine that shows no sign of life
    # a file of what the codec has learnt elsewhere, or the store that contains it
    calibration: Where | None = None
    assistant_pattern: str | None = None
    turns: str = "auto"  # how answers become samples: auto, each, last or whole
    template_kwargs: str | None = None  # JSON object handed to the chat template
    device: str = "auto"
    dtype: str = "auto"
    batch_tokens: int | None = None
    part_tokens: int | None = None
    workers: int | None = None  # processes that tokenise, and as many that write; 0: none
    min_supervised: int = 2
    max_dropped: float = 0.5  # share of rows
    mask_token_id: int | None = None
    regenerate: bool = False
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    thinking: bool | None = None
    answers: int | None = None  # conversations per row
    tensor_parallel_size: int | None = None
    data_parallel_size: int | None = None
    engine_arg: tuple[str, ...] = ()  # KEY=VALUE
    trust_remote_code: bool = False
    dry_run: bool = False
    measure: bool = False
    shard: str | None = None  # I/N: every N-th part only
    ray: int | None = None  # shards that a Ray cluster runs

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", where(self.output))
        self._check_regenerate()
        options = self.engine_options
        only = [] if self.engine == "auto" else options.only_vllm(self.engine)
        if only:
            raise UsageError(
                f"{only[0]}: the {self.engine} engine has no such option. Use --engine vllm."
            )
        if self.layers is not None and self.target_layer_ids is not None:
            raise UsageError(f"give --layers or --target-layer-ids, not both. {BOTH}.")
        if self.resume and self.overwrite:
            raise UsageError(
                "give --resume or --overwrite, not both: one continues the store, the other "
                "replaces it."
            )
        if self.measure and (self.dry_run or self.resume or self.shard or self.ray):
            raise UsageError(
                "--measure times a whole dump and writes nothing: leave out --dry-run, --resume, "
                "--shard and --ray, and divide its time by their number yourself."
            )
        self._check_shard()
        if self.turns not in TURNS:
            raise UsageError(f"--turns {self.turns}: expected one of {', '.join(TURNS)}.")
        template_keywords(self.template_kwargs)
        self._check_bounds()

    def _check_regenerate(self) -> None:
        """Raise UsageError for flags that --regenerate excludes, or that need it."""
        asked = [
            f
            for f in ("temperature", "top_p", "max_tokens", "thinking", "answers")
            if getattr(self, f) is not None
        ]
        if asked and not self.regenerate:
            raise UsageError(
                f"--{asked[0].replace('_', '-')} says how the target answers, so it needs "
                "--regenerate."
            )
        if not self.regenerate:
            return
        if isinstance(self.output, Url):
            raise UsageError(
                "--regenerate keeps answers beside a local store: give a local --output, then "
                "copy it with dspark-tools merge."
            )
        if len(self.sources) > 1:
            raise UsageError(
                "--regenerate takes one --data: give each source its own store, or put the "
                "files in one folder."
            )
        if self.assistant_pattern is not None:
            raise UsageError(
                "--regenerate finds the target's answers itself: omit --assistant-pattern."
            )
        if self.part_tokens is not None:
            raise UsageError(
                "--regenerate sizes parts by rows, since the lengths of answers are not known "
                "in advance: omit --part-tokens."
            )

    def _check_shard(self) -> None:
        """Raise UsageError for what several dumps of one plan cannot do."""
        if self.ray is not None and not 1 <= self.ray <= MOST:
            raise UsageError(f"--ray: found {self.ray}, expected 1 to {MOST} dumps.")
        if self.ray is not None and self.shard is not None:
            raise UsageError("give --ray or --shard, not both: --ray makes the shards itself.")
        if self.shard is None and self.ray is None:
            return
        if self.shard is not None:
            Shard.parse(self.shard)
        if self.overwrite or self.regenerate:
            flag = "--overwrite" if self.overwrite else "--regenerate"
            why = (
                "other shards may be writing that store"
                if self.overwrite
                else "answers belong to a whole store"
            )
            raise UsageError(
                f"give --{'shard' if self.shard else 'ray'} or {flag}, not both: {why}."
            )

    def _check_bounds(self) -> None:
        """Raise UsageError for a number that is out of its range."""
        for flag, value in (
            ("--seq-length", self.seq_length),
            ("--limit", self.limit),
            ("--batch-tokens", self.batch_tokens),
            ("--part-tokens", self.part_tokens),
            ("--min-supervised", self.min_supervised),
        ):
            if value is not None and not 1 <= value <= LARGEST:
                raise UsageError(
                    f"{flag}: found {value}, expected a positive number, at most {LARGEST}."
                )
        # Here and not only in Sampling: the plan of a preset makes none.
        if self.temperature is not None:
            check_temperature(self.temperature)
        if self.top_p is not None:
            check_top_p(self.top_p)
        if self.max_tokens is not None:
            check_max_tokens(self.max_tokens)
        if self.answers is not None:
            check_answers(self.answers)
        if self.workers is not None and not 0 <= self.workers <= MOST_WORKERS:
            raise UsageError(
                f"--workers: found {self.workers}, expected 0 to {MOST_WORKERS} processes."
            )
        refuse_two_names(self.codec, self.aux_bits, self.last_bits)
        if not 0 <= self.max_dropped <= 1:
            raise UsageError(
                f"--max-dropped: found {self.max_dropped}, expected a share from 0 to 1."
            )

    @property
    def sources(self) -> tuple[str, ...]:
        """Return what each ``--data`` names; empty if the preset decides."""
        return (self.data,) if isinstance(self.data, str) else tuple(self.data or ())

    @property
    def codec_name(self) -> str:
        """Return the full name of the requested codec, or of the default, which the plan may
        replace.
        """
        return choose_codec(self.codec, self.aux_bits, self.last_bits, self.pack)

    @property
    def codec_asked(self) -> bool:
        """Tell whether a codec was requested, by name or by bits."""
        return is_asked(self.codec, self.aux_bits, self.last_bits)

    def make_codec(self) -> Codec:
        """Make the codec ``codec_name``, not yet calibrated."""
        from dspark.cache.codec import registry

        return registry.make(self.codec_name, self.pack)

    @property
    def part_of(self) -> Shard | None:
        """Return which of several dumps of one plan this is; None if it is the only one."""
        return None if self.shard is None else Shard.parse(self.shard)

    def beside(self, suffix: str) -> Path:
        """Return the path of this dump's own file beside the store, such as ``hs.zarr.log``."""
        shard = self.part_of
        return beside(self.output, shard.suffix(suffix) if shard else suffix)

    @property
    def lock(self) -> Where:
        """Return what this dump locks while it runs: its store, or its share of one."""
        if self.part_of is None:
            return self.output
        if isinstance(self.output, Url):
            return Url(f"{self.output}{self.part_of.suffix('')}")
        return self.beside("")

    @property
    def engine_options(self) -> EngineOptions:
        """Return the options that are passed on to the engine."""
        return EngineOptions(
            tensor_parallel=self.tensor_parallel_size,
            data_parallel=self.data_parallel_size,
            arguments=parse_arguments(self.engine_arg),
            trust_remote_code=self.trust_remote_code,
        )

    @property
    def asked_layers(self) -> tuple[int, ...] | None:
        """Return the requested layers, as outputs of decoder layer i, whichever flag named them."""
        if self.target_layer_ids is not None:
            return tuple(j - 1 for j in self.target_layer_ids)
        return self.layers


def template_keywords(text: str | None) -> dict[str, Any]:
    """Return what ``--template-kwargs`` passes to the chat template."""
    if text is None:
        return {}
    try:
        found = json_text.loads(text)
    except ValueError as error:
        raise UsageError(f"--template-kwargs {text}: not JSON ({error}).") from error
    if not isinstance(found, dict):
        raise UsageError(
            f'--template-kwargs {text}: expected a JSON object, such as \'{{"enable_thinking": '
            f"false}}'."
        )
    return found
