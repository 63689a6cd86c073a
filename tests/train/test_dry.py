"""``dspark-train --dry-run`` tells what a training would take and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch._functorch import config as autograd
from torch.compiler import config as compiler

import stores
from dspark.cache.shared.command import duration
from dspark.train import ops
from dspark.train.cli import main
from dspark.train.compute import COMPILED, digest_of, keep_compiled


def test_dry_run_tells_steps_hours_and_memory_and_writes_nothing(tmp_path: Path) -> None:
    stores.write_store(tmp_path / "hs.zarr", [40, 52, 61, 44, 58, 47, 66, 49])
    flags = (
        "--recipe none --num-layers 1 --markov-rank 4 --total-seq-len 128 --rows-per-step 1 "
        "--max-anchors 16 --epochs 50 --device cpu"
    )
    words = [
        "--cache",
        str(tmp_path / "hs.zarr"),
        "--output",
        str(tmp_path / "draft"),
        *flags.split(),
        "--dry-run",
        "--json",
    ]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["steps"] == 50 * found["steps_per_epoch"]
    assert found["hours"] == pytest.approx(found["steps"] * found["step_ms"] / 3.6e6)
    assert 0 < found["step_ms"] < 1e3 * found["first_step_seconds"] + 1e4
    parts = found["start_seconds"]
    assert min(parts.values()) >= 0
    assert sum(parts.values()) == pytest.approx(found["first_step_seconds"])
    assert found["memory_gb"]["total"] == pytest.approx(
        sum(found["memory_gb"][part] for part in ("trained", "frozen", "row"))
    )
    assert f"ms: {duration(3600 * found['hours'])} without validation" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hs.zarr"]


def test_compiled_code_is_kept_where_the_user_or_the_package_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(COMPILED, str(tmp_path / "own"))
    assert keep_compiled() == tmp_path / "own"
    monkeypatch.delenv(COMPILED)
    kept = keep_compiled()
    assert kept.parent == tmp_path / "cache" / "dspark"
    assert torch.__version__ in kept.name
    monkeypatch.delenv(COMPILED)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    # nowhere to write: torch's own place
    assert keep_compiled().name.startswith("torchinductor_")
    monkeypatch.delenv(COMPILED)


def test_kept_code_belongs_to_the_operators_it_was_made_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their backward passes are behind operators, of which torch's key has only the names."""
    (tmp_path / "a.py").write_text("x = 1")
    before = digest_of(tmp_path)
    assert digest_of(tmp_path) == before
    (tmp_path / "a.py").write_text("x = 2")
    assert digest_of(tmp_path) != before
    train = Path(ops.__file__).parents[1]
    found = {p.parent.name for p in train.rglob("*.py") if "library.custom_op" in p.read_text()}
    assert found == {"ops"}
    monkeypatch.setattr(compiler, "cache_key_tag", "the user's")
    monkeypatch.setattr(autograd, "autograd_cache_allow_custom_autograd_functions", False)
    monkeypatch.setenv(COMPILED, str(tmp_path))
    for _ in range(2):
        keep_compiled()
    assert compiler.cache_key_tag == f"the user'sdspark-ops-{digest_of(train / 'ops')}"
    assert autograd.autograd_cache_allow_custom_autograd_functions
