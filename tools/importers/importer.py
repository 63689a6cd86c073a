"""``dspark-tools import``: convert another project's cache of hidden states to a store. Works part
by part, so it streams and can be stopped and resumed like a dump.

What those caches lack comes from the target's folder: the frozen weights, config and tokenizer, the
mask token. What they have in excess is left out: last states that no anchor needs. Rows without a
sample are counted by reason.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dspark.cache.codec import registry
from dspark.cache.codec.base import Codec, to_numpy, tokens_of
from dspark.cache.codec.centre import CALIBRATION, spread
from dspark.cache.errors import (
    DamagedCacheError,
    DataError,
    EngineError,
    MismatchError,
    NotACacheError,
    UsageError,
)
from dspark.cache.files.calibration import codec_info
from dspark.cache.files.lock_files import owned
from dspark.cache.files.place import place_of
from dspark.cache.files.urls import Where, where
from dspark.cache.manifest import DumpInfo, Manifest, SourceInfo
from dspark.cache.quality import Probe, budget_of, probe_of, quality, share_of
from dspark.cache.records import CodedSample, TokenSample, last_rows
from dspark.cache.settings import DEFAULT_PACKING, LOSSLESS, choose_codec, is_asked
from dspark.cache.shared.stopping import parts_of, stoppable
from dspark.cache.stored_manifest import read_manifest
from dspark.cache.writer import StoreWriter, refuse_to_replace
from dspark.tools.importers.deepspec import DeepSpecSource
from dspark.tools.importers.source import Given, Source
from dspark.tools.importers.speculators import SpeculatorsSource

if TYPE_CHECKING:
    from torch import nn

    from dspark.cache.target.frozen import FrozenTarget

AFTER, BEFORE = "after", "before"
LONELY = "no two consecutive supervised tokens"
CHECKED_ROWS = 64  # last states that the text check reads
# nats per token by which the other reading of the last state must do better to be believed
CLEARLY = 0.5


@dataclass(frozen=True, slots=True)
class Ready:
    """A sample to be coded: ``aux`` [S, L, H], ``last`` [M, H] after the final norm."""

    tokens: TokenSample
    aux: torch.Tensor
    last: torch.Tensor


def open_source(path: str | Path) -> Source:
    """Open the cache at ``path``, whichever project wrote it."""
    path = Path(path)
    if (path / "samples.idx").is_file() or (path / "manifest.json").is_file():
        return DeepSpecSource(path)
    if (path / "state.json").is_file() or (path / "dataset_info.json").is_file():
        return SpeculatorsSource(path)
    raise NotACacheError(
        f"{path}: neither a DeepSpec target cache (manifest.json, samples.idx) nor speculators' "
        "preprocessed data (state.json, hidden_states/)"
    )


def imported(given: Source, block_rows: int) -> DumpInfo:
    """How the states of ``given`` came to be, as far as an import knows."""
    return DumpInfo(
        engine=f"import-{given.name}",
        engine_version=given.version,
        dtype="bfloat16",
        seq_length=given.longest,
        min_supervised=2,
        assistant_pattern=None,
        mask_rule="given",
        block_rows=block_rows,
    )


def import_store(
    source: str | Path,
    destination: str | Where,
    *,
    model: str,
    layers: Sequence[int] | None = None,
    codec: str = LOSSLESS,
    aux_bits: int | None = None,
    last_bits: int | None = None,
    pack: str = DEFAULT_PACKING,
    mask_token_id: int | None = None,
    last_state: str | None = None,
    part_tokens: int = 32768,
    max_dropped: float = 0.5,
    resume: bool = False,
    overwrite: bool = False,
    break_lock: bool = False,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Write ``source`` as a store at ``destination``; returns its manifest. ``progress(rows done,
    rows)``.

    ``layers``: outputs of decoder layers; required if the cache does not name them, and must agree
    if it does. Raises MismatchError if cache and target do not belong together, DamagedCacheError
    if the cache is incomplete. ``last_state``: "after-norm" or "before-norm", if the cache deviates
    from its layout.
    """
    from dspark.dump.target.config import load_target, target_info, tokenizer_info
    from dspark.dump.target.presets import find
    from dspark.dump.target.weights import compact, read_frozen

    name, output = choose_codec(codec, aux_bits, last_bits, pack), where(destination)
    given = open_source(source)
    if len(given) == 0:
        raise DataError(f"{source}: no samples")
    block_rows = 1 << max(round(math.log2(part_tokens / max(given.mean_tokens(), 1))), 0)
    target = load_target(model)
    chosen = check_belongs(
        given, source, layers, target.shapes.hidden_size, target.shapes.num_layers, model
    )
    name, why = registry.suited(
        name,
        is_asked(codec, aux_bits, last_bits),
        round(len(given) * given.mean_tokens()),
        len(chosen),
        target.shapes.hidden_size,
    )
    if why:
        say(f"codec {name}: {why}")
    chosen_codec = registry.make(name, pack)
    frozen, norm = read_frozen(model, target.shapes)
    manifest = Manifest(
        target=target_info(target, mask_token_id, find(model)),
        layers=chosen,
        codec=codec_info(chosen_codec),
        tokenizer=tokenizer_info(target, tokenised=True),
        sources=[SourceInfo(id=Path(source).resolve().name, sha256=given.sha256, limit=None)],
        dump=imported(given, block_rows),
    )
    after = given.last_after_norm if last_state is None else last_state == f"{AFTER}-norm"
    reader = Reader(given, Path(source), frozen, norm, after)
    reader.text_check(frozen)
    safe = parts_of(output, resume=resume)
    with (
        stoppable("discarding the part in progress", safe),
        owned(output, "dspark-tools import", break_lock=break_lock) as lock,
    ):
        if resume and place_of(output).exists():
            stored = read_manifest(destination)
            rows = stored.dump.block_rows
            manifest = dataclasses.replace(
                manifest, dump=dataclasses.replace(manifest.dump, block_rows=rows)
            )
            stored.same_plan(manifest, str(destination))
            if stored.complete:
                return stored
            writer = StoreWriter.resume(destination, manifest)
            writer.restore_target(compact(frozen), target.files)
        else:
            refuse_to_replace(place_of(output), overwrite=overwrite)
            learnt = reader.calibrated(chosen_codec)
            writer = StoreWriter.create(
                destination,
                manifest,
                compact(frozen),
                target.files,
                codec=learnt,
                overwrite=overwrite,
            )
        writer.guard = lock.check
        with writer:
            write_parts(writer, reader, max_dropped, torch.device(device), progress)
            return writer.finish(quality=reader.quality(writer.codec))


