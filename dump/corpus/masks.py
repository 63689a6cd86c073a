"""Rows -> tokens with a loss mask: which tokens the target's own answers are made of.

Three rules, the first that applies:
1. ``assistant-pattern``: group 1 of a regular expression over the rendered chat.
2. ``generation-tag``: the template marks answers itself with ``{% generation %}``.
3. ``render-difference``: the chat is rendered turn by turn; an answer is what its turn adds to the prompt before it.

In every rule a mask is a span of characters turned into the tokens that lie wholly inside it. An answer ends with its end-of-turn
token (the first special token after its text), which is supervised; what the template adds behind that is not. An answer that was cut short ends with its
own text: it must not teach an end. Rows that come as tokens pass through (rule "given").
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError

from dspark.cache.errors import DataError, UsageError
from dspark.cache.records import KEY_BYTES, Bool, TokenSample, last_rows
from dspark.dump.corpus.rows import ChatRow, Message, Row, TokenRow

NO_ANSWER = "no assistant turn"
TOO_FEW = "too few supervised tokens"
REWRITES = "template rewrites history"
REFUSED = "template refuses the row"
NO_MATCH = "assistant pattern does not match"
NOT_UNICODE = "not Unicode text"
NOT_TEXT = "content is not text alone"


@dataclass(frozen=True, slots=True)
class Made:
    """A row's samples in order of their turns, or the reason why there is none (``detail``: more about it).

    ``truncated``: how many of the samples were cut at seq_length.
    """

    samples: list[TokenSample]
    dropped: str | None = None
    detail: str = ""
    truncated: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer in the rendered text: characters ``[start, stop)`` of its turn; ``text_stop``: where its own text ends, if found."""

    start: int
    stop: int
    text_stop: int | None


