"""Estimate the device memory of a run before it starts: parameters exactly, the rest from the
largest tensors.

Legend: S tokens of a row, L aux layers, H hidden size, A anchors, B slots, Q = A*B, D head size, I
intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dspark.cache.target import taps
from dspark.train.data.held import kept_bytes, rows_of
from dspark.train.draft.config import DraftConfig
from dspark.train.draft.layers import Attention, Mlp
from dspark.train.optim.muon import is_matrix
from dspark.train.run.setup import Run


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device: ``frozen`` target matrices (and W2's copy beside one), ``trained``
    weights with masters, gradients and moments, and of a ``row`` the states (this row's and the
    next one's) and what backward keeps.
    """

    frozen: int
    trained: int
    row: int

    @property
    def total(self) -> int:
        return self.frozen + self.trained + self.row


def row_bytes(
    config: DraftConfig, tokens: int, anchors: int, width: int, *, recompute: bool
) -> int:
    """Return the bytes of a row's states and of the activations kept for the backward pass, at
    ``width`` bytes per element. ``recompute``: only the layers' inputs are kept, and one layer's
    activations at a time.
    """
    h, q = config.hidden_size, anchors * config.block_size
    heads, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    states = 2 * tokens * len(config.target_layer_ids) * h + q * h
    context = 3 * tokens * h  # fc's output, its norm, its gradient
    # Inputs of the two norms and of the projections, q/k before and after norm and rotation,
    # attention's output, the MLP's two halves.
    inside = q * (4 * h + 4 * heads + 4 * keys + 3 * config.intermediate_size) + tokens * 4 * keys
    layers = config.num_layers * q * h + inside if recompute else config.num_layers * inside
    slots = q * (3 * h + 2 * config.markov_rank)  # gathered states, targets and their gradients
    return width * (states + context + layers + slots)


def estimate_memory(run: Run) -> Memory:
    """Estimate the memory of this rank's device."""
    config, model = run.config, run.model
    width = run.compute.dtype.itemsize
    count = sum(p.numel() for _, p in model.trained())
    own = {id(p) for _, p in model.trained()}
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in own)
    head = model.frozen_head
    if head.wide is not None:
        frozen += (head.wide.numel() - head.draft_head.numel()) * head.wide.element_size()
    if config.strategy == "fsdp2":
        # Shards of master, summed gradient and moments; during a step whole weights, copies of
        # those that share a product and a float32 sum of the rows' gradients.
        copies = sum(
            w.numel() for m in model.modules() if isinstance(m, Attention | Mlp) for w in m.joined
        )
        trained = 16 * count // run.world.size + (width + 4) * count + width * copies
        if config.optimizer == "muon":  # one moment where AdamW has two
            trained -= (
                4
                * sum(p.numel() for n, p in model.trained() if is_matrix(n, p))
                // (run.world.size)
            )
    else:
        holders = run.world.size if config.of_several == "zero" else 1
        # Weights and gradients whole; moments, and a master beside the weights unless they are
        # float32 themselves.
        trained = count * (width + 4) + count * (8 if width == 4 else 12) // holders
        if config.optimizer == "muon":  # one moment where AdamW has two
            matrices = sum(p.numel() for n, p in model.trained() if is_matrix(n, p))
            trained -= 4 * matrices // holders
            if run.world.size > 1:  # this rank's share of the factors, until they are sent
                trained += width * matrices // run.world.size
    tokens = run.stream.total_seq_len
    anchors = config.max_anchors or tokens
    row = row_bytes(model.config, tokens, anchors, width, recompute=config.activation_checkpointing)
    return Memory(frozen, trained, row)


def describe(run: Run) -> str:
    """Return the lines to print: what is trained on what, the layers it reads, and the memory it
    will take.
    """
    m, world, config = estimate_memory(run), run.world, run.config
    count = sum(p.numel() for _, p in run.model.trained())
    rows = -(-config.rows_per_step // world.size)
    where = f"{world.size} x {run.compute.device.type}" + (
        f" ({config.of_several})" if world.size > 1 else ""
    )
    return (
        f"draft of {count / 1e6:.1f} M trained parameters, "
        f"{str(run.compute.dtype).removeprefix('torch.')} on {where}: "
        f"{config.rows_per_step} rows of {run.stream.total_seq_len} tokens per step, "
        f"{rows} per process, one after another"
        + (f"; recipe {config.recipe}" if config.recipe else "")
        + f"\n{_layers(run)}{_mixture(run)}"
        + f"\nmemory per device, about: {_gb(m.trained)} weights, masters, gradients, moments "
        f"+ {_gb(m.frozen)} target's matrices "
        f"+ {_gb(m.row)} per row = {_gb(m.total)}, and the objective's chunks of logits"
        + _on_host(run)
        + "\nhost memory of the copy that checkpoints are written from (first process): "
        + _gb(run.optimizer.snapshot_bytes())
    )


def _on_host(run: Run) -> str:
    """Return a line about the rows that are read ahead and those that are kept, if there are
    any.
    """
    cuda, rank, world = run.compute.device.type == "cuda", run.world.rank, run.world.size
    parts = []
    if run.workers or cuda:
        need = run.stream.need(0, world)
        parts.append(
            f"{_gb(need.host(run.workers))} "
            + ("page-locked " if cuda else "")
            + f"for {need.count(run.workers)} rows of {_gb(need.row)} ({run.workers} readers)"
        )
    if run.validation is not None:
        parts.append(
            f"{_gb(kept_bytes(run.validation, rank, world))} "
            f"for {rows_of(run.validation, rank, world)} held-out rows"
        )
    return f"\nhost memory per process, about: {' + '.join(parts)}" if parts else ""


def _layers(run: Run) -> str:
    manifest, config = run.cache.manifest, run.model.config
    return taps.remark(
        config.speculator_type, config.target_layer_ids, manifest.layers, config.num_target_layers
    )


def _mixture(run: Run) -> str:
    """Return a line per store if there are several: what an epoch takes from each."""
    if len(run.cache.stores) == 1:
        return ""
    samples = run.stream.plan(0).taken
    which = np.searchsorted(run.cache.starts, samples, side="right") - 1
    taken = np.bincount(which, run.cache.lengths[samples], len(run.cache.stores))
    parts = [
        f"{store.path} {passes:g} times {len(store)} samples ({100 * tokens / taken.sum():.0f} % "
        "of the tokens)"
        for store, (_, passes), tokens in zip(
            run.cache.stores, run.config.stores, taken, strict=True
        )
    ]
    return "\nper epoch: " + ", ".join(parts)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
