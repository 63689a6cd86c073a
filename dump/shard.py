"""``--shard I/N``: which parts of a store one of several dumps makes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from dspark.cache.errors import UsageError

MOST = 1 << 16


@dataclass(frozen=True, slots=True)
class Shard:
    """Number ``index``, from 0, of ``count`` dumps of one plan. It makes every ``count``-th
    part.
    """

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``I/N``. Raises UsageError."""
        found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
        if not found or not int(found[1]) < int(found[2]) <= MOST:
            raise UsageError(
                f"--shard {text}: expected I/N with I from 0 to N - 1, such as 0/4, 1/4, 2/4 and "
                "3/4 for four dumps."
            )
        return cls(int(found[1]), int(found[2]))

    def takes(self, part: int) -> bool:
        """Tell whether part number ``part`` is made by this dump."""
        # it imports numpy, which --help does not need
        from dspark.cache.files.layout import SOURCE_STRIDE

        source, block = divmod(part, SOURCE_STRIDE)
        return (source + block) % self.count == self.index

    def suffix(self, name: str) -> str:
        """Return this dump's own ``name`` for a file beside a store that others write too: ``.log``
        -> ``.shard-1-of-4.log``.
        """
        return f".shard-{self.index}-of-{self.count}{name}"