class Dropped(Exception):
    """The row gives no sample: ``reason`` is what is counted, ``detail`` is about this row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


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
    ) -> None:
        self.tokenizer = tokenizer
        self.tokenised = tokenised
        self.vocab_size = vocab_size
        self.seq_length = seq_length
        self.min_supervised = min_supervised
        self.pattern: re.Pattern[str] | None = None
        self.mask_rule = "given"
        self.ends: set[int] = set()
        if tokenised:
            return
        template = chat_template(tokenizer)
        if assistant_pattern is not None:
            self.pattern = compile_pattern(assistant_pattern)
            self.mask_rule = "assistant-pattern"
        else:
            tagged = re.search(r"\{%-?\s*generation\s*-?%\}", template)
            self.mask_rule = "generation-tag" if tagged else "render-difference"
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.ends = special | set(tokenizer.all_special_ids) | set(eos_token_ids)

    def make(self, row: Row) -> Made:
        """One row -> ``TokenSample`` of at most seq_length tokens, or why not."""
        value = row.value
        if isinstance(value, TokenRow) != self.tokenised:
            kinds = ("chat rows", "tokenised rows")
            raise DataError(
                f"{row.where}: found one of {kinds[not self.tokenised]} in a corpus that began with {kinds[self.tokenised]}. Split the file."
            )
        if isinstance(value, ChatRow) and (why_not := unusable(value)) is not None:
            return why_not
        try:
            if isinstance(value, TokenRow):
                ids, mask, key = self._given(value, row.where)
            else:
                ids, mask, key = self._chat(value)
        except Dropped as why:
            return Made([], why.reason, why.detail)
        truncated = len(ids) > self.seq_length
        ids, mask = ids[: self.seq_length], mask[: self.seq_length]
        if int(mask.sum()) < self.min_supervised or not last_rows(mask).any():
            return Made([], TOO_FEW)
        return Made([TokenSample(row.number, key, ids, mask)], truncated=int(truncated))

    def _given(self, value: TokenRow, where: str) -> tuple[Any, Bool, bytes]:
        # Before they are an array: JSON has integers of any size.
        if min(value.input_ids) < 0 or max(value.input_ids) >= self.vocab_size:
            bad = next(i for i in value.input_ids if not 0 <= i < self.vocab_size)
            raise DataError(
                f"{where}: token id {bad} is outside the target's vocabulary of {self.vocab_size}. Was it another tokenizer?"
            )
        mask = np.asarray(value.loss_mask, dtype=np.bool_)
        if not mask.any():
            raise Dropped(NO_ANSWER)
        return (
            np.asarray(value.input_ids, dtype=np.int32),
            mask,
            sample_key(value.input_ids[: int(mask.argmax())]),
        )

    def _chat(self, value: ChatRow) -> tuple[Any, Bool, bytes]:
        turns = [i for i, m in enumerate(value.messages) if m["role"] == "assistant"]
        if not turns:
            raise Dropped(NO_ANSWER)
        text = self._render(value, value.messages)
        coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.asarray(coded["input_ids"], dtype=np.int32)
        offsets = np.asarray(coded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        if self.pattern is not None:
            answers = self._by_pattern(value, turns, text)
        elif self.mask_rule == "generation-tag":
            answers = self._by_tag(value, turns, text, offsets)
        else:
            answers = self._by_difference(value, turns, text)
        mask = np.zeros(len(ids), dtype=np.bool_)
        for i, answer in enumerate(answers):
            cut = not value.finished and i == len(answers) - 1
            stop = self._answer_stop(answer, text, ids, offsets, cut)
            mask |= inside(offsets, answer.start, stop)
        return ids, mask, sample_key(value.messages[: turns[0]])

    def _render(self, value: ChatRow, messages: list[Message], prompt: bool = False) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tools=value.tools, tokenize=False, add_generation_prompt=prompt
                )
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise Dropped(REFUSED, str(error)) from error

    def _by_pattern(self, value: ChatRow, turns: list[int], text: str) -> list[Answer]:
        assert self.pattern is not None
        spans = [m.span(1) for m in self.pattern.finditer(text) if m.span(1)[1] > m.span(1)[0]]
        if not spans:
            raise Dropped(NO_MATCH)
        # What matched is what was asked for, its end included; only the last answer's own text is looked for, in case it was cut.
        last = _find_text(text, *spans[-1], content_text(value.messages[turns[-1]]))
        return [Answer(a, b, b) for a, b in spans[:-1]] + [
            Answer(*spans[-1], last if not value.finished else spans[-1][1])
        ]

    def _by_tag(self, value: ChatRow, turns: list[int], text: str, offsets: Any) -> list[Answer]:
        try:
            out = self.tokenizer.apply_chat_template(
                value.messages,
                tools=value.tools,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise Dropped(REFUSED, str(error)) from error
        marks = np.asarray(out["assistant_masks"], dtype=np.int8)
        assert marks.shape == (len(offsets),)
        edges = np.flatnonzero(np.diff(marks, prepend=0, append=0))
        spans = [
            (int(offsets[a, 0]), int(offsets[b - 1, 1])) for a, b in zip(edges[::2], edges[1::2], strict=True)
        ]
        if not spans:
            raise Dropped(NO_ANSWER)
        # The tag says where an answer ends; only a cut one is shortened to its own text.
        last = _find_text(text, *spans[-1], content_text(value.messages[turns[-1]]))
        return [Answer(a, b, b) for a, b in spans[:-1]] + [
            Answer(*spans[-1], last if not value.finished else spans[-1][1])
        ]

    def _by_difference(self, value: ChatRow, turns: list[int], text: str) -> list[Answer]:
        answers = []
        for i in turns:
            before = self._render(value, value.messages[:i], prompt=True) if i else ""
            through = text if i == len(value.messages) - 1 else self._render(value, value.messages[: i + 1])
            content = content_text(value.messages[i])
            if not text.startswith(before):
                raise Dropped(REWRITES)
            start = len(before)
            if (
                i == 0
            ):  # nothing was asked: its header is no answer either, where its text can be told from it
                start = max(text.find(content.strip()), 0)
            if text.startswith(through):
                answers.append(Answer(start, len(through), _find_text(text, start, len(through), content)))
                continue
            # Later turns changed how this one is rendered. It is still true if its own text follows its prompt at once.
            lead = len(text[start:]) - len(text[start:].lstrip())
            body = content.strip()
            if not body or not text.startswith(body, start + lead):
                raise Dropped(REWRITES)
            answers.append(Answer(start, len(text), start + lead + len(body)))
        return answers

    def _answer_stop(self, answer: Answer, text: str, ids: Any, offsets: Any, cut: bool) -> int:
        """The character at which supervision of ``answer`` stops."""
        if answer.text_stop == answer.stop:
            return answer.stop
        from_ = answer.start if answer.text_stop is None else answer.text_stop
        ends = [
            int(t) for t in np.flatnonzero(inside(offsets, from_, answer.stop)) if int(ids[t]) in self.ends
        ]
        if cut:
            if answer.text_stop is not None:
                return answer.text_stop
            return int(offsets[ends[-1], 0]) if ends else answer.stop
        if ends:
            return int(offsets[ends[-1] if answer.text_stop is None else ends[0], 1])
        if answer.text_stop is not None:
            return answer.text_stop
        return answer.start + len(text[answer.start : answer.stop].rstrip())


def chat_template(tokenizer: Any) -> str:
    """The template's text, or a clear refusal."""
    if tokenizer is None:
        raise UsageError(
            "the target has no tokenizer, so chat rows cannot be tokenised. Give rows with `input_ids` and `loss_mask`."
        )
    if not tokenizer.is_fast:
        raise UsageError(
            "the target's tokenizer gives no character offsets (it is not a fast one). Give rows with `input_ids` and `loss_mask`."
        )
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise UsageError(
            "the target's tokenizer has no chat template, so chat rows cannot be rendered. Use an instruction-tuned target, put a chat_template.jinja "
            "into its folder, or give rows with `input_ids` and `loss_mask`."
        )
    return str(template)


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
        if not isinstance(message["content"], str):
            return Made([], NOT_TEXT, f"messages[{i}] has parts other than text")
    text = canonical([value.messages, value.tools])
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # Half of an emoji, as a cut of UTF-16 text leaves it: JSON can write it, UTF-8 cannot. Escaped here, for the log is UTF-8 too.
        before, half = text[max(error.start - 20, 0) : error.start], text[error.start]
        return Made([], NOT_UNICODE, f"half a character, {half!a}, behind {before!a}")
    return None


def content_text(message: Message) -> str:
    """A message's text."""
    return str(message["content"])


def _find_text(text: str, start: int, stop: int, content: str) -> int | None:
    """Where ``content`` ends within ``text[start:stop]`` (its last occurrence), or None."""
    body = content.strip()
    at = text.rfind(body, start, stop) if body else -1
    return at + len(body) if at >= 0 else None


def inside(offsets: Any, start: int, stop: int) -> Bool:
    """Which tokens lie wholly in characters ``[start, stop)``. ``offsets`` int[S, 2]. A whitespace token whose span the tokenizer
    trimmed to nothing counts by its end."""
    out: Bool = (offsets[:, 0] >= start) & (offsets[:, 1] > start) & (offsets[:, 1] <= stop)
    return out


def sample_key(prompt: Sequence[Any]) -> bytes:
    """First KEY_BYTES bytes of sha256 over the canonical JSON of the prompt (messages, or ids)."""
    return hashlib.sha256(canonical(prompt).encode("utf-8", "surrogatepass")).digest()[:KEY_BYTES]


def canonical(value: Any) -> str:
    """Canonical JSON. What a data set holds beside JSON's types (the date of a message) is written as text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
