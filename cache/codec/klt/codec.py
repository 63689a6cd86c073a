"""The transform codec ``klt-A-L-C``: A bits per value of the aux layers and L per value of the last
state, on disk; ``klt-A-L`` is the same with C = 1.

What can be predicted from the stored token ids is not coded; the remainder of all aux layers is
coded together, in the basis in which its coefficients are uncorrelated, with one step for all
(``tables.py``). A token whose last state is not stored (of a prompt) is no anchor and only ever
context: its step is C times as large, so that at equal bytes the step of the others is smaller. The
last state is predicted from the decoded aux coefficients of its token and from the embeddings
around it, and coded in a metric in which an error costs what it costs the target's distribution.
``fit.py`` finds the tables; without them nothing can be coded. A row that the cells cannot hold
(the massive activations of first tokens) is stored exactly.

Legend: T tokens, M stored last states, L aux layers, H hidden size, C = L * H, X tokens stored
exactly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from dspark.cache.codec.base import EXACT_TOKEN, ArraySpec, Tokens, refuse_other_params
from dspark.cache.codec.klt import fast
from dspark.cache.codec.klt.fast import Seen
from dspark.cache.codec.klt.half import half_on
from dspark.cache.codec.klt.symbols import BAND, CLASSES
from dspark.cache.codec.klt.tables import CONTEXT, Tables
from dspark.cache.codec.state_errors import check_finite
from dspark.cache.errors import UsageError
from dspark.cache.settings import DEFAULT_PACKING, klt_name, klt_numbers

if TYPE_CHECKING:
    import torch

    from dspark.cache.codec.base import Tensors
    from dspark.cache.codec.klt.half import Half
    from dspark.cache.json_text import Json
    from dspark.cache.repeats import Repeats

log = logging.getLogger("dspark.cache")
# tokens: of 128, 256, 512 and 1,024 they take 11, 4, 0 and -2 % more bytes; a sample reads half a
# chunk too much at each end
CHUNK = 512
ROWS = {"cpu": 1024, "cuda": 8192}  # rows at once, in plain torch
PARAMS: Json = {"classes": [list(c) for c in CLASSES], "band": BAND}
# tokens of calibration per dimension of a row of all aux layers; the last state is predicted from
# as many features, and about half of the tokens have one
PER_DIMENSION = 48
# of the corpus, a quarter of which is used: with fewer, the basis fits the sample and not the
# corpus
LEAST_PER_DIMENSION = 16


@dataclass(frozen=True, slots=True)
class Klt:
    """``tables``: the calibration; None before it. ``coarse``: C. Two codecs are equal if they
    store the same codes in the same way.
    """

    aux_bits: float
    last_bits: float
    pack: str = DEFAULT_PACKING
    coarse: float = 1.0
    digest: str | None = None
    tables: Tables | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        return klt_name(self.aux_bits, self.last_bits, self.coarse)

    @property
    def params(self) -> Json:
        return PARAMS

    @property
    def bits(self) -> tuple[int | None, int | None]:
        return None, None

    @property
    def needs_tokens(self) -> bool:
        return True

    @property
    def needs_calibration(self) -> bool:
        return True

    @property
    def learnt(self) -> Tables:
        """The tables. Raises UsageError before ``calibrated``."""
        if self.tables is None:
            raise UsageError(f"codec {self.name} must be calibrated on states before it codes any")
        return self.tables

    def calibration_tokens(self, layers: int, hidden: int) -> int:
        """Tokens that ``calibrated`` should see."""
        return PER_DIMENSION * layers * hidden

    def least_tokens(self, layers: int, hidden: int) -> int:
        return LEAST_PER_DIMENSION * layers * hidden

    def learnt_bytes(self, layers: int, hidden: int) -> int:
        """Both bases, whole, the second one also backwards, and what predicts in them: from two
        embeddings, and from three and ``context`` coefficients.
        """
        channels = layers * hidden
        aux = channels * channels + 2 * hidden * channels
        return 2 * (aux + 2 * hidden * hidden + (CONTEXT + 3) * hidden * hidden)

    def fitting_bytes(self, layers: int, hidden: int, vocab: int) -> int:
        """The sums, the covariance and a regression beside them (``regression``), a piece of states
        in float32, and the target's matrices in 16 bits. Equations that need more are solved on the
        host (``where_it_fits``).
        """
        from dspark.cache.codec.klt.moments import sums_bytes
        from dspark.cache.codec.klt.pieces import PIECE

        width = (layers + 2) * hidden
        return 3 * sums_bytes(width) + 3 * 4 * PIECE * width + 2 * 2 * vocab * hidden

    def arrays(self, layers: int, hidden: int) -> dict[str, ArraySpec]:
        """The widths come from the calibration; before it, SmolLM2's at one bit (to plan
        memory).
        """
        if self.tables is None:
            aux, last = round(0.42 * layers * hidden), round(0.35 * hidden)
        else:
            aux, last = self.tables.aux.packing.width, self.tables.last.packing.width
        columns = ArraySpec("uint8", aux, self.pack, order="columns", chunk=CHUNK)
        exact = ArraySpec("uint16", hidden, self.pack, axis="exact")
        return {
            "aux_code": columns,
            "last_code": replace(columns, width=last, axis="last"),
            "exact_aux": replace(exact, layers=layers),
            "exact_last": exact,
        }

    def disk_bytes(
        self, layers: int, hidden: int, last_share: float = 1.0, repeats: Repeats | None = None
    ) -> float:
        """What the name says: the step is set by bytes as a store has them (``rate.py``). The
        first tokens' rows, one of each in a part, are not counted.
        """
        return hidden * (self.aux_bits * layers + last_share * self.last_bits) / 8

    def calibrated(
        self, aux: torch.Tensor, last: torch.Tensor, tokens: Tokens | None = None
    ) -> Klt:
        """Raises UsageError for fewer than two samples."""
        from dspark.cache.codec.klt.fit import fit

        tokens = self._known(tokens)
        tables = fit(
            aux,
            last,
            tokens,
            aux_bits=self.aux_bits,
            last_bits=self.last_bits,
            coarse=self.coarse,
            say=log.info,
        )
        return self.with_tables(tables)

    def with_tables(self, tables: Tables) -> Klt:
        return replace(self, tables=tables, digest=tables.digest())

    def calibration(self) -> Tensors:
        return {} if self.tables is None else self.tables.tensors()

    def repacked(self, pack: str) -> Klt:
        if pack != "zstd":
            raise UsageError(
                f"--pack {pack}: codec {self.name} has cells of unequal probability, and only "
                "zstd makes them smaller. Leave --pack at zstd, or choose a rotated "
                "codec."
            )
        return replace(self, pack=pack)

    def _known(self, tokens: Tokens | None) -> Tokens:
        if tokens is None:
            raise UsageError(
                f"codec {self.name} predicts from tokens but got none: pass Tokens (codec.base)"
            )
        return tokens

    # -- coding ------------------------------------------------------------------------------------

    def encode(
        self, aux: torch.Tensor, last: torch.Tensor, tokens: Tokens | None = None
    ) -> Tensors:
        import torch

        tokens = self._known(tokens)
        check_finite(aux, last)
        t, device = self.learnt, aux.device
        a, b = half_on(t.aux, device), half_on(t.last, device)
        known = Known.of(tokens)
        code, outside = _encoded(a, aux.flatten(1), known.around)
        last_code, last_outside = _encoded(
            b, last, lambda s: known.near(tokens.last_token[s], a, code, t.context)
        )
        # Not by a mask, whose true values the host would wait for; every last state has its token.
        outside[tokens.last_token] = outside[tokens.last_token] | last_outside
        exact = outside.nonzero()[:, 0]
        place = torch.full((aux.shape[0],), -1, dtype=torch.int64, device=device)
        place[tokens.last_token] = torch.arange(last.shape[0], device=device)
        row = place[exact]
        exact_last = (
            last[row.clamp(min=0)] if last.shape[0] else last.new_zeros(row.shape[0], t.hidden)
        )
        exact_last = torch.where((row >= 0)[:, None], exact_last, torch.zeros_like(exact_last))
        return {
            "aux_code": code,
            "last_code": last_code,
            "exact_aux": _bits(aux[_same_first(exact, known)]),
            "exact_last": _bits(exact_last),
            EXACT_TOKEN: exact,
        }

    def decode(
        self,
        coded: Mapping[str, torch.Tensor],
        hidden: int,
        tokens: Tokens | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        tokens = self._known(tokens)
        t, code, last_code = self.learnt, coded["aux_code"], coded["last_code"]
        device, dtype = code.device, dtype or torch.float32
        a, b = half_on(t.aux, device), half_on(t.last, device)
        known = Known.of(tokens)
        aux = _decoded(a, code, known.around, dtype).view(-1, t.layers, hidden)
        last = _decoded(
            b, last_code, lambda s: known.near(tokens.last_token[s], a, code, t.context), dtype
        )
        exact = coded[EXACT_TOKEN].long()
        aux[exact] = _values(coded["exact_aux"]).to(dtype)
        place = torch.full((code.shape[0],), -1, dtype=torch.int64, device=device)
        place[exact] = torch.arange(exact.shape[0], device=device)
        row = place[tokens.last_token]
        if exact.shape[0]:
            found = _values(coded["exact_last"])[row.clamp(min=0)].to(dtype)
            last = torch.where((row >= 0)[:, None], found, last)
        return aux, last


@dataclass(frozen=True, slots=True)
class Known:
    """What the decoder knows about tokens beside their codes. ``previous`` int64 [T]: the id
    before, -1 at the start of a sample. ``coarse`` bool [T]: that no last state is stored.
    """

    tokens: Tokens
    previous: torch.Tensor
    coarse: torch.Tensor

    @classmethod
    def of(cls, tokens: Tokens) -> Known:
        import torch

        previous = torch.roll(tokens.input_ids, 1)
        # The end of the last sample may be that of the batch: rows are marked, not selected, to
        # avoid waiting for the device.
        begins = torch.zeros(previous.shape[0] + 1, dtype=torch.bool, device=previous.device)
        begins.index_fill_(0, tokens.sample_start, True)
        previous.masked_fill_(begins[:-1], -1)
        coarse = torch.ones_like(previous, dtype=torch.bool)
        coarse.index_fill_(0, tokens.last_token, False)
        return cls(tokens, previous, coarse)

    def around(self, rows: slice) -> Seen:
        """Return the embeddings of tokens ``rows`` and of the tokens before them: F = 2 H."""
        import torch

        return Seen(
            torch.stack([self.tokens.input_ids[rows], self.previous[rows]]),
            self.tokens.embedding,
            coarse=self.coarse[rows],
        )

    def near(self, at: torch.Tensor, half: Half, code: torch.Tensor, context: int) -> Seen:
        """Return the features of last states of tokens ``at`` [m]: the first ``context``
        coefficients of the token's aux ``code``, and the embeddings before, at and after it: F =
        context + 3 H.
        """
        import torch

        ids = self.tokens.input_ids
        return Seen(
            torch.stack([self.previous[at], ids[at], ids[at + 1]]),
            self.tokens.embedding,
            half,
            code,
            at,
            context,
        )


def _encoded(
    half: Half, x: torch.Tensor, seen: Callable[[slice], Seen]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode rows ``x``, run by run; also returns which of them the cells cannot hold."""
    import torch

    quick = fast.encodes(half)
    out = []
    for s in _runs(half, x, quick):
        about = seen(s)
        out.append(
            fast.encode(half, x[s], about)
            if quick
            else half.encode(x[s], about.plain(), about.coarse)
        )
    code, outside = (torch.cat(parts) for parts in zip(*out, strict=True))
    return code, outside


