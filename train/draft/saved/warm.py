"""``--init-from``: a new training that starts from the weights of an existing draft, ours or
another program's.

What affects only one part of a draft may differ: the number of layers, the block size, the draft's
vocabulary, the Markov and confidence heads. What every tensor depends on (the target's sizes, the
layers that are read, the width of a layer) must be equal. Nothing is left out silently: ``Start``
names every tensor of the earlier draft that was not used, and every one of the new draft that
starts as in any training. A layer that the earlier draft does not have starts as the identity (its
two output projections are zero), so a deeper draft starts with the earlier one's proposals.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dspark.cache.errors import MismatchError
from dspark.train.draft.config import DraftConfig
from dspark.train.draft.model import DraftModel, TargetWeights
from dspark.train.draft.saved.folder import (
    FROZEN,
    WEIGHTS,
    check_frozen,
    draft_ids_of,
    load_config,
    read_tensors,
)  # fmt: skip
from dspark.train.draft.types import drafter

if TYPE_CHECKING:
    from dspark.cache.manifest import TargetInfo

# What determines all tensors of a layer -> the flag that sets it.
_WIDTHS = {
    "num_heads": "--num-heads",
    "num_kv_heads": "--num-kv-heads",
    "head_dim": "--head-dim",
    "intermediate_size": "--intermediate-size",
}
# Taken from the earlier draft whatever the target says: its weights were trained with them.
_KEPT = ("mask_token_id", "rms_norm_eps", "rope_theta", "confidence_head_with_markov", "is_causal")
# Parts that may be omitted or start fresh; any other tensor must fit.
_HEADS = ("markov_head.", "confidence_head.")
_W2 = "markov_head.markov_w2.weight"
_OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


@dataclass(frozen=True, slots=True)
class Start:
    """What a warm start used. ``left``, ``begun``: tensor name -> why it was not used, or what it
    starts as instead.
    """

    folder: str
    weights_sha256: str
    taken: int
    left: dict[str, str]
    begun: dict[str, str]
    changed: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def words(self) -> str:
        """Return lines to print, with each tensor by name."""
        head = (
            f"warm start from {self.folder} (weights {self.weights_sha256[:12]}): {self.taken} "
            "tensors taken"
        )
        lines = [f"  {k}: {v}" for k, v in self.changed.items()]
        lines += [f"  not taken: {name} ({why})" for name, why in self.left.items()]
        lines += [f"  begun anew: {name} ({how})" for name, how in self.begun.items()]
        return "\n".join([head, *lines])


@dataclass(frozen=True, slots=True)
class Origin:
    """The earlier draft: its config, and once ``opened``, its tensors and the target ids int64[Vd]
    of a reduced vocabulary.
    """

    folder: str
    config: DraftConfig
    tensors: dict[str, Tensor]
    draft_ids: Tensor | None
    weights_sha256: str

    @classmethod
    def open(cls, folder: str, target: TargetInfo, stored: list[int], settings: Any) -> Origin:
        """Read the draft in ``folder``. Raises MismatchError, before its weights are read, unless
        it fits the store and ``settings``.

        ``target``, ``stored``: the store's target and the layers that it holds; ``settings``: a
        ``TrainConfig``.
        """
        config = load_config(folder)
        kind, wanted = drafter(config.speculator_type), drafter(settings.speculator_type)
        if not wanted.starts_from(kind):
            raise MismatchError(
                f"--init-from {folder}: a {wanted.name} draft cannot start from a {kind.name} "
                f"draft's tensors; use --speculator-type {kind.name}, or omit --init-from"
            )
        _fits(folder, config, target, stored)
        path = Path(folder) / WEIGHTS
        tensors = read_tensors(folder)
        ids = draft_ids_of(tensors, config, path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(folder, config, kind.learnt(tensors, path), ids, digest)

    def shaped(self, config: DraftConfig) -> DraftConfig:
        """Return ``config``, as the settings ask for, with what the tensors were trained with.
        Raises MismatchError for another width.
        """
        for field, flag in _WIDTHS.items():
            now, then = getattr(config, field), getattr(self.config, field)
            if now != then:
                raise MismatchError(
                    f"--init-from {self.folder}: its layers have {field} {then}, but this "
                    f"training {now}; use {flag} {then}, or omit --init-from"
                )
        kept: dict[str, Any] = {name: getattr(self.config, name) for name in _KEPT}
        return dataclasses.replace(config, target_layer_ids=self.config.target_layer_ids, **kept)

    def give(self, model: DraftModel, target: TargetWeights) -> Start:
        """Copy what fits into the untrained ``model``, on any device. Raises DraftError for another
        model's draft.
        """
        with_ids = model.frozen_head.draft_ids
        same_ids = _same(self.draft_ids, with_ids)
        check_frozen(self.tensors, target, self.draft_ids, Path(self.folder) / WEIGHTS)
        stored = {n: t for n, t in self.tensors.items() if n not in FROZEN}
        begun, taken = dict[str, str](), set[str]()
        for name, parameter in model.trained():
            value = stored.get(name)
            if (
                value is not None
                and name == _W2
                and not same_ids
                and value.shape[1] == parameter.shape[1]
            ):
                begun |= self._rows(parameter, value, with_ids)
                taken.add(name)
            elif value is not None and value.shape == parameter.shape:
                _copy(parameter, value)
                taken.add(name)
            elif value is not None and not name.startswith(_HEADS):
                found, expected = list(value.shape), list(parameter.shape)
                raise MismatchError(
                    f"--init-from {self.folder}: {name} is {found}, this draft's {expected}"
                )
            else:
                begun[name] = _began(parameter, name, value)
        model.join()
        left = {
            n: _why(n, t, dict(model.trained()))
            for n, t in sorted(stored.items())
            if n not in taken
        }
        return Start(
            self.folder, self.weights_sha256, len(taken), left, begun, self._changed(model.config)
        )

    def _rows(self, parameter: Tensor, value: Tensor, ids: Tensor | None) -> dict[str, str]:
        """Copy the rows of W2 whose token both vocabularies have; the others stay as in any
        training.
        """
        whole = self.config.vocab_size
        own = torch.arange(whole) if self.draft_ids is None else self.draft_ids
        wanted = torch.arange(whole) if ids is None else ids.cpu()
        row = torch.full((whole,), -1)
        row[own] = torch.arange(own.shape[0])
        source = row[wanted]
        at = (source >= 0).nonzero().flatten()
        with torch.no_grad():
            parameter[at.to(parameter.device)] = value[source[at]].to(parameter)
        fresh = wanted.shape[0] - at.shape[0]
        dropped = own.shape[0] - at.shape[0]
        if not fresh and not dropped:
            return {}
        return {
            _W2: f"{fresh} of {wanted.shape[0]} rows belong to tokens that the earlier "
            f"vocabulary lacks; {dropped} of its rows are not used"
        }

    def _changed(self, config: DraftConfig) -> dict[str, str]:
        fields = (
            "speculator_type",
            "num_layers",
            "block_size",
            "draft_vocab_size",
            "markov_head_type",
            "markov_rank",
            "bonus_anchor",
            "sliding_window",
            "layer_types",
            "rope_scaling",
        )
        both = ((f, getattr(self.config, f), getattr(config, f)) for f in fields)
        return {f: f"{then} there, {now} now" for f, then, now in both if then != now}


def settings_of(folder: str) -> dict[str, Any]:
    """Return the training settings that give a draft the shape of the one in ``folder``; given
    flags override them.
    """
    c = load_config(folder)
    out: dict[str, Any] = {
        "speculator_type": c.speculator_type,
        "num_layers": c.num_layers,
        "num_heads": c.num_heads,
        "num_kv_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.intermediate_size,
        "block_size": c.block_size,
    }
    if c.sliding_window:
        mixed = {"layer_types": c.layer_types} if len(set(c.layer_types)) > 1 else {}
        out |= {"sliding_window": c.sliding_window, **mixed}
    if c.rope_scaling:
        out["rope_scaling"] = json.dumps(c.rope_scaling, sort_keys=True)
    if c.markov_rank:
        out |= {"markov_rank": c.markov_rank, "markov_head_type": c.markov_head_type}
    return out | ({"draft_vocab_size": c.draft_vocab_size} if c.reduced_vocab else {})


def _fits(folder: str, config: DraftConfig, target: TargetInfo, stored: list[int]) -> None:
    for name, own, theirs in (
        ("hidden_size", config.hidden_size, target.hidden_size),
        ("vocab_size", config.vocab_size, target.vocab_size),
    ):
        if own != theirs:
            raise MismatchError(
                f"--init-from {folder}: the draft's {name} is {own}, the store's target "
                f"{target.id} has {theirs}: the draft is for another model"
            )
    if missing := sorted(set(config.target_layer_ids) - set(stored)):
        layers = ",".join(map(str, config.target_layer_ids))
        raise MismatchError(
            f"--init-from {folder}: the draft reads the outputs of layers {layers}, the store "
            f"holds {stored}, without {missing}. Dump one with --layers {layers}, or omit "
            "--init-from"
        )


def _copy(parameter: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a.cpu(), b.cpu())


def _began(parameter: Tensor, name: str, value: Tensor | None) -> str:
    if value is not None:
        return f"has another shape there, {list(value.shape)}"
    if not name.startswith("layers."):
        return "the earlier draft has none"
    if name.endswith(_OUTPUTS):
        with torch.no_grad():
            parameter.zero_()
        return "zero, so that the new layer starts as the identity"
    return "belongs to a layer that the earlier draft lacks"


def _why(name: str, value: Tensor, wanted: Mapping[str, Tensor]) -> str:
    if name in wanted:
        return f"{list(value.shape)}, here {list(wanted[name].shape)}"
    if re.match(r"layers\.\d+\.", name):
        return "belongs to a layer that this draft does not have"
    return "this draft has no such tensor"
