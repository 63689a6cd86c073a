"""Rows -> samples of tokens with a loss mask: which tokens the target's own answers are made of.

A sample is one generation of the target in the context in which it was served, or several where the template writes each of them,
and all before it, as the beginning of what follows (``--turns auto``). Every answer is supervised exactly once. Where an
answer begins and ends is found in ``turns.py`` ("render-difference"); an ``--assistant-pattern`` can only narrow it. An answer
that was cut short ends with its own text: it must not teach an end. Rows that come as tokens pass through ("given").

Tokens are those the server had: a prompt's, then the answer's. No token lies across the two.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dspark.cache.errors import DataError, UsageError
from dspark.cache.records import KEY_BYTES, Bool, TokenSample, last_rows
from dspark.dump.corpus.rows import BadRow, Row
from dspark.dump.corpus.shapes import ChatRow, TokenRow
from dspark.dump.corpus.template import Template, chat_template
from dspark.dump.corpus.turns import REFUSED, REWRITES, Chat, Dropped, Turn, lost_fields

__all__ = ["REFUSED", "REWRITES", "Dropped", "Made", "SampleMaker", "chat_template", "sample_key"]

NO_ANSWER = "no assistant turn"
TOO_FEW = "too few supervised tokens"
NO_MATCH = "assistant pattern does not match"
NOT_UNICODE = "not Unicode text"
NOT_TEXT = "content is not text alone"
MALFORMED = "malformed row (the log names place and key)"
BEYOND = "answer lies beyond --seq-length"
NOT_WHOLE = "turns do not make one sample (--turns auto gives several)"
CHARS = 12  # characters that are tokenised for a token that may be kept, at first
MARGIN = 64  # tokens in front of a cut that it may have changed


@dataclass(frozen=True, slots=True)
class Made:
    """A row's samples in order of their turns, or the reason why there is none (``detail``: more about it).

    ``truncated``: how many of the samples were cut at seq_length. ``notes``: what of the row is not in its samples, counted:
    answers that gave no label though others did, fields of answers that the template does not write.
    """

    samples: list[TokenSample]
    dropped: str | None = None
    detail: str = ""
    truncated: int = 0
    notes: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class Group:
    """Answers of one sample, by number: the text through the last one, and the characters ``[start, stop)`` of each in it."""

    numbers: list[int]
    text: str
    spans: list[tuple[int, int]]

    def takes(self, turn: Turn) -> bool:
        """Whether what is here so far is how the next context begins."""
        return turn.context.startswith(self.text[: self.spans[-1][1]])

    def add(self, turn: Turn) -> None:
        self.text = turn.text
        self.numbers.append(turn.number)
        self.spans.append((len(turn.context), len(turn.upto)))


class SampleMaker:
    """Turns rows into samples with one target's tokenizer and template. ``mask_rule`` names the rule for the manifest."""

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
        """One row -> ``TokenSample``s of at most seq_length tokens, or why not."""
        value = row.value
        if isinstance(value, BadRow):
            return Made([], MALFORMED, value.detail)
        if isinstance(value, TokenRow) != self.tokenised:
            kinds = ("chat rows", "tokenised rows")
            raise DataError(
                f"{row.where}: found one of {kinds[not self.tokenised]} in a corpus that began with {kinds[self.tokenised]}. Split the file."
            )
        if isinstance(value, ChatRow) and (why_not := unusable(value)) is not None:
            return why_not
        try:
            return self._given(value, row) if isinstance(value, TokenRow) else self._chat(value, row)
        except Dropped as why:
            return Made([], why.reason, why.detail)

    def _given(self, value: TokenRow, row: Row) -> Made:
        # Before they are an array: JSON has integers of any size.
        if min(value.input_ids) < 0 or max(value.input_ids) >= self.vocab_size:
            bad = next(i for i in value.input_ids if not 0 <= i < self.vocab_size)
            raise DataError(
                f"{row.where}: token id {bad} is outside the target's vocabulary of {self.vocab_size}. Was it another tokenizer?"
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
            raise Dropped(NO_ANSWER)
        notes: Counter[str] = Counter()
        if value.untaken:
            notes["further answers of a log, not taken"] += value.untaken
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
        return self._kept(samples, notes, why[0].detail if why else "")

    def _kept(self, samples: list[tuple[TokenSample, bool]], notes: Counter[str], detail: str) -> Made:
        kept = [(s, cut) for s, cut in samples if self._teaches(s.loss_mask)]
        if not kept:
            return Made([], TOO_FEW, detail, notes=notes)
        if len(kept) < len(samples):
            notes[f"answer left out: {TOO_FEW}"] += len(samples) - len(kept)
        return Made([s for s, _ in kept], None, detail, sum(cut for _, cut in kept), notes)

    def _teaches(self, mask: Bool) -> bool:
        return int(mask.sum()) >= self.min_supervised and bool(last_rows(mask).any())

    def _groups(self, chat: Chat, why: list[Dropped], notes: Counter[str]) -> list[Group]:
        """The row's answers, those of one sample together. ``why`` takes the answers that are no label."""
        numbers = range(len(chat.at))
        groups: list[Group] = []
        room = _Room(self)
        for number in numbers[-1:] if self.turns == "last" else numbers:
            try:
                turn = chat.turn(number)
            except Dropped as dropped:
                why.append(dropped)
                continue
            for name in lost_fields(self.template, chat.row.messages[chat.at[number]], turn.text):
                notes[f"field `{name}` of an answer is not in the text"] += 1
            fits = room.for_answer(turn)
            together = self.turns != "each" and groups and groups[-1].takes(turn)
            if together:
                groups[-1].add(turn)
            elif fits:
                groups.append(Group([], "", []))
                groups[-1].add(turn)
            else:
                why.append(Dropped(BEYOND))
            if not fits:  # nor does any that follows
                left = len(numbers) - number - 1
                notes[f"answer left out: {BEYOND}"] += left
                break
        return groups

    def _tokens(self, group: Group, key: bytes, row: Row) -> Iterator[tuple[TokenSample, bool]]:
        """The group as one sample; as more where a token would lie across the edge of an answer that is not the last."""
        ids, offsets = self.encode(group.text)
        first, last = 0, len(group.spans) - 1
        for n, (start, stop) in enumerate(group.spans):
            crossed = across(offsets, start) or across(offsets, stop)
            if not crossed and n < last:
                continue
            text = group.text if n == last else group.text[:stop]
            part = Group(group.numbers[first : n + 1], text, group.spans[first : n + 1])
            if crossed:
                yield self._by_pieces(part, key, row)
            else:
                yield self._sample(row, key, part.numbers[0], ids, self._mask(part, ids, offsets))
            first = n + 1

    def _by_pieces(self, group: Group, key: bytes, row: Row) -> tuple[TokenSample, bool]:
        """Prompt and last answer tokenised by themselves."""
        start, stop = group.spans[-1]
        ids: list[Any] = []
        offsets: list[Any] = []
        for a, b in ((0, start), (start, stop), (stop, len(group.text))):
            if b > a:
                some, where = self.encode(group.text[a:b])
                ids.append(some)
                offsets.append(where + a)
        whole, places = np.concatenate(ids), np.concatenate(offsets)
        return self._sample(row, key, group.numbers[0], whole, self._mask(group, whole, places))

    def _mask(self, group: Group, ids: Any, offsets: Any) -> Bool:
        spans = group.spans
        if self.pattern is not None:
            found = [m.span(1) for m in self.pattern.finditer(group.text)]
            if not found:
                raise Dropped(NO_MATCH)
            spans = [(max(a, s), min(b, e)) for a, b in found for s, e in spans]
        mask = np.zeros(len(ids), dtype=np.bool_)
        for start, stop in spans:
            if stop > start:
                mask |= inside(offsets, start, stop)
        return mask

    def _sample(self, row: Row, key: bytes, turn: int, ids: Any, mask: Bool) -> tuple[TokenSample, bool]:
        if not self.tokenised and ids.size and int(ids.max()) >= self.vocab_size:
            bad = int(ids[ids >= self.vocab_size][0])
            raise DataError(
                f"{row.where}: token id {bad} ({self.tokenizer.convert_ids_to_tokens(bad)!r}) is outside the target's vocabulary of {self.vocab_size}: "
                "its tokenizer has tokens that its embedding has no row for. Use the tokenizer of these weights."
            )
        n = self.seq_length
        return TokenSample(row.number, key, ids[:n], mask[:n], turn), len(ids) > n

    def encode(self, text: str) -> tuple[Any, Any]:
        """Ids int32[S] and their characters int64[S, 2]; at most one token more than is kept, and of a long text only what that needs."""
        size = self.seq_length * CHARS
        while True:
            head = text[:size]
            coded = self.tokenizer(head, add_special_tokens=False, return_offsets_mapping=True)
            ids = np.asarray(coded["input_ids"], dtype=np.int32)
            if len(head) == len(text) or len(ids) > self.seq_length + MARGIN:
                break
            size *= 4
        offsets = np.asarray(coded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        return ids[: self.seq_length + 1], offsets[: self.seq_length + 1]


class _Room:
    """Tells where a chat's contexts have filled seq_length, without tokenising each of them."""

    def __init__(self, maker: SampleMaker) -> None:
        self.maker, self.ask_at = maker, maker.seq_length

    def for_answer(self, turn: Turn) -> bool:
        """Whether ``turn``'s answer begins before seq_length. A token may be missed that an eighth more of text would have shown."""
        if len(turn.context) < self.ask_at:
            return True
        self.ask_at = len(turn.context) * 9 // 8
        return len(self.maker.encode(turn.context)[0]) < self.maker.seq_length


def conversation_key(value: ChatRow) -> bytes:
    """Of what stands before the first answer to something asked; of all of it where nothing was asked."""
    asked = next((i for i, m in enumerate(value.messages) if m["role"] not in ("assistant", "system")), None)
    answers = [i for i, m in enumerate(value.messages) if m["role"] == "assistant" and i > (asked or 0)]
    return sample_key(value.messages[: answers[0]] if asked is not None and answers else value.messages)


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """``--assistant-pattern``; a dot matches newlines too. Group 1 is what is supervised."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UsageError(f"--assistant-pattern {pattern!r} is not a regular expression: {error}.") from error
    if compiled.groups < 1:
        raise UsageError(
            f"--assistant-pattern {pattern!r} has no group; put the supervised part in parentheses, as in 'ASSISTANT: (.*?)USER:'."
        )
    return compiled


def unusable(value: ChatRow) -> Made | None:
    """The row dropped, if no tokenizer can be given what it says, wherever in its messages and tools that is. To be asked before it is rendered."""
    for i, message in enumerate(value.messages):
        if not isinstance(message["content"], str | None):
            return Made([], NOT_TEXT, f"messages[{i}] has parts other than text")
    text = canonical([value.messages, value.tools])
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # Half of an emoji, as a cut of UTF-16 text leaves it: JSON can write it, UTF-8 cannot. Escaped here, for the log is UTF-8 too.
        before, half = text[max(error.start - 20, 0) : error.start], text[error.start]
        return Made([], NOT_UNICODE, f"half a character, {half!a}, behind {before!a}")
    return None


def across(offsets: Any, at: int) -> bool:
    """Whether a token lies across character ``at``. ``offsets`` int[S, 2]."""
    return bool(((offsets[:, 0] < at) & (offsets[:, 1] > at)).any())


def inside(offsets: Any, start: int, stop: int) -> Bool:
    """Which tokens lie wholly in characters ``[start, stop)``. ``offsets`` int[S, 2]. A whitespace token whose span the tokenizer
    trimmed to nothing counts by its end."""
    out: Bool = (offsets[:, 0] >= start) & (offsets[:, 1] > start) & (offsets[:, 1] <= stop)
    return out


def sample_key(prompt: Any) -> bytes:
    """First KEY_BYTES bytes of sha256 over the canonical JSON of the prompt (messages, or ids), or of a conversation's id."""
    return hashlib.sha256(canonical(prompt).encode("utf-8", "surrogatepass")).digest()[:KEY_BYTES]


def canonical(value: Any) -> str:
    """Canonical JSON. What a data set holds beside JSON's types (the date of a message) is written as text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