def _decoded(
    half: Half, code: torch.Tensor, seen: Callable[[slice], Seen], dtype: torch.dtype
) -> torch.Tensor:
    """Decode the rows [T, C] of ``code``, run by run."""
    import torch

    quick = fast.decodes(half)
    out = torch.empty(code.shape[0], half.table.channels, dtype=dtype, device=code.device)
    for s in _runs(half, code, quick):
        if quick:
            fast.decode(half, code[s], seen(s), out[s])
        else:
            about = seen(s)
            out[s] = half.rows(half.read(code[s], about.coarse), about.plain())
    return out


def _runs(half: Half, x: torch.Tensor, quick: bool) -> list[slice]:
    """Yield slices of the rows of ``x``, so that intermediate results stay small."""
    size = fast.rows_at_once(half) if quick else ROWS.get(x.device.type, ROWS["cpu"])
    return [slice(i, min(i + size, x.shape[0])) for i in range(0, x.shape[0], size)] or [
        slice(0, 0)
    ]


def _same_first(exact: torch.Tensor, known: Known) -> torch.Tensor:
    """Return the tokens whose states are stored for ``exact`` (rising): the state of a sample's
    first token depends only on its id, so all equal ones use the first's.
    """
    import torch

    count, ids = exact.shape[0], known.tokens.input_ids[exact]
    first = known.previous[exact] < 0
    place = torch.arange(count, device=exact.device)
    # By id, the first place in ``exact`` of a first token with it.
    found = place.new_full((known.tokens.embedding.shape[0],), count)
    found.scatter_reduce_(0, ids, torch.where(first, place, count), "amin")
    return torch.where(first, exact[found[ids].clamp(max=count - 1)], exact)


