"""Everything a run needs, made from its config: device, store, split, draft, stream, optimizer. No
training here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import dspark.cache
from dspark.cache.codec.klt.warm import warming_to_read
from dspark.cache.errors import TrainError, UsageError
from dspark.cache.joined import JoinedCache, Stores
from dspark.cache.shared.host_cores import cores
from dspark.train.compute import Compute, choose_compute, keep_compiled, start_compilers
from dspark.train.config import TrainConfig
from dspark.train.data.anchors import Int64
from dspark.train.data.batch import Batch
from dspark.train.data.row import PackedRow, blank
from dspark.train.data.stream import VALIDATION_EPOCH, Stream, split
from dspark.train.data.vocab import choose_ids, covered
from dspark.train.distributed import World
from dspark.train.draft.model import DraftModel
from dspark.train.draft.saved.warm import Origin, Start
from dspark.train.draft.types import drafter
from dspark.train.objective.config import ObjectiveConfig
from dspark.train.optim.adamw import MasterAdamW
from dspark.train.optim.base import AdamSettings, Optimizer
from dspark.train.optim.flat import FlatOptimizer
from dspark.train.optim.muon import MasterMuon
from dspark.train.run.checkpoint import Position

REMOTE_WORKERS = 2  # of a store that is read by requests, at least


@dataclass(frozen=True, slots=True)
class Run:
    config: TrainConfig
    cache: Stores
    compute: Compute
    model: DraftModel
    objective: ObjectiveConfig
    optimizer: Optimizer
    stream: Stream
    validation: Stream | None
    vocab_coverage: float
    workers: int
    world: World
    to_draft: Tensor | None
    """int64[V] on the CPU, for the weights of a reduced vocabulary's CE; None for the whole."""
    blank: Batch | None
    """Padding for the ranks of a sharded model that have no row in a step; None where no rank needs
    any.
    """
    start: Start | None = None
    """What a warm start took; None for a draft that begins with random tensors."""
    guard: Callable[[], None] = lambda: None
    """Called before a checkpoint is written; raises where this process may not write any more."""
    rows: Iterator[list[PackedRow]] | None = None
    """This rank's rows of each step from ``prepare``'s ``begin`` on, which their readers are
    reading.
    """


def row_length(cache: Stores, requested: int | None) -> int:
    """Return ``--total-seq-len``; by default 4096, or the longest sequence length of the stores if
    that is longer.
    """
    return requested or max(4096, *(store.manifest.dump.seq_length for store in cache.stores))


def open_stores(paths: Sequence[str]) -> Stores:
    """Open the store, or several as one. Raises, naming it, for one without an anchor to train on,
    and as ``JoinedCache``.
    """
    stores = [dspark.cache.open(path) for path in paths]
    for store in stores:
        if store.manifest.counts.last_rows == 0:
            raise TrainError(
                f"{store.path}: no two neighbouring supervised tokens in {len(store)} samples, "
                "so there is no anchor to train on"
            )
    return stores[0] if len(stores) == 1 else JoinedCache(stores)


def prepare(config: TrainConfig, world: World | None = None, begin: Position | None = None) -> Run:
    """Open the store and build the run, this rank's part of it. Raises before anything is written.
    ``begin``: where the training will start, if that is known: its readers then start while torch
    imports its compiler.
    """
    world = world or World()
    if config.rows_per_step < world.size:
        raise UsageError(
            f"--rows-per-step {config.rows_per_step} for {world.size} processes: each needs at "
            f"least one row; use a multiple of {world.size}"
        )
    kind = drafter(config.speculator_type)
    objective = kind.objective(config)
    compiled = False if config.compile is None and not kind.compiled else config.compile
    compute = choose_compute(config.device, config.dtype, compiled, world)
    cache = open_stores([path for path, _ in config.stores])
    target = cache.manifest.target
    origin = None
    if config.init_from:
        origin = Origin.open(config.init_from, target, list(cache.manifest.layers), config)
    # refuses before a sample is read
    kind.layers(cache.manifest.layers, target.config, config.layers)
    train, held_out = split(cache.index["sample_key"], config.val_fraction)
    draft_ids, coverage = vocabulary(config, cache, train, origin)
    draft_config = kind.configure(
        config,
        target.config,
        cache.manifest.layers,
        target.mask_token_id,
        None if draft_ids is None else len(draft_ids),
    )
    if origin:
        draft_config = origin.shaped(draft_config)
    torch.manual_seed(config.seed)  # initial weights; nothing else draws from torch's generator
    model = kind.network(draft_config, cache.target, draft_ids, frozen_dtype=compute.dtype)
    start = origin.give(model, cache.target) if origin else None
    model.to(device=compute.device, dtype=compute.dtype)
    sharded = config.strategy == "fsdp2"
    if sharded and not kind.sharded:
        raise UsageError(f"--strategy fsdp2 does not train {kind.name} drafts; use zero or ddp")
    # Of several ranks, gradients are summed and new weights gathered while other parts compute.
    in_parts = sharded or (world.size > 1 and kind.sharded)

    def stream(samples: Int64, max_rows: int | None = None) -> Stream:
        return Stream(
            cache,
            samples,
            seed=config.seed,
            total_seq_len=row_length(cache, config.total_seq_len),
            rows_per_step=config.rows_per_step,
            block_size=draft_config.block_size,
            max_anchors=config.max_anchors,
            pad=compute.compiled and config.max_anchors > 0,
            max_rows=max_rows,
            passes=[passes for _, passes in config.stores],
            tables=model.mask_tables if compute.backend == "flex" else None,
        )

    training = stream(train)
    validation = stream(held_out, config.val_rows) if held_out.size else None
    # Packs once now, so that a sample longer than a row is refused before anything is written.
    training.plan(0)
    if validation is not None:
        validation.plan(VALIDATION_EPOCH)
    workers = workers_of(config, cache, compute, world)
    # What follows takes about as long as the readers take to start.
    rows = None if begin is None else rows_of(training, begin, compute, world, workers)
    embedding = cache.target.embed_tokens.dtype
    codecs = [store.codec for store in cache.stores]
    with warming_to_read(codecs, target.hidden_size, compute.device, embedding):
        if compute.compiled:
            keep_compiled()
            start_compilers(compute.device)
            compile_draft(model, in_parts=in_parts)
    if config.activation_checkpointing:
        checkpoint_activations(model)
    optimizer = optimizer_of(config, model, compute, world)
    if in_parts and isinstance(optimizer, FlatOptimizer):
        optimizer.follow(model.parts())
    padding = None
    if sharded:
        fixed = (training.total_seq_len, training.max_anchors) if training.pad else (1, 1)
        layers, hidden = len(draft_config.target_layer_ids), cache.manifest.target.hidden_size
        padding = blank(
            *fixed, draft_config.block_size, layers, hidden, compute.device, compute.dtype
        )
    return Run(
        config,
        cache,
        compute,
        model,
        objective,
        optimizer,
        training,
        validation,
        coverage,
        workers,
        world,
        None if model.frozen_head.to_draft is None else model.frozen_head.to_draft.cpu(),
        padding,
        start,
        rows=rows,
    )


