"""``dspark-tools check``: a draft's files, read to find what is wrong with it before it is served,
and what a finding says. ``dspark.tools.check.rules`` judges them.

A draft that is served wrongly does not fail: fewer of its tokens are accepted. Others shipped
drafts with 1 % acceptance because of a flag (vLLM #47093, #48639, #56792). Every finding says
whether it is certain:

- ``error``: two pieces of evidence contradict each other, or a reader cannot read the file. The
  record of training is in the header of the weights (``export.trained_as``) and, beside the draft,
  in store.json and training.json.
- ``suspicion``: the draft runs, but something looks like a known mistake.
  ``dspark.tools.check.symptoms`` adds those that only decoding shows.
- ``note``: nothing is wrong; says what could not be judged, or what a server will do. Only the
  draft's own tensors are loaded here; ``check`` in ``dspark.tools.check.stages`` adds the target
  and the real server.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dspark.cache.errors import DraftError, UsageError
from dspark.tools import records
from dspark.tools.shapes import Optional, require
from dspark.train.draft.config import DraftConfig
from dspark.train.draft.saved import folder as export
from dspark.train.draft.saved.speculators import MARK, to_flat
from dspark.train.draft.saved.spelling import flat_of
from dspark.train.draft.types import TYPES, DrafterType, drafter, type_of

# Keys that vLLM prefers to target_layer_ids in a flat config, and keys that change the attention or
# the mask token.
OVERRIDES = (
    "dspark_target_layer_ids",
    "eagle_aux_hidden_state_layer_ids",
    "dflash_config",
    "use_swa",
    "logit_scale",
)


# What the judges below compute with; a value of the wrong type, such as from an editing slip,
# cannot be judged at all.
_ROPE = {"rope_theta": Optional(float)}
_READ = _ROPE | {
    "target_layer_ids": Optional([int]),
    "aux_hidden_state_layer_ids": Optional([int]),
    "block_size": Optional(int),
    "max_position_embeddings": Optional(int),
    "rope_parameters": Optional(_ROPE | {"full_attention": Optional(_ROPE)}),
    "speculators_config": Optional(
        {"proposal_methods": Optional([{"speculative_tokens": Optional(int)}])}
    ),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """``level``: error, suspicion or note; ``name``: which mistake (layout-flag, layer-ids, norm,
    mask-token, vocabulary, rope, tensors, head, block-size, config, ...); ``text``: what was found,
    what was expected, what to do.
    """

    level: str
    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Files:
    """A draft folder: config.json as written, its flat form, the tensors, and what training left
    beside them.
    """

    folder: Path
    raw: dict[str, Any]
    flat: dict[str, Any]
    tensors: dict[str, Tensor]
    trained: DraftConfig | None
    store: dict[str, Any]
    training: dict[str, Any]

    @property
    def layout(self) -> dict[str, bool]:
        """``sample_from_anchor`` as the weights were trained: true for ours, whatever config.json
        says; for others, what it says.
        """
        return {
            "sample_from_anchor": self.trained is not None
            or self.flat.get("sample_from_anchor") is not False
        }

    @property
    def speculators(self) -> bool:
        return MARK in self.raw

    @property
    def kind(self) -> DrafterType:
        """The drafter type that config.json describes; the first one if it describes none."""
        try:
            return type_of(self.flat)
        except UsageError:
            return drafter(next(iter(TYPES)))

    def described(self) -> DraftConfig | None:
        """The draft that config.json describes, ignoring its layout flag and keys for servers; None
        if it describes none.
        """
        own = {k: v for k, v in self.flat.items() if k not in OVERRIDES or k in self.kind.own_keys}
        try:
            return DraftConfig.from_flat(own | self.layout)
        except DraftError:
            return None

    @classmethod
    def read(cls, folder: str) -> Files:
        """Read a draft folder. Raises DraftError only if there is nothing to judge."""
        raw = export.read_config(folder)
        trained = export.trained_as(folder)
        flat = to_flat(_readable(raw, folder)) if MARK in raw else dict(raw)
        # another program's: its form is not an error, but contradictions in it are
        if trained is None:
            flat = flat_of(raw)
        _readable(flat, folder)
        return cls(
            Path(folder), raw, flat, export.read_tensors(folder), trained,
            records.store(Path(folder)), records.training(Path(folder)),
        )  # fmt: skip


def _readable(config: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return ``config`` if every key used in computations has the right type. Raises DraftError."""
    remedy = (
        "expected the config of a draft; correct that key first, since nothing else can "
        "be judged without it"
    )
    require(config, _READ, Path(folder) / export.CONFIG, remedy)
    return config


def to_json(findings: list[Finding]) -> list[dict[str, str]]:
    return [dataclasses.asdict(f) for f in findings]