def _bits(x: torch.Tensor) -> torch.Tensor:
    import torch

    return x.to(torch.bfloat16).contiguous().view(torch.uint16)


def _values(x: torch.Tensor) -> torch.Tensor:
    import torch

    return x.view(torch.bfloat16)


class KltFamily:
    """``klt-A-L-C`` for any positive A and L up to 8 and C from 1 to 8."""

    def names(self) -> list[str]:
        return ["klt-1-1-2", "klt-0.75-1-2", "klt-0.6-1-2", "klt-1-1"]

    def make(self, name: str, pack: str) -> Klt:
        aux, last, coarse = klt_numbers(name) or (0.0, 0.0, 0.0)
        if not (0.05 <= aux <= 8 and 0.05 <= last <= 8 and 1 <= coarse <= 8):
            raise UsageError(
                f"--codec {name}: expected klt-A-L or klt-A-L-C, such as klt-1-1-2: bits per value "
                "of the aux layers and of the last state from 0.05 to 8, and how many times the "
                "step is of tokens that are only context, from 1 to 8"
            )
        return Klt(aux, last, coarse=coarse).repacked(pack)

    def load(
        self,
        name: str,
        params: Json,
        pack: str,
        calibration: Mapping[str, torch.Tensor],
        where: str,
    ) -> Klt:
        known = self.make(name, pack)
        refuse_other_params(known, params, where)
        if not calibration:
            return known
        return known.with_tables(Tables.of(calibration, where, known.coarse))


FAMILY = KltFamily()
