"""The transform codec: states to cells and back, in plain torch, on whatever device they are.

What is predicted from the ids that the store holds anyway is not coded; the rest of all aux layers is coded together, in the basis in
which its coefficients are uncorrelated, with one step for all (``klt_tables.py``). The last state is predicted from the decoded aux
coefficients of its token and from the embeddings around it, and coded in a metric in which an error costs what it costs the target's
distribution. ``klt_fit.py`` finds the tables.

A row that the cells cannot hold (the massive activations of first tokens) is stored as it is.

Cells are decided in float32 (on CUDA with states in two bfloat16 parts), so where a coefficient lies within rounding of a cell's edge,
another device may choose the neighbour, at the same error. What was written is what every reader reads.

Legend: T tokens, M stored last states, L aux layers, H hidden size, C = L * H, K coefficients, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from dspark.cache.codec.klt_symbols import pack, quantise, unpack, value_table
from dspark.cache.codec.klt_tables import Tables, Transform

if TYPE_CHECKING:
    import torch

ROWS = {"cpu": 1024, "cuda": 8192}  # at once, so that what is made on the way stays small


class Context(NamedTuple):
    """What the decoder knows of a run of tokens. ``ids`` int64 [T]; ``previous`` int64 [T], -1 where a sample begins;
    ``last_at`` int64 [M], the token of each stored last state."""

    ids: torch.Tensor
    previous: torch.Tensor
    last_at: torch.Tensor

    @classmethod
    def of(cls, ids: torch.Tensor, starts: torch.Tensor, last_at: torch.Tensor) -> Context:
        """``starts``: first token of each sample, int64 [N]."""
        import torch

        ids = ids.long()
        previous = torch.roll(ids, 1)
        previous[starts] = -1
        return cls(ids, previous, last_at)


class Cells(NamedTuple):
    """``code`` uint8 [T, W]; ``exact``: which rows the cells cannot hold, int64 [n], rising."""

    code: torch.Tensor
    exact: torch.Tensor


@dataclass(frozen=True)
class Half:
    """One transform on one device, with what is derived from its tables.

    On CUDA products are of bfloat16, summed in float32; elsewhere of float32.
    """

    table: Transform
    device: torch.device

    @cached_property
    def wide(self) -> bool:
        """Whether products are of float32."""
        return self.device.type != "cuda"

    @cached_property
    def dtype(self) -> torch.dtype:
        import torch

        return torch.float32 if self.wide else torch.bfloat16

    @cached_property
    def forward(self) -> torch.Tensor:
        t = self.table
        found = t.back.t() if t.forward is None else t.forward
        return found.to(self.device, self.dtype).contiguous()

    @cached_property
    def subtract(self) -> torch.Tensor:
        """``predict @ forward`` [F, K]."""
        product = self.table.predict.to(self.device).float() @ self.forward.float()
        return product.to(self.dtype)

    @cached_property
    def restore(self) -> torch.Tensor:
        """[K + F, C]: coefficients and features to the row's deviation from the mean."""
        import torch

        t = self.table
        both = torch.cat([t.back, t.predict]).to(self.device).float() * t.deviation.to(self.device)
        return both.to(self.dtype)

    @cached_property
    def mean(self) -> torch.Tensor:
        return self.table.mean.to(self.device).float()

    @cached_property
    def inverse(self) -> torch.Tensor:
        return 1.0 / self.table.deviation.to(self.device).float()

    @cached_property
    def limits(self) -> torch.Tensor:
        import torch

        return torch.tensor(self.table.packing.limits(), dtype=torch.float32, device=self.device)

    @cached_property
    def values(self) -> list[torch.Tensor]:
        t = self.table
        found = value_table(t.packing, t.step, t.offsets)
        return [x.to(self.device, self.dtype) for x in found]

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """``a @ b`` in float32, ``b`` of this half's dtype; on CUDA ``a`` goes in as it is rounded to bfloat16."""
        import torch

        if self.wide:
            with torch.autocast(self.device.type, enabled=False):
                return a.float() @ b
        return torch.mm(a.to(torch.bfloat16), b, out_dtype=torch.float32)

    def coefficients(self, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """``y`` float32 [T, K] of rows ``x`` [T, C]."""
        import torch

        z = (x.float() - self.mean) * self.inverse
        y = self.product(z, self.forward)
        if not self.wide:  # what the rounding to bfloat16 left over
            y += self.product(z - z.to(torch.bfloat16).float(), self.forward)
        return y - self.product(features, self.subtract)

    def cells(self, x: torch.Tensor, features: torch.Tensor) -> Cells:
        """Code rows ``x`` [T, C]; an exact row's code is that of zeros."""
        import torch

        y = self.coefficients(x, features)
        q = quantise(y, self.table.step)
        fitting = torch.maximum(torch.minimum(q, self.limits), -self.limits)
        moved = ((q - fitting) * self.table.step).square().sum(1)
        exact = moved > self.table.limit
        fitting[exact] = 0
        return Cells(pack(fitting, self.table.packing), exact.nonzero()[:, 0])

    def read(self, code: torch.Tensor) -> torch.Tensor:
        """Coefficients [T, K] in this half's dtype."""
        return unpack(code, self.table.packing, self.values)

    def rows(self, y: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Rows float32 [T, C] from decoded coefficients."""
        import torch

        both = torch.cat([y, features.to(y.dtype)], 1)
        return self.product(both, self.restore).add_(self.mean)


@dataclass(frozen=True)
class Klt:
    """Both halves and the target's embedding (``embed`` [V, H], as the store holds it) on one device."""

    tables: Tables
    embed: torch.Tensor

    @cached_property
    def aux(self) -> Half:
        return Half(self.tables.aux, self.embed.device)

    @cached_property
    def last(self) -> Half:
        return Half(self.tables.last, self.embed.device)

    def embedding(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding, zeros where an id is -1."""
        found = self.embed.index_select(0, ids.clamp(min=0)).to(self.aux.dtype)
        return found * (ids >= 0)[:, None]

    def aux_features(self, context: Context, rows: slice) -> torch.Tensor:
        """[t, 2 H]: the embeddings of each token and of the one before."""
        import torch

        return torch.cat([self.embedding(context.ids[rows]), self.embedding(context.previous[rows])], 1)

    def last_features(self, context: Context, code: torch.Tensor, rows: slice) -> torch.Tensor:
        """[m, context + 3 H]: first coefficients of ``code`` (the tokens' aux cells), and the embeddings before, at and after."""
        import torch

        at = context.last_at[rows]
        y = self.aux.read(code.index_select(0, at))[:, : self.tables.context]
        ids = [context.previous[at], context.ids[at], context.ids[at + 1]]
        return torch.cat([y, *map(self.embedding, ids)], 1)

    def encode_aux(self, aux: torch.Tensor, context: Context) -> Cells:
        """Cells of ``aux`` [T, L, H]."""
        return _joined(
            [self.aux.cells(aux[s].flatten(1), self.aux_features(context, s)) for s in _pieces(aux)],
            _pieces(aux),
        )

    def encode_last(self, last: torch.Tensor, code: torch.Tensor, context: Context) -> Cells:
        """Cells of ``last`` [M, H]; ``code``: the aux cells of all tokens."""
        return _joined(
            [self.last.cells(last[s], self.last_features(context, code, s)) for s in _pieces(last)],
            _pieces(last),
        )

    def decode_aux(self, code: torch.Tensor, context: Context, dtype: torch.dtype) -> torch.Tensor:
        """Aux states [T, L, H]; rows that are stored exactly are the caller's to put in."""
        import torch

        t = self.tables
        out = torch.empty(code.shape[0], t.layers, t.hidden, dtype=dtype, device=code.device)
        for s in _pieces(code):
            rows = self.aux.rows(self.aux.read(code[s]), self.aux_features(context, s))
            out[s] = rows.view(-1, t.layers, t.hidden)
        return out

    def decode_last(
        self, last_code: torch.Tensor, code: torch.Tensor, context: Context, dtype: torch.dtype
    ) -> torch.Tensor:
        """Last states [M, H], from their cells and the aux cells of all tokens."""
        import torch

        out = torch.empty(last_code.shape[0], self.tables.hidden, dtype=dtype, device=code.device)
        for s in _pieces(last_code):
            out[s] = self.last.rows(self.last.read(last_code[s]), self.last_features(context, code, s))
        return out


def _pieces(x: torch.Tensor) -> list[slice]:
    size = ROWS.get(x.device.type, ROWS["cpu"])
    return [slice(i, min(i + size, x.shape[0])) for i in range(0, x.shape[0], size)] or [slice(0, 0)]


def _joined(found: list[Cells], pieces: list[slice]) -> Cells:
    import torch

    exact = [cells.exact + s.start for cells, s in zip(found, pieces, strict=True)]
    return Cells(torch.cat([cells.code for cells in found]), torch.cat(exact))
