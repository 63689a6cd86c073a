"""The interface of every codec: hidden states to the arrays that are stored, and back.

A codec belongs to a whole store: it codes the aux layers and the last state together, so that one
may be predicted from the other. It is chosen and recorded by name (``registry.py``), is a frozen
object, and works on whatever device the states are on: a dump encodes where the states are, so only
codes leave the device; a trainer moves codes and decodes on the GPU.

To add one, write a module with a ``Family`` and name it in ``registry.FAMILIES``. The family makes
a codec by name (``make``) and from what a store recorded (``load``). The codec:

- declares its arrays under the names that they have on disk, each an ``ArraySpec``. The axis says
  what a row is, and the name's first word says the axis: ``last_...`` has a row per stored last
  state, ``exact_...`` a row per token that is stored exactly, and any other (``aux_code``) a row
  per token. An array of axis ``exact`` has as many rows as the codec likes; the codec then also
  returns ``EXACT_TOKEN`` int64[X], rising: the token (counted from the batch's first) of each row.
  The store keeps the position within the sample, and equal rows once per part;
- may ask for chunks in column-major order (``order="columns"``, Zarr's ``transpose`` codec), so
  that values that repeat along tokens are adjacent for zstd;
- may predict from the tokens (``needs_tokens``): ``encode`` and ``decode`` then get ``Tokens``:
  ids, sample starts, the token of each last state, and the target's frozen embedding. Others get
  None, and their callers build nothing;
- may learn from a sample of states (``calibrated``). The results are tensors (``calibration``),
  which a store keeps in a separate file, hashed into its plan; everything else that decoding needs
  is in ``params`` (JSON).

Decoding a sample must not depend on the other samples of its batch: any sample can be read alone.
Within a sample, a codec may use earlier tokens' ids, but never their codes. Equal samples get equal
codes.

Legend: T tokens of a batch (padding may follow the last sample when decoding), M stored last
states, N samples, L aux layers, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt

from dspark.cache.errors import FormatVersionError
from dspark.cache.json_text import Json
from dspark.cache.records import Coded, CodedSample, TokenSample, joined_last_rows, last_rows
from dspark.cache.settings import DEFAULT_PACKING
from dspark.cache.shared.process import send

if TYPE_CHECKING:
    import torch

    from dspark.cache.repeats import Repeats

    Tensors = dict[str, torch.Tensor]

Axis = Literal["token", "last", "exact"]
Order = Literal["rows", "columns"]
EXACT_TOKEN = "exact_token"


def axis_of(name: str) -> Axis:
    """Return the axis of the codec's array ``name``, given by its first word."""
    first = name.split("_", maxsplit=1)[0]
    return first if first in ("last", "exact") else "token"  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One stored array of a codec: rows of shape ``[layers, width]``, or ``[width]`` if ``layers``
    is 0. ``pack``: how it is stored (``settings.PACKINGS``). ``axis``: what a row is. ``order``:
    order of the values inside a chunk. ``chunk``: rows per chunk; None = the store's choice.
    """

    dtype: str
    width: int
    pack: str = DEFAULT_PACKING
    axis: Axis = "token"
    layers: int = 0
    order: Order = "rows"
    chunk: int | None = None

    @property
    def row_shape(self) -> tuple[int, ...]:
        return (self.layers, self.width) if self.layers else (self.width,)

    @property
    def row_bytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize) * self.width * max(self.layers, 1)


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a codec may predict from, on the device of the states or codes.

    ``input_ids`` int64[T]. ``sample_start`` int64[N + 1]: first token of each sample, then the end
    of the last one (T, or less where padding follows). ``last_token`` int64[M]: the token of each
    stored last state. ``embedding`` [V, H]: the target's frozen input embedding. ``head`` [V, H]:
    its output matrix, for calibration (None = the embedding). ``share``: for calibration, of all
    tokens of the corpus those that are here.
    """

    input_ids: torch.Tensor
    sample_start: torch.Tensor
    last_token: torch.Tensor
    embedding: torch.Tensor
    head: torch.Tensor | None = None
    share: float = 0.0


class Codec(Protocol):
    """How the states of a store are coded; see the module docstring. ``pack``: how most of its
    arrays are stored.
    """

    @property
    def name(self) -> str:
        """The full name, by which ``registry.make`` finds it."""
        ...

    @property
    def params(self) -> Json: ...
    @property
    def pack(self) -> str: ...
    @property
    def bits(self) -> tuple[int | None, int | None]:
        """Nominal bits per value of the aux layers and of the last state; None if only a store's
        size tells.
        """
        ...

    @property
    def needs_tokens(self) -> bool: ...
    @property
    def needs_calibration(self) -> bool:
        """Whether coding is worse (or impossible) without ``calibrated``."""
        ...

    def calibration_tokens(self, layers: int, hidden: int) -> int:
        """Tokens of a large corpus that ``calibrated`` should see; 0 if there is nothing to
        learn.
        """
        ...

    def least_tokens(self, layers: int, hidden: int) -> int:
        """Minimum tokens of a corpus worth calibrating on; with fewer, another codec is smaller or
        better. 0 = any.
        """
        ...

    def learnt_bytes(self, layers: int, hidden: int) -> int:
        """Expected bytes of the store's calibration file; 0 where there is none."""
        ...

    def fitting_bytes(self, layers: int, hidden: int, vocab: int) -> int:
        """Bytes that ``calibrated`` needs on the device where it sums, the target's matrices
        included; 0 for a few.
        """
        ...

    def arrays(self, layers: int, hidden: int) -> dict[str, ArraySpec]: ...
    def disk_bytes(
        self, layers: int, hidden: int, last_share: float = 1.0, repeats: Repeats | None = None
    ) -> float:
        """Expected bytes of states per token on disk; exact if nothing is compressed;
        ``last_share`` = stored last states / tokens. ``repeats``: of the text, if it is known.
        """
        ...

    def encode(
        self, aux: torch.Tensor, last: torch.Tensor, tokens: Tokens | None = None
    ) -> Tensors:
        """Encode ``aux`` [T, L, H] and ``last`` [M, H], any float dtype, on their device. Raises
        EngineError for states that cannot be coded.
        """
        ...

    def decode(
        self,
        coded: Mapping[str, torch.Tensor],
        hidden: int,
        tokens: Tokens | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode ``aux`` [T, L, H] and ``last`` [M, H] in ``dtype``; by default in the narrowest
        that holds the stored values.
        """
        ...

    def calibrated(
        self, aux: torch.Tensor, last: torch.Tensor, tokens: Tokens | None = None
    ) -> Codec:
        """Return this codec calibrated on a sample of what it will code."""
        ...

    def calibration(self) -> Tensors:
        """The results of ``calibrated``, on the CPU; empty if there are none."""
        ...

    def repacked(self, pack: str) -> Codec:
        """Return a codec with the same codes, stored as ``pack`` says. Raises UsageError if that is
        impossible.
        """
        ...


class Family(Protocol):
    """Codecs that share a name's first word."""

    def names(self) -> list[str]: ...
    def make(self, name: str, pack: str) -> Codec:
        """Make a codec, not yet calibrated. Raises UsageError for an unknown name or ``pack``."""
        ...

    def load(
        self,
        name: str,
        params: Json,
        pack: str,
        calibration: Mapping[str, torch.Tensor],
        where: str,
    ) -> Codec:
        """Load a codec as a store recorded it. Raises FormatVersionError for what this release does
        not know.
        """
        ...


def tokens_of(samples: Sequence[TokenSample], embedding: torch.Tensor) -> Tokens:
    """Return the ``Tokens`` of concatenated ``samples``, on the device of ``embedding``."""

    ids = np.concatenate([s.input_ids for s in samples]).astype(np.int64)
    start = np.cumsum([0, *(len(s.input_ids) for s in samples)], dtype=np.int64)
    stored = joined_last_rows(np.concatenate([s.loss_mask for s in samples]), start)
    arrays = (ids, start, np.flatnonzero(stored))
    input_ids, sample_start, last_token = (send(a, embedding.device) for a in arrays)
    return Tokens(input_ids, sample_start, last_token, embedding)


def join_states(samples: Sequence[CodedSample]) -> Coded:
    """Concatenate the coded states of ``samples``."""
    out: Coded = {
        name: np.concatenate([s.states[name] for s in samples]) for name in samples[0].states
    }
    if EXACT_TOKEN in out:
        out[EXACT_TOKEN] = np.concatenate(from_first_token(samples))
    return out


def from_first_token(samples: Sequence[CodedSample]) -> list[npt.NDArray[np.int64]]:
    """Return ``EXACT_TOKEN`` of all ``samples``, counted from the first token of the first."""
    start = np.cumsum([0, *(len(s.tokens.input_ids) for s in samples[:-1])])
    return [
        s.states[EXACT_TOKEN].astype(np.int64) + at for s, at in zip(samples, start, strict=True)
    ]


def split_states(
    tokens: Sequence[TokenSample], coded: Coded, specs: Mapping[str, ArraySpec]
) -> list[CodedSample]:
    """Split what ``join_states`` joined, by sample; returns views."""
    ends = np.cumsum([len(t.input_ids) for t in tokens])
    cut = {
        "token": ends[:-1],
        "last": np.cumsum([int(last_rows(t.loss_mask).sum()) for t in tokens])[:-1],
    }
    exact = coded.get(EXACT_TOKEN)
    if exact is not None:
        cut["exact"] = np.searchsorted(exact, ends[:-1])
    pieces = {name: np.split(coded[name], cut[spec.axis]) for name, spec in specs.items()}
    if exact is not None:
        start = [0, *ends[:-1]]
        pieces[EXACT_TOKEN] = [
            x - at for x, at in zip(np.split(exact, cut["exact"]), start, strict=True)
        ]
    return [
        CodedSample(t, {name: p[i] for name, p in pieces.items()}) for i, t in enumerate(tokens)
    ]


def to_numpy(
    coded: Mapping[str, torch.Tensor],
) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    """Copy codes from any device to numpy arrays on the host, bit for bit."""
    return {name: t.cpu().numpy() for name, t in coded.items()}


def refuse_other_params(known: Codec, params: Json, where: str) -> None:
    """Raise FormatVersionError unless a store recorded the ``params`` that this release's codec of
    that name has.
    """
    if known.params != params:
        raise FormatVersionError(
            f"{where}: codec {known.name} has parameters {params}, this release knows "
            f"{known.params}. Use the dspark release that wrote the store."
        )
