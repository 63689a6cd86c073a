"""Layer ids: defaults, conventions, refusals."""

import pytest

from dspark.cache.errors import UsageError
from dspark.cache.target.taps import default_layers, parse_ids
from dspark.dump.config import DumpConfig
from dspark.dump.target.layers import check_layers
from dspark.dump.target.presets import find, presets


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (36, (1, 9, 17, 25, 33)),
        (28, (1, 7, 13, 19, 25)),
        (30, (1, 8, 14, 20, 27)),
        (8, (1, 2, 3, 4, 5)),
        (7, (1, 2, 3, 4)),
        (5, (1, 2)),
        (4, (1,)),
        (3, (1,)),
        (2, (0,)),
        (1, (0,)),
    ],
)
def test_default_layers_spread_from_1_to_n_minus_3(layers: int, expected: tuple[int, ...]) -> None:
    assert default_layers(layers) == expected
    check_layers(expected, layers)


@pytest.mark.parametrize("text", ["8,23,39", "8 23 39", " 8, 23  39 "])
def test_ids_take_commas_or_a_quoted_list(text: str) -> None:
    assert parse_ids(text, "--layers") == (8, 23, 39)


@pytest.mark.parametrize("text", ["", "a", "1,b", "1.5"])
def test_ids_that_are_no_numbers(text: str) -> None:
    with pytest.raises(UsageError, match=r"--layers: found .* expected layer numbers"):
        parse_ids(text, "--layers")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((0, 36), "36 is out of range"),
        ((-1, 3), "-1 is out of range"),
        ((3, 2), "unsorted"),
        ((2, 2), "duplicated"),
    ],
)
def test_bad_layers_name_both_conventions(layers: tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        check_layers(layers, 36)
    both = ",".join(str(i + 1) for i in layers)
    assert f"--target-layer-ids {both}" in str(error.value)
    assert "j = i + 1" in str(error.value)


def test_both_conventions_mean_the_same_layers() -> None:
    glm = find("zai-org/GLM-5.2-FP8")
    assert glm is not None
    assert glm.layers == (7, 22, 38, 54, 69)
    asked = DumpConfig(
        model="m", target_layer_ids=parse_ids("8 23 39 55 70", "--target-layer-ids")
    ).asked_layers
    assert asked == glm.layers == DumpConfig(model="m", layers=glm.layers).asked_layers


def test_presets_are_consistent() -> None:
    for preset in presets().values():
        check_layers(preset.layers, preset.shapes.num_layers)
        assert preset.shapes.max_positions is not None
        assert preset.seq_length <= preset.shapes.max_positions


def test_exclusive_flags() -> None:
    with pytest.raises(UsageError, match="not both"):
        DumpConfig(model="m", layers=(1,), target_layer_ids=(2,))
    with pytest.raises(UsageError, match="not both"):
        DumpConfig(model="m", resume=True, overwrite=True)
    with pytest.raises(UsageError, match="--limit: found 0"):
        DumpConfig(model="m", limit=0)
    with pytest.raises(UsageError, match="--max-dropped: found 2"):
        DumpConfig(model="m", max_dropped=2)