def rows_of(
    stream: Stream, begin: Position, compute: Compute, world: World, workers: int
) -> Iterator[list[PackedRow]]:
    """Return this rank's rows of each step from ``begin`` on, endlessly; starts their readers."""
    return stream.steps_from(
        begin.epoch,
        begin.epoch_step,
        workers=workers,
        pin=compute.device.type == "cuda",
        rank=world.rank,
        world=world.size,
        endless=True,
    )


def vocabulary(
    config: TrainConfig, cache: Stores, train: Int64, origin: Origin | None
) -> tuple[Tensor | None, float]:
    """The draft's token ids, None for all of the target's, and the share of labels they cover. A
    draft that the training starts from keeps its own.
    """
    size = config.draft_vocab_size
    if size is None or size == cache.manifest.target.vocab_size:
        return None, 1.0
    if origin and origin.draft_ids is not None and len(origin.draft_ids) == size:
        return origin.draft_ids, covered(cache, train, origin.draft_ids)
    return choose_ids(cache, train, size)


def optimizer_of(
    config: TrainConfig, model: DraftModel, compute: Compute, world: World
) -> Optimizer:
    """The rule that ``--optimizer`` names, its masters and moments laid out as ``--strategy``
    says.
    """
    settings = AdamSettings(
        betas=config.betas, weight_decay=config.weight_decay, clip=config.grad_clip
    )
    if config.strategy == "fsdp2":
        from dspark.train.optim.fsdp2 import ShardedOptimizer

        muon = config.optimizer == "muon"
        return ShardedOptimizer(model, settings, world, compute.dtype, muon=muon)
    rule = MasterMuon if config.optimizer == "muon" else MasterAdamW
    return rule(model.trained(), settings, world, shared=config.of_several == "zero")


def workers_of(config: TrainConfig, cache: Stores, compute: Compute, world: World) -> int:
    """Reading processes of this rank.

    A row of 4,096 tokens in 16 bits is 25 (SmolLM2) to 250 MB (GLM-5.2) to read, check and
    decompress, on a process's share of the cores.
    """
    if config.workers is not None:
        return config.workers
    share = world.cores or cores()
    workers = min(8, max(2, share - 1)) if compute.device.type == "cuda" else 0
    # The answers of a remote store take their time on any device.
    return max(workers, REMOTE_WORKERS) if cache.remote else workers


def compile_draft(model: DraftModel, *, in_parts: bool) -> None:
    """torch.compile. Rows are padded to one shape, so one compilation serves the run (and one
    without gradients, validation of what is compiled in parts).

    ``in_parts``: layer by layer, and the parts before and after them: between FSDP2's hooks, which
    cannot be compiled, or so that the gradients of one part are there while the next one computes
    its own.
    """
    if not in_parts:
        model.compile(dynamic=False)
        model.compiled_whole = True
        return
    for module in (*model.layers, model.norm):
        module.forward = torch.compile(module.forward, dynamic=False)
    model.context = torch.compile(model.context, dynamic=False)  # type: ignore[method-assign]
    model.heads = torch.compile(model.heads, dynamic=False)  # type: ignore[method-assign]


def checkpoint_activations(model: DraftModel) -> None:
    """Keep only the input of each layer for backward. Set on the instances: a wrapping module would
    rename the parameters.
    """
    from torch.utils.checkpoint import checkpoint

    for layer in model.layers:
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )
