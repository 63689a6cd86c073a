"""A text's tokens, and which token holds a character, without computing every token's position."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from dspark.cache.records import Bool

FEW = 8  # edges that are looked up one by one
CHARS = 12  # characters that are tokenised for a token that may be kept, at first
MARGIN = 64  # tokens in front of a cut that it may have changed


class Coded:
    """Token ``ids`` int32[S] of a text, at most ``most`` of them. ``start``: the text's position in
    a longer one.
    """

    def __init__(self, encoding: Any, length: int, most: int, start: int = 0) -> None:
        self._encoding, self._length, self._start = encoding, length, start
        self.ids = np.asarray(encoding.ids[:most], dtype=np.int32)

    @cached_property
    def offsets(self) -> Any:
        """Characters ``[start, stop)`` of each token, int64[S, 2]."""
        own = self._encoding.offsets[: len(self.ids)]
        return np.asarray(own, dtype=np.int64).reshape(-1, 2) + self._start

    def edges(self, places: Sequence[int]) -> list[int | None]:
        """Return, per character, the first token that starts there: the number of tokens if it
        comes after all of them, None if a token spans it.
        """
        if len(places) > FEW:
            return self._edges(places)
        found = [self._edge(at - self._start) for at in places]
        return self._edges(places) if -1 in found else found

    def _edge(self, at: int) -> int | None:
        """As ``edges``; -1 = not available from the encoding (a character that is in no token)."""
        if at >= self._length:
            return len(self.ids)
        token: int | None = self._encoding.char_to_token(at)
        if token is None:
            return -1
        if self._encoding.token_to_chars(token)[0] != at:
            return None if token < len(self.ids) else len(self.ids)
        return min(token, len(self.ids))

    def _edges(self, places: Sequence[int]) -> list[int | None]:
        """Reference for ``edges``: from the positions of all tokens."""
        starts, stops = self.offsets[:, 0], self.offsets[:, 1]
        reach = np.maximum.accumulate(stops) if len(stops) else stops
        out: list[int | None] = []
        for at in places:
            token = int(np.searchsorted(starts, at))
            if token and reach[token - 1] > at:
                out.append(None)
                continue
            while token < len(stops) and stops[token] <= at:  # white space trimmed to nothing
                token += 1
            out.append(token)
        return out


def encode(tokenizer: Any, text: str, most: int) -> Coded:
    """Encode ``text`` as at most ``most`` tokens; of a long text, only as much as they need is
    tokenised.
    """
    size = most * CHARS
    while True:
        head = text[:size]
        encoding = backend(tokenizer).encode(head, add_special_tokens=False)
        if len(head) == len(text) or len(encoding) > most + MARGIN:
            return Coded(encoding, len(text), most)
        size *= 4


def backend(tokenizer: Any) -> Any:
    """Return the tokenizer underneath transformers', configured as transformers does for a call."""
    inner = tokenizer.backend_tokenizer
    if inner.truncation is not None:
        inner.no_truncation()
    if inner.padding is not None:
        inner.no_padding()
    inner.encode_special_tokens = getattr(tokenizer, "split_special_tokens", False)
    return inner


def inside(offsets: Any, start: int, stop: int) -> Bool:
    """Tell which tokens lie wholly within characters ``[start, stop)``. ``offsets`` int[S, 2]. A
    whitespace token whose span the tokenizer trimmed to nothing counts by its end.
    """
    out: Bool = (offsets[:, 0] >= start) & (offsets[:, 1] > start) & (offsets[:, 1] <= stop)
    return out
