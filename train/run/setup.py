"""Everything a run needs, made from its config: device, store, split, draft, stream, optimizer. No training here."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import dspark.cache
from dspark.cache.errors import TrainError, UsageError
from dspark.cache.reader import Cache
from dspark.cache.shared.process import make_current
from dspark.train.config import TrainConfig
from dspark.train.data.anchors import Int64
from dspark.train.data.batch import Batch
from dspark.train.data.row import blank
from dspark.train.data.stream import VALIDATION_EPOCH, Stream, split
from dspark.train.data.vocab import choose_ids
from dspark.train.distributed import World
from dspark.train.draft.attention import Backend
from dspark.train.draft.config import DraftConfig
from dspark.train.draft.model import DraftModel
from dspark.train.objective.objective import ObjectiveConfig
from dspark.train.optim.flat import AdamSettings, MasterAdamW, Optimizer
from dspark.train.optim.muon import MasterMuon


@dataclass(frozen=True, slots=True)
class Compute:
    """Where and in what the draft runs."""

    device: torch.device
    dtype: torch.dtype
    backend: Backend
    compiled: bool


@dataclass(frozen=True, slots=True)
class Run:
    config: TrainConfig
    cache: Cache
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
    """Padding for the ranks of a sharded model that have no row in a step; None where no rank needs any."""


def choose_compute(device: str, dtype: str, compiled: bool | None, world: World | None = None) -> Compute:
    """``auto`` takes cuda with bfloat16 if there is one, else cpu with float32 (bfloat16 is emulated and slow on most CPUs). A GPU
    by number becomes the process's current one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and not re.fullmatch(r"cuda(:\d+)?", device):
        raise UsageError(f"--device {device}: expected auto, cpu, cuda or cuda:N")
    cuda = device != "cpu"
    if cuda and not torch.cuda.is_available():
        raise UsageError(
            f"--device {device}: torch sees no CUDA device (torch {torch.__version__}); use --device cpu"
        )
    if cuda and world is not None and world.size > 1:
        device = f"cuda:{world.local_rank}"
    elif ":" in device and int(device.split(":")[1]) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {device}: torch sees {torch.cuda.device_count()} CUDA devices, counted from 0"
        )
    names = {
        "bfloat16": torch.bfloat16,
        "float32": torch.float32,
        "auto": torch.bfloat16 if cuda else torch.float32,
    }
    if dtype not in names:
        raise UsageError(f"--dtype {dtype}: expected auto, bfloat16 or float32")
    make_current(device)
    return Compute(
        torch.device(device), names[dtype], "flex" if cuda else "sdpa", cuda if compiled is None else compiled
    )


def row_length(cache: Cache, requested: int | None) -> int:
    """``--total-seq-len``, by default 4096 or the store's own sequence length if that is longer."""
    return requested or max(4096, cache.manifest.dump.seq_length)


