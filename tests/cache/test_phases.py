from __future__ import annotations

import pytest

from dspark.cache.shared import phases
from dspark.cache.shared.phases import Phases


def test_seconds_add_up_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.5, 2.0, 2.25, 3.0, 3.5])
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(clock))
    seen = Phases()
    for name in ("moments", "step", "moments"):
        with seen.phase(name):
            pass
    assert str(seen) == "moments 2.00 (2 times), step 0.25"
