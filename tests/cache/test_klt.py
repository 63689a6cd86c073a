"""The transform codec: against a decoder in numpy that follows docs/format.md, against the Gaussian
bound, and at its edges.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark.cache.codec import registry
from dspark.cache.codec.base import EXACT_TOKEN, Tokens
from dspark.cache.codec.bf16 import LOSSLESS_BITS
from dspark.cache.codec.klt import moments
from dspark.cache.codec.klt.codec import FAMILY, Klt, Known
from dspark.cache.codec.klt.half import half_on
from dspark.cache.codec.klt.pieces import HELD_OUT, Piece, one_in_eight, pieces_of
from dspark.cache.codec.klt.symbols import BAND, CLASSES, Packing, entropy_columns, pack, quantise
from dspark.cache.codec.klt.tables import Tables, Transform
from dspark.cache.errors import DamagedCacheError, EngineError, FormatVersionError, UsageError
from dspark.cache.quality import longest_run, share_of
from dspark.cache.records import TokenSample, last_rows
from dspark.cache.sizing import packed_bytes
from interpreted import interpreted

LAYERS, HIDDEN, VOCAB = 3, 16, 40
COARSE = 2.0
WIDTH = LAYERS * HIDDEN


def some_tokens(lengths: list[int], seed: int = 0, prompt: int = 0) -> Tokens:
    """Random ids; the last state of every token but a sample's last, and its first ``prompt`` ones,
    is stored.
    """
    g = torch.Generator().manual_seed(seed)
    start = torch.tensor([0, *np.cumsum(lengths).tolist()])
    ids = torch.randint(0, VOCAB, (int(start[-1]),), generator=g)
    stored = torch.ones(len(ids), dtype=torch.bool)
    stored[start[1:] - 1] = False
    for i in range(prompt):
        stored[torch.minimum(start[:-1] + i, start[1:] - 1)] = False
    embedding = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(7)) * 0.05
    return Tokens(ids, start, stored.nonzero()[:, 0], embedding.bfloat16())


def some_states(tokens: Tokens, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian rows with a spectrum over four decades, partly said by the embeddings; a massive
    first token in every sample.
    """
    fixed, g = torch.Generator().manual_seed(3), torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=fixed))[0] * torch.logspace(
        0.5, -1.5, WIDTH
    )
    said = torch.randn(HIDDEN, WIDTH, generator=fixed) * 0.5
    noise = torch.randn(len(tokens.input_ids), WIDTH, generator=g) @ mix.T
    aux = noise + tokens.embedding.float()[tokens.input_ids] @ said + torch.linspace(-3, 3, WIDTH)
    aux[tokens.sample_start[:-1], 5] = 2000.0
    to_last = torch.randn(WIDTH, HIDDEN, generator=fixed) / 4
    last = aux.clamp(-20, 20) @ to_last + 0.1 * torch.randn(len(aux), HIDDEN, generator=g)
    return aux.view(-1, LAYERS, HIDDEN).bfloat16(), last[tokens.last_token].bfloat16()


@lru_cache(maxsize=4)
def learnt(name: str = f"klt-1.5-1.5-{COARSE:g}") -> Klt:
    tokens = some_tokens([30] * 100, prompt=12)
    return FAMILY.make(name, "zstd").calibrated(*some_states(tokens), tokens)


