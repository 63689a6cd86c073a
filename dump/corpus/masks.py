"""Turn rows into samples of tokens with a loss mask that marks the target's own answers.

A sample is one generation of the target in the context it was served in, or several if the template
renders each of them, with everything before it, as the beginning of what follows (``--turns
auto``). Every answer is supervised exactly once. Where an answer begins and ends is found in
``turns.py`` ("render-difference"); an ``--assistant-pattern`` can only narrow it. An answer that
was cut short ends with its own text, so that no end is learned from it. Rows given as tokens pass
through ("given"). Tokens are those the server had: the prompt's, then the answer's; no token spans
the two.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dspark.cache.canonical import canonical, canonical_text
from dspark.cache.errors import DataError, UsageError
from dspark.cache.records import KEY_BYTES, Bool, TokenSample, last_rows
from dspark.dump.corpus.coded import Coded, encode, inside
from dspark.dump.corpus.rows import BadRow, Row
from dspark.dump.corpus.runs import Group, leading
from dspark.dump.corpus.shapes import ChatRow, TokenRow
from dspark.dump.corpus.template import Template, chat_template
from dspark.dump.corpus.turns import REFUSED, REWRITES, WAY_OUT, Chat, Dropped, Turn, lost_fields

__all__ = ["REFUSED", "REWRITES", "Dropped", "Made", "SampleMaker", "chat_template", "sample_key"]

NO_ANSWER = "no assistant turn"
HOW_TO_ANSWER = (
    "an answer beside the chat is read from `response`, `completion`, `answer`, `output` "
    "or `choices`; with --regenerate the target answers"
)
TOO_FEW = "too few supervised tokens"
NO_MATCH = "assistant pattern does not match"
HALVES = re.compile("[\ud800-\udfff]")
NOT_UNICODE = "not Unicode text"
NOT_TEXT = "content is not only text"
MALFORMED = "malformed row (the log names the place and the key)"
BEYOND = "answer lies beyond --seq-length"
UNTAUGHT = "the row excludes the answer from training (weight 0, train false)"
NOT_WHOLE = "turns do not form one sample (--turns auto makes several)"


@dataclass(frozen=True, slots=True)
class Made:
    """A row's samples in order of their turns, or the reason why there are none (``detail``: more
    about it).

    ``truncated``: how many of the samples were cut at seq_length. ``notes``: counts of what the
    samples leave out: answers without a label in rows where others have one, fields of answers that
    the template does not render. ``harmed``: an answer was left out that should have been
    supervised (not because of its length or the row's own mark).
    """

    samples: list[TokenSample]
    dropped: str | None = None
    detail: str = ""
    truncated: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    harmed: bool = False


class SampleMaker:
    """Turns rows into samples with one target's tokenizer and template. ``mask_rule`` names the
    rule for the manifest.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        tokenised: bool,
        vocab_size: int,
        seq_length: int,
        min_supervised: int,
        assistant_pattern: str | None = None,
        eos_token_ids: Sequence[int] = (),
        turns: str = "auto",
        template_kwargs: Mapping[str, Any] | None = None,
        day: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.tokenised = tokenised
        self.vocab_size = vocab_size
        self.seq_length = seq_length
        self.min_supervised = min_supervised
        self.turns = turns
        self.pattern: re.Pattern[str] | None = None
        self.mask_rule = "given"
        if tokenised:
            return
        self.template = Template(tokenizer, template_kwargs, day)
        self.mask_rule = "render-difference"
        if assistant_pattern is not None:
            self.pattern = compile_pattern(assistant_pattern)
            self.mask_rule = "assistant-pattern"

    def make(self, row: Row) -> Made:
        """Turn one row into ``TokenSample``s of at most seq_length tokens, or say why not."""
        value = row.value
        if isinstance(value, BadRow):
            return Made([], MALFORMED, value.detail)
        if isinstance(value, TokenRow) != self.tokenised:
            kinds = ("chat rows", "tokenised rows")
            raise DataError(
                f"{row.where}: found one of {kinds[not self.tokenised]} in a corpus that began "
                f"with {kinds[self.tokenised]}. Split the file."
            )
        if isinstance(value, ChatRow) and (why_not := unusable(value)) is not None:
            return why_not
        try:
            return (
                self._given(value, row) if isinstance(value, TokenRow) else self._chat(value, row)
            )
        except Dropped as why:
            return Made([], why.reason, why.detail)

    def _given(self, value: TokenRow, row: Row) -> Made:
        # Checked before conversion to an array, since JSON has integers of any size.
        if min(value.input_ids) < 0 or max(value.input_ids) >= self.vocab_size:
            bad = next(i for i in value.input_ids if not 0 <= i < self.vocab_size)
            raise DataError(
                f"{row.where}: token id {bad} is outside the target's vocabulary of "
                f"{self.vocab_size}. Was it tokenised with another tokenizer?"
            )
        mask = np.asarray(value.loss_mask, dtype=np.bool_)
        if not mask.any():
            raise Dropped(NO_ANSWER)
        ids = np.asarray(value.input_ids, dtype=np.int32)
        prompt: Any = value.conversation
        if prompt is None:
            prompt = value.input_ids[: int(mask.argmax())]
        return self._kept([self._sample(row, sample_key(prompt), 0, ids, mask)], Counter(), "")

    def _chat(self, value: ChatRow, row: Row) -> Made:
        chat = Chat(self.template, value)
        if not chat.at:
            roles = ", ".join(dict.fromkeys(m["role"] for m in value.messages))
            raise Dropped(NO_ANSWER, f"its roles: {roles}; {HOW_TO_ANSWER}")
        notes: Counter[str] = Counter(value.notes)
        why: list[Dropped] = []
        groups = self._groups(chat, why, notes)
        if not groups and why:
            raise why[0]
        if self.turns == "whole" and (why or len(groups) > 1):
            raise why[0] if why else Dropped(NOT_WHOLE)
        for left_out in why:
            notes[f"answer left out: {left_out.reason}"] += 1
        key = conversation_key(value)
        samples = [s for g in groups for s in self._tokens(g, key, row)]
        harmed = any(w.reason not in (BEYOND, UNTAUGHT) for w in why)
        return self._kept(samples, notes, why[0].detail if why else "", harmed)

    def _kept(
        self,
        samples: list[tuple[TokenSample, bool]],
        notes: Counter[str],
        detail: str,
        harmed: bool = False,
    ) -> Made:
        kept = [(s, cut) for s, cut in samples if self._teaches(s.loss_mask)]
        if not kept:
            return Made([], TOO_FEW, detail, notes=notes)
        if len(kept) < len(samples):
            notes[f"answer left out: {TOO_FEW}"] += len(samples) - len(kept)
        return Made([s for s, _ in kept], None, detail, sum(cut for _, cut in kept), notes, harmed)

    def _teaches(self, mask: Bool) -> bool:
        return int(mask.sum()) >= self.min_supervised and bool(last_rows(mask).any())

    def _groups(self, chat: Chat, why: list[Dropped], notes: Counter[str]) -> list[Group]:
        """Group the row's answers by sample. ``why`` receives the answers that give no label."""
        numbers = range(len(chat.at))
        groups: list[Group] = []
        room = _Room(self)
        if (
            self.turns in ("auto", "whole")
            and (run := leading(chat, self.seq_length, self._count)) is not None
        ):
            groups, numbers = [run], numbers[len(run.numbers) :]
            if (over := self._beyond(run)) is not None:
                notes[f"answer left out: {BEYOND}"] += over + len(numbers)
                return groups
        for number in numbers[-1:] if self.turns == "last" else numbers:
            try:
                turn = self._turn(chat, number, notes)
            except Dropped as dropped:
                why.append(dropped)
                continue
            fits = room.for_answer(turn)
            together = self.turns != "each" and groups and groups[-1].takes(turn)
            if together:
                groups[-1].add(turn)
            elif fits:
                groups.append(Group())
                groups[-1].add(turn)
            else:
                why.append(Dropped(BEYOND))
            if not fits:  # nor do any that follow
                left = len(chat.at) - number - 1
                notes[f"answer left out: {BEYOND}"] += left
                break
        return groups

    def _turn(self, chat: Chat, number: int, notes: Counter[str]) -> Turn:
        """Return answer ``number``. Raises Dropped if it gives no label."""
        at = chat.at[number]
        if at in chat.row.untaught:
            raise Dropped(UNTAUGHT)
        turn = chat.turn(number)
        for name, written in lost_fields(chat.row.messages[at], turn.text):
            if written:
                raise Dropped(f"the answer's `{name}` is not in the text ({WAY_OUT})")
            notes[f"field `{name}` of an answer is not in the text"] += 1
        return turn

    def _count(self, text: str) -> int:
        return len(self.encode(text).ids)

    def _beyond(self, run: Group) -> int | None:
        """Count the run's answers that begin beyond seq_length; None if there is room for more."""
        coded = self.encode(run.text)
        if len(coded.ids) < self.seq_length:
            return None
        return sum(
            e is not None and e >= self.seq_length for e in coded.edges([s for s, _ in run.spans])
        )

    def _tokens(self, group: Group, key: bytes, row: Row) -> Iterator[tuple[TokenSample, bool]]:
        """Return the group as one sample, or as several if a token would span the edge of an answer
        other than the last.
        """
        coded = self.encode(group.text)
        edges = coded.edges([place for span in group.spans for place in span])
        first, last = 0, len(group.spans) - 1
        for n, (_, stop) in enumerate(group.spans):
            crossed = edges[2 * n] is None or edges[2 * n + 1] is None
            if not crossed and n < last:
                continue
            text = group.text if n == last else group.text[:stop]
            part = Group(group.numbers[first : n + 1], text, group.spans[first : n + 1])
            if crossed:
                yield self._by_pieces(part, key, row)
            elif self.pattern is not None:
                yield self._sample(
                    row,
                    key,
                    part.numbers[0],
                    coded.ids,
                    self._mask(part, len(coded.ids), coded.offsets),
                )
            else:
                mask = np.zeros(len(coded.ids), dtype=np.bool_)
                for k in range(first, n + 1):
                    mask[edges[2 * k] : edges[2 * k + 1]] = True
                yield self._sample(row, key, part.numbers[0], coded.ids, mask)
            first = n + 1

    def _by_pieces(self, group: Group, key: bytes, row: Row) -> tuple[TokenSample, bool]:
        """Tokenise the prompt and the last answer separately."""
        start, stop = group.spans[-1]
        pieces = [(a, b) for a, b in ((0, start), (start, stop), (stop, len(group.text))) if b > a]
        coded = [(self.encode(group.text[a:b]), a) for a, b in pieces]
        ids = np.concatenate([c.ids for c, _ in coded])
        places = np.concatenate([c.offsets + a for c, a in coded])
        return self._sample(row, key, group.numbers[0], ids, self._mask(group, len(ids), places))

    def _mask(self, group: Group, count: int, offsets: Any) -> Bool:
        """Reference: compute the mask from the positions of all tokens."""
        spans = group.spans if self.pattern is None else self._matched(group)
        mask = np.zeros(count, dtype=np.bool_)
        for start, stop in spans:
            mask |= inside(offsets, start, stop)
        return mask

    def _matched(self, group: Group) -> list[tuple[int, int]]:
        """Return the parts of the answers that the pattern keeps."""
        assert self.pattern is not None
        found = [m.span(1) for m in self.pattern.finditer(group.text)]
        if not found:
            raise Dropped(NO_MATCH)
        out, n = [], 0
        for start, stop in group.spans:
            while n < len(found) and found[n][1] <= start:
                n += 1
            k = n
            while k < len(found) and found[k][0] < stop:
                out.append((max(found[k][0], start), min(found[k][1], stop)))
                k += 1
        return [(a, b) for a, b in out if b > a]

    def _sample(
        self, row: Row, key: bytes, turn: int, ids: Any, mask: Bool
    ) -> tuple[TokenSample, bool]:
        if not self.tokenised and ids.size and int(ids.max()) >= self.vocab_size:
            bad = int(ids[ids >= self.vocab_size][0])
            raise DataError(
                f"{row.where}: token id {bad} ({self.tokenizer.convert_ids_to_tokens(bad)!r}) is "
                f"outside the target's vocabulary of {self.vocab_size}: "
                "its tokenizer has tokens that its embedding has no row for. Use the tokenizer "
                "of these weights."
            )
        n = self.seq_length
        return TokenSample(row.number, key, ids[:n], mask[:n], turn), len(ids) > n

    def encode(self, text: str) -> Coded:
        """Encode ``text``, up to one token more than is kept."""
        return encode(self.tokenizer, text, self.seq_length + 1)


class _Room:
    """Finds where a chat's contexts fill seq_length, without tokenising each of them."""

    def __init__(self, maker: SampleMaker) -> None:
        self.maker, self.ask_at = maker, maker.seq_length

    def for_answer(self, turn: Turn) -> bool:
        """Tell whether ``turn``'s answer begins before seq_length. May be off by a token that an
        eighth more text would have shown.
        """
        if len(turn.context) < self.ask_at:
            return True
        self.ask_at = len(turn.context) * 9 // 8
        return len(self.maker.encode(turn.context).ids) < self.maker.seq_length


def conversation_key(value: ChatRow) -> bytes:
    """Return the key of what precedes the first answer to a question, or of everything if nothing
    was asked.
    """
    asked = next(
        (i for i, m in enumerate(value.messages) if m["role"] not in ("assistant", "system")), None
    )
    answers = [
        i for i, m in enumerate(value.messages) if m["role"] == "assistant" and i > (asked or 0)
    ]
    return sample_key(
        value.messages[: answers[0]] if asked is not None and answers else value.messages
    )


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile ``--assistant-pattern``; a dot matches newlines too, and group 1 is supervised."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UsageError(
            f"--assistant-pattern {pattern!r} is not a regular expression: {error}."
        ) from error
    if compiled.groups < 1:
        raise UsageError(
            f"--assistant-pattern {pattern!r} has no group; put the supervised part in "
            "parentheses, as in 'ASSISTANT: (.*?)USER:'."
        )
    return compiled


def unusable(value: ChatRow) -> Made | None:
    """Return a drop if any text in the row's messages and tools cannot be given to a tokenizer.
    Call it before rendering.
    """
    for i, message in enumerate(value.messages):
        if not isinstance(message["content"], str | None):
            return Made([], NOT_TEXT, f"messages[{i}] has parts other than text")
    if value.tools is None and all(len(m) == 2 for m in value.messages):  # the same, sooner
        text = "".join(m["role"] + (m["content"] or "") for m in value.messages)
        if text.isascii() or not HALVES.search(text):
            return None
    text = canonical_text([value.messages, value.tools])
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # Half of an emoji, as a cut of UTF-16 text leaves it: JSON can write it, UTF-8 cannot.
        # Escaped here, because the log is UTF-8 too.
        before, half = text[max(error.start - 20, 0) : error.start], text[error.start]
        return Made([], NOT_UNICODE, f"half a character, {half!a}, after {before!a}")
    return None


def sample_key(prompt: Any) -> bytes:
    """Return the first KEY_BYTES bytes of sha256 over the canonical JSON of the prompt (messages,
    or ids), or of a conversation's id.
    """
    return hashlib.sha256(canonical(prompt)).digest()[:KEY_BYTES]