def prepare(config: TrainConfig, world: World | None = None) -> Run:
    """Open the store and build the run, this rank's part of it. Raises before anything is written."""
    world = world or World()
    if config.rows_per_step < world.size:
        raise UsageError(
            f"--rows-per-step {config.rows_per_step} for {world.size} processes: each needs a row; raise it to a multiple of {world.size}"
        )
    objective = ObjectiveConfig.from_json(
        config.loss_fn, confidence=config.confidence_head_alpha, decay=config.decay
    )
    compute = choose_compute(config.device, config.dtype, config.compile, world)
    cache = dspark.cache.open(config.cache)
    if cache.manifest.counts.last_rows == 0:
        raise TrainError(
            f"{config.cache}: no two neighbouring supervised tokens in {len(cache)} samples, so there is no anchor to train on"
        )
    train, held_out = split(cache.index["sample_key"], config.val_fraction)
    draft_ids, coverage = None, 1.0
    if config.draft_vocab_size is not None and config.draft_vocab_size != cache.manifest.target.vocab_size:
        draft_ids, coverage = choose_ids(cache, train, config.draft_vocab_size)
    draft_config = DraftConfig.sized_for(
        cache.manifest.target.config,
        target_layer_ids=tuple(cache.manifest.layers),
        mask_token_id=cache.manifest.target.mask_token_id,
        speculator_type=config.speculator_type,
        num_layers=config.num_layers,
        block_size=config.block_size,
        markov_rank=config.markov_rank,
        markov_head_type=config.markov_head_type,
        enable_confidence_head=config.confidence_head_alpha > 0,
        draft_vocab_size=None if draft_ids is None else len(draft_ids),
    )
    torch.manual_seed(config.seed)  # initial weights; nothing else draws from torch's generator
    model = DraftModel(draft_config, cache.target, draft_ids, frozen_dtype=compute.dtype)
    model.to(device=compute.device, dtype=compute.dtype)
    sharded = config.strategy == "fsdp2"
    if compute.compiled:
        compile_draft(model, in_parts=sharded)
    if config.activation_checkpointing:
        checkpoint_activations(model)
    optimizer: Optimizer
    settings = AdamSettings(betas=config.betas, weight_decay=config.weight_decay, clip=config.grad_clip)
    if sharded:
        from dspark.train.optim.fsdp2 import ShardedAdamW

        optimizer = ShardedAdamW(model, settings, world, compute.dtype)
    else:
        kind = MasterMuon if config.optimizer == "muon" else MasterAdamW
        optimizer = kind(model.trained(), settings, world, shared=config.of_several == "zero")
    cuda = compute.device.type == "cuda"
    workers = config.workers
    if workers is None:
        # A row of 4,096 tokens in 16 bits is 25 (SmolLM2) to 250 MB (GLM-5.2) to read, check and decompress, on a process's share of the cores.
        workers = min(8, max(2, (os.cpu_count() or 1) // world.size - 1)) if cuda else 0

    def stream(samples: Int64, max_rows: int | None = None) -> Stream:
        return Stream(
            cache,
            samples,
            seed=config.seed,
            total_seq_len=row_length(cache, config.total_seq_len),
            rows_per_step=config.rows_per_step,
            block_size=config.block_size,
            max_anchors=config.max_anchors,
            pad=compute.compiled and config.max_anchors > 0,
            max_rows=max_rows,
        )

    training = stream(train)
    validation = stream(held_out, config.val_rows) if held_out.size else None
    # Packs once here, so that a sample longer than a row is refused before anything is written.
    training.plan(0)
    if validation is not None:
        validation.plan(VALIDATION_EPOCH)
    padding = None
    if sharded:
        fixed = (training.total_seq_len, training.max_anchors) if training.pad else (1, 1)
        layers, hidden = len(cache.manifest.layers), cache.manifest.target.hidden_size
        padding = blank(*fixed, config.block_size, layers, hidden, compute.device, compute.dtype)
    return Run(
        config, cache, compute, model, objective, optimizer, training, validation, coverage, workers, world,
        None if model.frozen_head.to_draft is None else model.frozen_head.to_draft.cpu(), padding,
    )  # fmt: skip


def compile_draft(model: DraftModel, *, in_parts: bool) -> None:
    """torch.compile. Rows are padded to one shape, so one compilation serves the run (and one without gradients, validation).

    ``in_parts``: layer by layer, what comes before them and what after, between FSDP2's hooks, which are no work for a compiler.
    """
    if not in_parts:
        model.compile(dynamic=False)
        return
    for module in (*model.layers, model.norm):
        module.forward = torch.compile(module.forward, dynamic=False)
    model.context = torch.compile(model.context, dynamic=False)  # type: ignore[method-assign]
    model.heads = torch.compile(model.heads, dynamic=False)  # type: ignore[method-assign]


def checkpoint_activations(model: DraftModel) -> None:
    """Keep only the input of each layer for backward. Set on the instances: a wrapping module would rename the parameters."""
    from torch.utils.checkpoint import checkpoint

    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