def check_belongs(
    given: Source,
    where: object,
    layers: Sequence[int] | None,
    hidden: int,
    num_layers: int,
    model: str,
) -> list[int]:
    """Return the layers of ``given`` (outputs of decoder layers) if cache, flags and target
    agree.
    """
    from dspark.dump.target.layers import check_layers

    if given.hidden != hidden:
        raise MismatchError(
            f"{where}: its states have {given.hidden} channels, but {model} has {hidden}; set "
            "--model to the target that produced them"
        )
    if given.layers is None and layers is None:
        raise UsageError(
            f"{where} does not say which layers it holds: give the --target-layer-ids of the "
            "extraction (or --layers)"
        )
    chosen = list(layers) if layers is not None else list(given.layers or [])
    if given.layers is not None and chosen != given.layers:
        raise MismatchError(
            f"{where}: its layers are {given.layers} (output of layer i), but the flags "
            f"say {chosen}"
        )
    if given.slots != len(chosen):
        raise MismatchError(
            f"{where}: its files hold {given.slots} layers beside the last state, but the flags "
            f"name {len(chosen)}: {chosen} (output of layer i)"
        )
    return list(check_layers(chosen, num_layers))


class Reader:
    """Converts samples of a foreign cache to ours: only stored last states, after the final
    ``norm`` (applied here unless ``after_norm``).
    """

    def __init__(
        self, given: Source, where: Path, frozen: FrozenTarget, norm: nn.Module, after_norm: bool
    ) -> None:
        self.given, self.where, self.norm, self.after_norm = given, where, norm, after_norm
        self.frozen, self.embedding = frozen, frozen.embed_tokens
        self.vocab, self.hidden = self.embedding.shape

    def sample(self, i: int) -> Ready | str:
        """Return sample ``i``, or why there is none."""
        from dspark.dump.corpus.masks import sample_key

        found = self.given.read(i)
        if not isinstance(found, Given):
            return found
        ids, mask = found.input_ids, found.loss_mask
        if ids.size == 0 or int(ids.min()) < 0 or int(ids.max()) >= self.vocab:
            raise MismatchError(
                f"{self.where}: sample {i} holds ids outside the target's vocabulary of "
                f"{self.vocab}"
            )
        rows = last_rows(mask)
        if not rows.any():
            return LONELY
        last = found.last[torch.from_numpy(rows)]
        key = sample_key(ids[: int(mask.argmax())].tolist())
        return Ready(
            TokenSample(i, key, ids, mask),
            found.aux,
            last if self.after_norm else self.normed(last),
        )

    def normed(self, last: torch.Tensor) -> torch.Tensor:
        """Apply the target's final norm to ``last`` [M, H], in the weights' dtype."""
        weight: torch.Tensor = next(self.norm.parameters())
        with torch.inference_mode():
            out: torch.Tensor = self.norm(last.to(weight.dtype))
        return out

    def probe(self, budget: int = CALIBRATION) -> Iterator[Ready]:
        """Return samples spread over the cache, about ``budget`` tokens."""
        for i in spread(len(self.given), self.given.mean_tokens(), budget):
            found = self.sample(i)
            if not isinstance(found, str):
                yield found

    def states(self, codec: Codec) -> Probe:
        """Return states spread over the cache, as many as ``codec`` asks for."""
        tokens = round(len(self.given) * self.given.mean_tokens())
        budget = budget_of(codec, self.given.slots, self.hidden, tokens)
        found = list(self.probe(budget))
        if not found:
            raise DataError(
                f"{self.where}: none of the sampled rows holds a sample with two consecutive "
                "supervised tokens"
            )
        lengths = [len(f.tokens.input_ids) for f in found]
        shares = [
            share_of(f.tokens, (f.aux.float(), f.last.float()), lengths, codec, budget)
            for f in found
        ]
        return probe_of(shares, codec, lambda: self.frozen, corpus=tokens)

    def calibrated(self, codec: Codec) -> Codec:
        return codec.calibrated(*self.states(codec)) if codec.needs_calibration else codec

    def quality(self, codec: Codec) -> dict[str, Any]:
        """Measure what the stored code loses against the cache it was made from."""
        return quality(self.states(codec), codec, "imported cache")

    def text_check(self, frozen: FrozenTarget) -> None:
        """Refuse last states that predict the text clearly better by the other reading (before or
        after the final norm) than by the one given.

        The other project's cache has no prediction of the target to compare its states with, only
        the text that the target wrote.
        """
        sample = next(self.probe(), None)
        found = self.given.read(sample.tokens.row) if sample else None
        if sample is None or not isinstance(found, Given):
            return
        at = torch.from_numpy(last_rows(sample.tokens.loss_mask).nonzero()[0])[:CHECKED_ROWS]
        labels = torch.from_numpy(found.input_ids).long()[at + 1]
        raw, head = found.last[at], frozen.lm_head.float()
        after, before = (
            float(torch.nn.functional.cross_entropy(x.float() @ head.T, labels))
            for x in (raw, self.normed(raw))
        )
        ours, other = (after, before) if self.after_norm else (before, after)
        if other < min(ours - CLEARLY, 0.5 * math.log(self.vocab)):
            said, true = (AFTER, BEFORE) if self.after_norm else (BEFORE, AFTER)
            raise MismatchError(
                f"{self.where}: read as states {said} the final norm, its last states predict "
                f"their own text with a loss of {ours:.2f} nats per token; read as states "
                f"{true} the norm, {other:.2f}. Give --last-state {true}-norm if that is "
                "what the cache holds."
            )


def write_parts(
    writer: StoreWriter,
    reader: Reader,
    max_dropped: float,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> None:
    """Write every part that is missing. Raises MismatchError if an existing part was made from
    other rows.
    """
    total, size = len(reader.given), writer.manifest.dump.block_rows
    dropped: Counter[str] = Counter()
    for block, start in enumerate(range(0, total, size)):
        stop = min(start + size, total)
        found = [reader.sample(row) for row in range(start, stop)]
        sha = found_sha256(found)
        if block in writer.committed:
            if writer.committed[block].rows_sha256 not in (None, sha):
                raise MismatchError(
                    f"{reader.where}: samples {start}-{stop - 1} are not the ones that part "
                    f"{block} was made from. Restore them, or delete the part's folder."
                )
            dropped.update(writer.committed[block].dropped)
            continue
        here = Counter(f for f in found if isinstance(f, str))
        samples = [
            _coded(f, writer.codec, reader.embedding, device, f"{reader.where}: sample {start + i}")
            for i, f in enumerate(found)
            if isinstance(f, Ready)
        ]
        dropped.update(here)
        if sum(dropped.values()) > max_dropped * total:
            raise DataError(
                f"{reader.where}: {sum(dropped.values()):,} of {total:,} rows gave no sample "
                f"({dict(dropped)}), more than the allowed {max_dropped:.0%}"
            )
        writer.commit(
            block,
            samples,
            writer.block(block, start, stop, dropped=here, truncated=0, rows_sha256=sha),
        )
        progress(stop, total)


def found_sha256(found: list[Ready | str]) -> str:
    """Return the sha256 of the tokens and masks of a block's samples, and of the reasons why other
    rows gave none.
    """
    total = hashlib.sha256()
    for f in found:
        ids = (
            f.encode()
            if isinstance(f, str)
            else f.tokens.input_ids.tobytes() + f.tokens.loss_mask.tobytes()
        )
        total.update(hashlib.sha256(ids).digest())
    return total.hexdigest()


def _coded(
    sample: Ready, codec: Codec, embedding: torch.Tensor, device: torch.device, where: str
) -> CodedSample:
    known = tokens_of([sample.tokens], embedding.to(device)) if codec.needs_tokens else None
    try:
        coded = codec.encode(sample.aux.to(device), sample.last.to(device), known)
    except EngineError as error:
        raise DamagedCacheError(f"{where}: {error}") from error
    return CodedSample(sample.tokens, to_numpy(coded))
