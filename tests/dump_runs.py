"""What tests of whole dumps share: a corpus, files compared, a real engine with something in its
way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dspark.cache.codec.base import Codec
from dspark.cache.records import TokenSample
from dspark.dump.engines.engine import Captured, Engine
from dump_targets import chat
from words import WORDS


def corpus(rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Chats of random words; every seventh has no answer, every fifth was cut."""
    rng = np.random.default_rng(seed)

    def words() -> str:
        return " ".join(rng.choice(WORDS, int(rng.integers(3, 25))))

    return [
        chat(f"u: {words()}", *([] if i % 7 == 6 else [f"a: {words()}"]), finished=i % 5 != 4)
        for i in range(rows)
    ]


def files(store: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()
    }


def assert_same(a: Path, b: Path) -> None:
    """Byte for byte; names what differs."""
    left, right = files(a), files(b)
    assert [n for n in sorted(left | right) if left.get(n) != right.get(n)] == []


class Wrapped:
    """A real engine that does something before each sample it hands out."""

    def __init__(self, inner: Engine, before: Callable[[], None]) -> None:
        self.inner, self.before = inner, before
        self.checked = False
        self.name, self.version, self.groups_at_once = (
            inner.name,
            inner.version,
            inner.groups_at_once,
        )
        self.frozen, self.capture, self.predict, self.close = (
            inner.frozen,
            inner.capture,
            inner.predict,
            inner.close,
        )

    def stream(self, groups: Iterable[Sequence[TokenSample]], codec: Codec) -> Iterator[Captured]:
        """The first call is the self-check's."""
        run, self.checked = self.dumped if self.checked else self.inner.stream, True
        yield from run(groups, codec)

    def dumped(self, groups: Iterable[Sequence[TokenSample]], codec: Codec) -> Iterator[Captured]:
        for captured in self.inner.stream(groups, codec):
            for _ in captured.members:
                self.before()
            yield captured