def decoded_by_numpy(codec: Klt, coded: dict[str, torch.Tensor], tokens: Tokens) -> tuple[Any, Any]:
    """docs/format.md, step by step, in float64."""
    t = {n: x.double().numpy() for n, x in codec.calibration().items()}

    def coefficients(field: str, code: torch.Tensor, kind: Any) -> Any:
        """``kind`` [T]: 1 where a row is coarse."""
        step, bands = t[f"{field}_numbers"][0], t[f"{field}_offsets"]
        step = np.where(kind, codec.coarse, 1) * step
        out, at, band = [], 0, 0
        for (cells, n), columns in zip(CLASSES, t[f"{field}_columns"].astype(int), strict=True):
            for j in range(columns):
                byte = code[:, at + j // n].numpy().astype(int)
                q = byte // cells ** (j % n) % cells - cells // 2
                offset = bands[2 * kind + (abs(q) != 1), band + j // BAND]
                out.append(np.where(q == 0, 0, np.sign(q) * (abs(q) + offset)) * step)
            at, band = at + columns // n, band + -(-columns // BAND)
        return np.stack(out, 1)

    def rows(field: str, y: Any, f: Any) -> Any:
        made = np.concatenate([y, f], 1) @ np.concatenate(
            [t[f"{field}_back"], t[f"{field}_predict"]]
        )
        return t[f"{field}_mean"] + t[f"{field}_deviation"] * made

    ids, e = tokens.input_ids.numpy(), tokens.embedding.double().numpy()
    before = np.concatenate([np.zeros((1, HIDDEN)), e[ids[:-1]]])
    before[tokens.sample_start[:-1].numpy()] = 0
    at = tokens.last_token.numpy()
    kind = np.ones(len(ids), dtype=int)
    kind[at] = 0
    y = coefficients("aux", coded["aux_code"], kind * (codec.coarse != 1))
    aux = rows("aux", y, np.concatenate([e[ids], before], 1))
    context = int(t["shape"][2])
    f = np.concatenate([y[at][:, :context], before[at], e[ids[at]], e[ids[at + 1]]], 1)
    last = rows("last", coefficients("last", coded["last_code"], np.zeros(len(at), dtype=int)), f)
    exact = coded[EXACT_TOKEN].numpy()
    aux[exact] = coded["exact_aux"].view(torch.bfloat16).double().numpy().reshape(-1, WIDTH)
    for i, token in enumerate(exact):
        last[at == token] = coded["exact_last"].view(torch.bfloat16).double().numpy()[i]
    return aux.reshape(-1, LAYERS, HIDDEN), last


@pytest.mark.parametrize(("name", "kinds"), [("klt-1.5-1.5", 1), ("klt-1.5-1-2.5", 2)])
def test_decoder_is_the_documented_one(name: str, kinds: int) -> None:
    codec, tokens = learnt(name), some_tokens([20, 1, 2, 50], seed=5, prompt=8)
    assert codec.calibration()["aux_offsets"].shape[0] == 2 * kinds
    coded = codec.encode(*some_states(tokens, 6), tokens)
    aux, last = codec.decode(coded, HIDDEN, tokens)
    want_aux, want_last = decoded_by_numpy(codec, coded, tokens)
    np.testing.assert_allclose(aux.numpy(), want_aux, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(last.numpy(), want_last, rtol=2e-5, atol=2e-5)


def test_wide_states_fit_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = some_tokens([40] * 60, seed=1)
    states = some_states(tokens)
    errors = []
    for wide in (moments.WIDE, 0):
        monkeypatch.setattr(moments, "WIDE", wide)
        codec = FAMILY.make("klt-1-1", "zstd").calibrated(*states, tokens)
        back = codec.decode(codec.encode(*states, tokens), HIDDEN, tokens)
        errors.append([float((x - y).norm() / y.norm()) for x, y in zip(back, states, strict=True)])
    np.testing.assert_allclose(errors[1], errors[0], rtol=1e-2)


def test_a_gpu_beside_an_engine_has_room_for_the_sums() -> None:
    """Layers, hidden size, vocabulary, and GB that an engine leaves (``memory_share``)."""
    for layers, hidden, vocab, free in (
        (5, 2560, 151_936, 7.0),  # Qwen3-4B
        (5, 4096, 151_936, 14.0),  # Qwen3-8B
        (5, 6144, 154_880, 29.0),  # GLM-5.2
    ):
        assert FAMILY.make("klt-1-1", "zstd").fitting_bytes(layers, hidden, vocab) < free * 1e9


def bound_db(variances: Any, bits: float) -> float:
    """SNR of reverse water-filling: the least error that any code of ``bits`` in all can have of
    independent Gaussians.
    """
    low, high = 0.0, float(variances.max())
    for _ in range(80):
        level = (low + high) / 2
        rate = 0.5 * np.log2(np.maximum(variances / level, 1)).sum()
        low, high = (level, high) if rate > bits else (low, level)
    return float(10 * np.log10(variances.sum() / np.minimum(variances, level).sum()))


@pytest.mark.parametrize("bits", [0.7, 1.0, 2.0])
def test_rate_and_error_are_near_the_gaussian_bound(bits: float) -> None:
    codec = learnt(f"klt-{bits:g}-1")
    tokens = some_tokens([40] * 60, seed=11)
    aux, last = some_states(tokens, 12)
    coded = codec.encode(aux, last, tokens)
    table = codec.learnt.aux
    ordinary = torch.ones(len(aux), dtype=torch.bool)
    ordinary[coded[EXACT_TOKEN]] = False
    half = half_on(table, torch.device("cpu"))
    y = half.coefficients(aux.flatten(1), Known.of(tokens).around(slice(None)).plain())[ordinary]
    spent = float(entropy_columns(quantise(y, table.step)).sum())
    error = float((y - half.read(coded["aux_code"])[ordinary]).square().sum(1).mean())
    variances = y.double().var(0).numpy()
    bound = bound_db(variances, spent)
    # A uniform step loses 1.53 dB at high rates, less where most cells are zeros.
    assert bound - 1.7 < 10 * np.log10(variances.sum() / error) < bound


def test_massive_rows_come_back_exactly_and_first_ones_once() -> None:
    codec, tokens = learnt(), some_tokens([20, 30, 25], seed=5)
    ids = tokens.input_ids.clone()
    ids[tokens.sample_start[:-1]] = 7
    tokens = Tokens(ids, tokens.sample_start, tokens.last_token, tokens.embedding)
    aux, last = some_states(tokens, 6)
    aux[33, 1, 2], last[3, 4] = 9000.0, -8000.0
    coded = codec.encode(aux, last, tokens)
    exact = coded[EXACT_TOKEN].tolist()
    assert set(exact) >= {0, 20, 50, 33, int(tokens.last_token[3])}
    assert len(exact) < 12
    got_aux, got_last = codec.decode(coded, HIDDEN, tokens, torch.bfloat16)
    # The first tokens have one id, so one state: that of the first sample's.
    for token in exact:
        assert torch.equal(got_aux[token], aux[0 if token in (0, 20, 50) else token])
    assert torch.equal(got_last[3], last[3])


def test_no_row_has_to_be_exact() -> None:
    codec, tokens = learnt(), some_tokens([5, 6])
    aux, last = some_states(tokens)
    aux[tokens.sample_start[:-1]] = aux[tokens.sample_start[:-1] + 1]
    last[[0, 4]] = last[[1, 5]]  # of the same tokens
    coded = codec.encode(aux, last, tokens)
    assert coded[EXACT_TOKEN].tolist() == []
    assert codec.decode(coded, HIDDEN, tokens)[0].isfinite().all()


def test_samples_are_coded_alone() -> None:
    codec, tokens = learnt(), some_tokens([20, 30, 25], seed=5)
    aux, last = some_states(tokens, 6)
    whole = codec.decode(codec.encode(aux, last, tokens), HIDDEN, tokens)
    at = torch.searchsorted(tokens.last_token, tokens.sample_start)
    for i in range(3):
        a, b = tokens.sample_start[i : i + 2].tolist()
        rows = slice(int(at[i]), int(at[i + 1]))
        own = Tokens(
            tokens.input_ids[a:b],
            torch.tensor([0, b - a]),
            tokens.last_token[rows] - a,
            tokens.embedding,
        )
        got = codec.decode(codec.encode(aux[a:b], last[rows], own), HIDDEN, own)
        # A value at a cell's edge may fall to either side, since sums of another shape round in
        # another way.
        assert (got[0] - whole[0][a:b]).abs().gt(1e-3).float().mean() < 1e-3
        assert (got[1] - whole[1][rows]).abs().gt(1e-3).float().mean() < 1e-3


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    massive=st.floats(0, 30000),
    scale=st.floats(0, 100),
    seed=st.integers(0, 99),
)
def test_any_states_come_back(lengths: list[int], massive: float, scale: float, seed: int) -> None:
    codec, tokens = learnt(), some_tokens(lengths, seed)
    aux, last = some_states(tokens, seed)
    aux = (aux.float() * scale).bfloat16()
    aux[:, 0, 0] = massive
    coded = codec.encode(aux, last, tokens)
    assert {n: x.shape[1:] for n, x in coded.items() if n != EXACT_TOKEN} == {
        n: s.row_shape for n, s in codec.arrays(LAYERS, HIDDEN).items()
    }
    got_aux, got_last = codec.decode(coded, HIDDEN, tokens)
    assert got_aux.shape == aux.shape
    assert got_last.shape == last.shape
    kept = torch.ones(len(aux), dtype=torch.bool)
    kept[coded[EXACT_TOKEN]] = False
    table = codec.learnt.aux
    # What the left-out coefficients held is lost, and grows with the states: only the error in the
    # kept ones' space is bounded.
    space, _ = torch.linalg.qr(table.back.float().T)
    error = ((got_aux - aux.float()).flatten(1) / table.deviation)[kept] @ space
    # Inside the cells: half a step per kept coefficient; beyond them ``limit``. In a token without
    # a last state, the step is coarser.
    times = torch.full((len(aux),), COARSE**2)
    times[tokens.last_token] = 1
    most = (0.3 * table.kept * table.step**2 + 4 * table.limit) * times
    assert bool((error.square().sum(1) < most[kept]).all())


def test_constant_channels_and_layers() -> None:
    tokens = some_tokens([30] * 60)
    aux, last = some_states(tokens)
    aux[:, 1], aux[:, 0, 3] = 2.5, -1.0
    codec = FAMILY.make("klt-1-1", "zstd").calibrated(aux, last, tokens)
    got, _ = codec.decode(codec.encode(aux, last, tokens), HIDDEN, tokens)
    assert got[:, 1] == pytest.approx(2.5, abs=0.02)
    assert got[:, 0, 3] == pytest.approx(-1.0, abs=0.02)


@pytest.mark.parametrize("kind", ["zero", "one row", "one row of zero embeddings"])
def test_states_that_never_vary_have_a_code(kind: str) -> None:
    tokens = some_tokens([30] * 20)
    if kind != "one row":
        tokens = dataclasses.replace(tokens, embedding=torch.zeros_like(tokens.embedding))
    row = torch.zeros(LAYERS, HIDDEN) if kind == "zero" else torch.randn(LAYERS, HIDDEN)
    aux = row.expand(len(tokens.input_ids), -1, -1).bfloat16()
    last = row[0].expand(len(tokens.last_token), -1).bfloat16()
    codec = FAMILY.make("klt-1-1", "zstd").calibrated(aux, last, tokens)
    assert all(spec.width for spec in codec.arrays(LAYERS, HIDDEN).values())
    a, b = codec.decode(codec.encode(aux, last, tokens), HIDDEN, tokens)
    torch.testing.assert_close(a, aux.float(), atol=0.05, rtol=0.02)
    torch.testing.assert_close(b, last.float(), atol=0.05, rtol=0.02)


def test_fewer_columns_than_a_byte_holds_are_kept() -> None:
    assert Packing.fitting(torch.zeros(9, 3)).columns == (3, 0, 0, 0)
    assert Packing.fitting(torch.zeros(9, 7)).columns == (0, 0, 0, 5)


def test_a_row_beyond_float32_is_stored_exactly() -> None:
    codec, tokens = learnt(), some_tokens([9, 8])
    aux, last = some_states(tokens)
    aux[4, 1] = 1e38
    a, _ = codec.decode(codec.encode(aux, last, tokens), HIDDEN, tokens)
    assert torch.equal(a[4], aux[4].float())
    assert torch.isfinite(a).all()


@pytest.mark.parametrize("field", ["aux", "last"])
def test_what_is_not_finite_is_refused_by_place(field: str) -> None:
    tokens = some_tokens([20, 10])
    aux, last = some_states(tokens)
    if field == "aux":
        aux[12, 2, 3] = float("nan")
    else:
        last[12, 3] = float("inf")
    place = (
        "token 12, aux layer index 2, channel 3"
        if field == "aux"
        else r"token 12 \(last state\), channel 3"
    )
    with pytest.raises(EngineError, match=place):
        learnt().encode(aux, last, tokens)


def test_too_little_to_calibrate_on() -> None:
    tokens = some_tokens([20])
    with pytest.raises(UsageError, match="found 1 samples"):
        FAMILY.make("klt-1-1", "zstd").calibrated(*some_states(tokens), tokens)
    with pytest.raises(UsageError, match="must be calibrated"):
        FAMILY.make("klt-1-1", "zstd").encode(*some_states(tokens), tokens)


def test_calibration_is_all_that_a_reader_needs() -> None:
    codec, tokens = learnt(), some_tokens([20, 30])
    again = FAMILY.load(codec.name, codec.params, "zstd", codec.calibration(), "here")
    assert again == codec
    coded = codec.encode(*some_states(tokens), tokens)
    for a, b in zip(
        codec.decode(coded, HIDDEN, tokens), again.decode(coded, HIDDEN, tokens), strict=True
    ):
        assert torch.equal(a, b)
    other = codec.calibration() | {"aux_mean": codec.calibration()["aux_mean"] + 1}
    assert FAMILY.load(codec.name, codec.params, "zstd", other, "here") != codec
    with pytest.raises(DamagedCacheError, match=r"here: aux_offsets is \(2, 1\)"):
        FAMILY.load(
            codec.name, codec.params, "zstd", other | {"aux_offsets": torch.zeros(2, 1)}, "here"
        )
    with pytest.raises(FormatVersionError, match="parameters"):
        FAMILY.load(codec.name, {**codec.params, "band": 64}, "zstd", other, "here")


@pytest.mark.parametrize(
    "name", ["klt-1", "klt-0-1", "klt-1-99", "klt-a-b", "klt-1-1-0.5", "klt-1-1-9", "klt-1-1-"]
)
def test_names_that_there_are_not(name: str) -> None:
    with pytest.raises(UsageError, match="expected klt-A-L"):
        FAMILY.make(name, "zstd")


def test_pack_none_is_refused() -> None:
    with pytest.raises(UsageError, match="only zstd"):
        FAMILY.make("klt-1-1", "none")


@settings(max_examples=40, deadline=None)
@given(
    bytes_of=st.tuples(*(st.integers(0, 4) for _ in CLASSES)),
    rows=st.integers(0, 5),
    seed=st.integers(0, 9),
)
def test_cells_survive_their_bytes(bytes_of: tuple[int, ...], rows: int, seed: int) -> None:
    packing = Packing(tuple(b * n for b, (_, n) in zip(bytes_of, CLASSES, strict=True)))
    limits = torch.tensor(packing.limits(), dtype=torch.float32)
    g = torch.Generator().manual_seed(seed)
    q = ((torch.rand(rows, packing.total, generator=g) * 2 - 1) * (limits + 0.49)).round()
    code = pack(q, packing)
    assert code.shape == (rows, packing.width)
    at, column = 0, 0
    for (cells, n), width in zip(CLASSES, bytes_of, strict=True):
        for j in range(width * n):
            digit = code[:, at + j // n].long() // cells ** (j % n) % cells - cells // 2
            assert digit.tolist() == q[:, column].long().tolist()
            column += 1
        at += width


def by_hand() -> Klt:
    """Tables that no eigendecomposition had a part in."""

    def transform(channels: int, features: int) -> Transform:
        back = torch.eye(8, channels).bfloat16()
        predict = torch.arange(features * channels).remainder(5).view(features, channels) / 64
        packing = Packing((1, 2, 0, 5))
        return Transform(
            torch.linspace(-1, 1, channels),
            torch.linspace(0.5, 2, channels),
            back,
            None,
            predict.bfloat16(),
            torch.tensor([[0.0, -0.1, 0.05], [0.0, -0.02, 0.03]]),
            0.5,
            packing,
            3.0,
            1.0,
            9.0,
        )

    return Klt(1, 1).with_tables(Tables(transform(12, 12), transform(6, 22), 2, 6, 4))


def test_prompts_have_the_coarser_step_and_answers_what_it_saves() -> None:
    tokens = some_tokens([40] * 100, seed=11, prompt=16)
    aux, last = some_states(tokens, 12)
    answers = torch.zeros(len(aux), dtype=torch.bool)
    answers[tokens.last_token] = True
    ordinary = torch.ones(len(aux), dtype=torch.bool)
    ordinary[tokens.sample_start[:-1]] = False
    errors = {}
    for coarse in (1.0, COARSE):
        codec = learnt(f"klt-1-1-{coarse:g}")
        assert rate(codec, (aux, last), tokens) == pytest.approx(1.0, rel=0.04)
        got, _ = codec.decode(codec.encode(aux, last, tokens), HIDDEN, tokens)
        error = ((got - aux.float()).flatten(1) / codec.learnt.aux.deviation).square().sum(1)
        errors[coarse] = [float(error[ordinary & of].mean()) for of in (answers, ~answers)]
    assert errors[1.0][0] == pytest.approx(errors[1.0][1], rel=0.1)
    assert errors[COARSE][0] < 0.85 * errors[1.0][0]
    assert 1.1 * errors[1.0][1] < errors[COARSE][1] < COARSE**2 * errors[COARSE][0]


def test_kinds_of_rows_are_told_by_the_name() -> None:
    one, two = learnt("klt-1-1"), learnt("klt-1-1-2.0")
    assert (one.name, two.name) == ("klt-1-1", "klt-1-1-2")
    assert FAMILY.make("klt-1-1-1", "zstd") == FAMILY.make("klt-1-1", "zstd")
    with pytest.raises(DamagedCacheError, match=r"here: aux_offsets is \(2, \d+\), expected \(4"):
        FAMILY.load(two.name, two.params, "zstd", one.calibration(), "here")


def test_golden_bytes() -> None:
    codec = by_hand()
    ids = torch.tensor([3, 1, 4, 1, 5])
    embedding = (torch.arange(36).remainder(7).view(6, 6) - 3) / 8
    tokens = Tokens(ids, torch.tensor([0, 3, 5]), torch.tensor([0, 1, 3]), embedding.bfloat16())
    aux = ((torch.arange(60).remainder(11) - 5).float() / 2).view(5, 2, 6)
    aux[3, 1, 0] = 4000.0
    last = ((torch.arange(18).remainder(5) - 2).float() / 2).view(3, 6)
    coded = codec.encode(aux, last, tokens)
    assert {n: x.numpy().tobytes().hex() for n, x in coded.items()} == GOLDEN

    twice = torch.cat([codec.learnt.aux.offsets, codec.learnt.aux.offsets / 2])
    aux_table = dataclasses.replace(codec.learnt.aux, offsets=twice, coarse=2.0)
    wide = Klt(1, 1, coarse=2).with_tables(dataclasses.replace(codec.learnt, aux=aux_table))
    coded = wide.encode(aux, last, tokens)
    assert coded["aux_code"].numpy().tobytes().hex() == GOLDEN_COARSE


GOLDEN_COARSE = "794ee47b5ff17e70f27f7079808050"
GOLDEN = {
    "aux_code": "794ee47b5ff17d6ff27f70797f7079",
    "last_code": "7f807481906e83916c",
    "exact_aux": "80bf00bf0000003f803fc03f7a45204020c000c0c0bf80bf"
    "00bf0000003f803fc03f0040204020c000c0c0bf80bf00bf",
    "exact_last": "0000003f803f80bf00bf0000000000000000000000000000",
    "exact_token": "03000000000000000400000000000000",
}


def test_kernels_and_plain_torch_agree() -> None:
    rows = interpreted(Path(__file__).with_name("klt_cases.py"))
    assert len(rows) == 3 * 4 * 2
    assert [row for row in rows if not (row["decoded"] and row["same"])] == []
    assert max(row["bytes"] for row in rows) < 2e-3


def test_samples_held_out_are_like_the_others() -> None:
    size, fit = np.random.default_rng(0).random(400), np.arange(400) % 5 > 0
    held = one_in_eight(size, fit)
    assert held.sum() == fit.sum() // HELD_OUT
    assert not held[~fit].any()
    assert abs(size[held].mean() - size[fit].mean()) < 0.01  # of any 40, 0.05
    assert one_in_eight(np.ones(2), np.ones(2, np.bool_)).sum() == 1


def test_pieces_are_runs_of_whole_samples() -> None:
    tokens = some_tokens([300] * 40)
    aux, last = some_states(tokens)
    held = np.arange(40) % HELD_OUT == 4
    learn, keep = pieces_of(aux, last, tokens, held)
    at = {int(p.aux.data_ptr()) // (2 * WIDTH) for p in keep}
    first = int(aux.data_ptr()) // (2 * WIDTH)
    assert {a - first for a in at} == {300 * i for i in np.flatnonzero(held)}
    assert sum(len(p.aux) for p in [*learn, *keep]) == len(aux)
    for piece in [*learn, *keep]:
        assert int(piece.tokens.sample_start[-1]) == len(piece.aux)
        assert torch.equal(piece.last, last_of(piece, aux, last, tokens))


def last_of(piece: Piece, aux: torch.Tensor, last: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """The last states of the tokens of ``piece``, found by where its rows lie."""
    begin = (int(piece.aux.data_ptr()) - int(aux.data_ptr())) // (2 * WIDTH)
    mine = (tokens.last_token >= begin) & (tokens.last_token < begin + len(piece.aux))
    return last[mine]


def rate(codec: Klt, states: tuple[torch.Tensor, torch.Tensor], tokens: Tokens) -> float:
    """Bits per aux value on disk; first tokens of samples, of which a part has few, apart."""
    coded, spec = codec.encode(*states, tokens), codec.arrays(LAYERS, HIDDEN)["aux_code"]
    size = packed_bytes("aux_code", coded["aux_code"].numpy(), spec)
    exact = int((~torch.isin(coded[EXACT_TOKEN], tokens.sample_start)).sum())
    return (8 * size + exact * LOSSLESS_BITS * WIDTH) / len(states[0]) / WIDTH


@pytest.mark.parametrize("kind", ["sorted", "random"])
def test_step_holds_for_new_text_where_samples_differ(kind: str) -> None:
    """Samples of other energies: the first third of the corpus, or any. The rate holds for other
    text of the same energies, though few samples are held out and a fit takes its
    own for too few bits.
    """
    samples = 54 * HELD_OUT  # three chunks of rows are held out
    loud = torch.ones(samples)
    if kind == "sorted":
        loud[: samples // 3] = 4.0
    else:
        loud = torch.randn(samples, generator=torch.Generator().manual_seed(5)).mul(0.7).exp()

    def text(seed: int) -> tuple[torch.Tensor, torch.Tensor, Tokens]:
        tokens = some_tokens([30] * samples, seed)
        aux, last = some_states(tokens, seed)
        return (aux.float() * loud.repeat_interleave(30)[:, None, None]).bfloat16(), last, tokens

    codec = FAMILY.make("klt-1.5-1.5", "zstd").calibrated(*text(1))
    *states, tokens = text(2)
    assert rate(codec, (states[0], states[1]), tokens) == pytest.approx(1.5, rel=0.04)


def test_step_counts_what_was_learnt_from() -> None:
    """Of six tokens per dimension, those that were learnt from take far fewer bits than others: a
    corpus that has nothing else gets a finer step for its bits.
    """
    tokens = some_tokens([8] * 36, 3)
    some = some_states(tokens, 3)
    none, all_ = (
        FAMILY.make("klt-1.5-1.5", "zstd")
        .calibrated(*some, dataclasses.replace(tokens, share=share))
        .learnt.aux.step
        for share in (0.0, 1.0)
    )
    assert all_ < 0.95 * none


def test_calibration_takes_whole_samples_and_runs_of_long_ones() -> None:
    assert longest_run([10, 20, 30], 60) == 30
    assert longest_run([10, 20, 30], 30) == 10
    assert longest_run([5, 100, 100], 105) == 50
    codec = FAMILY.make("klt-1-1", "zstd")
    lengths = [40, 250, 250, 250]
    begins = []
    for row, length in enumerate(lengths):
        mask = np.arange(length) % 7 > 2
        sample = TokenSample(row, bytes(16), np.arange(length, dtype=np.int32), mask)
        where = np.flatnonzero(last_rows(mask))
        states = torch.arange(length).float()[:, None], torch.from_numpy(where).float()[:, None]
        cut, aux, last = share_of(sample, states, lengths, codec, 250)
        assert np.array_equal(cut.input_ids, aux[:, 0].float().numpy())
        rows = np.flatnonzero(last_rows(cut.loss_mask))
        assert torch.equal(last[:, 0].float(), aux[torch.from_numpy(rows), 0].float())
        assert len(aux) == min(length, 70)
        begins.append(int(cut.input_ids[0]))
    assert begins[0] == 0
    assert len(set(begins)) == 4
    assert max(begins) > 120


def test_what_another_process_gets_is_in_host_memory() -> None:
    """As much as a machine without a GPU can tell: its own tensors, equal, and the same codes."""
    codec = by_hand()
    sent = registry.on_host(codec)
    assert isinstance(sent, Klt)
    assert (sent, sent.digest) == (codec, codec.digest)
    assert sent.learnt is not codec.learnt
    plain = registry.make("rotated-4-4")
    assert registry.on_host(plain) is plain
