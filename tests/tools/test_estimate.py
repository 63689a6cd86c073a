"""The estimate before a dump: by hand for the GLM-5.2 preset, and refusals."""

from __future__ import annotations

import pytest

from dspark.cache.errors import UsageError
from dspark.tools.stores.estimate import estimate

SETTING = {"aux_bits": 16, "last_bits": 16, "last_share": 0.5, "tokens_per_second": 1000.0}


def test_glm_by_hand() -> None:
    """No network: the preset holds the shapes. 5 layers of 6,144 channels; the raw layout is 6 + 2
    * 6144 * 6 bytes per token.
    """
    out = estimate("zai-org/GLM-5.2-FP8", data=None, samples=1000, mean_tokens=36.0, **SETTING)
    assert out["target_layer_ids"] == [8, 23, 39, 55, 70]
    assert out["tokens"] == 36_000
    assert out["raw_bytes"] == 36_000 * (6 + 2 * 6144 * 6)
    assert out["hours"] == pytest.approx(0.01)
    written = 8 * out["bytes"] / 36.0  # 36,000 tokens at 1,000 per second
    assert out["written_bits_per_second"] == pytest.approx(written)
    assert out["read_bits_per_second"] == pytest.approx(written * 8 * 80)
    weights = 2 * 154880 * 6144
    lossless = (out["bytes"] - weights) / 36_000 / (2 * 6144 * 5.5)
    assert 0.7 < lossless <= 1.01  # between what zstd makes of bf16 and the codes as they are
    half = estimate(
        "zai-org/GLM-5.2-FP8",
        data=None,
        samples=1000,
        mean_tokens=36.0,
        **{**SETTING, "last_share": 0.0},
    )
    assert half["bytes"] < out["bytes"]


@pytest.mark.parametrize(
    "given",
    [
        {"data": None, "samples": 5, "mean_tokens": None},
        {"data": "x.jsonl", "samples": 5, "mean_tokens": 3.0},
    ],
)
def test_either_counts_or_a_corpus(given: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="--samples and --mean-tokens, or --data"):
        estimate("zai-org/GLM-5.2-FP8", **given, **SETTING)  # type: ignore[arg-type]
