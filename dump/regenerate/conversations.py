"""``--regenerate``: the corpus gives the prompts, the target its own answers, and the states of
both are kept from the run that made them.

Rows go turn by turn: each prompt is rendered from the turns before with the target's own answers in
them. Only the last turn's states are kept; they cover the whole conversation, and earlier answers
in it are supervised where the last prompt still begins with them token by token (templates that
strip thinking from history rewrite them; then they are context only).

A part is ``PART_ROWS`` rows here, because lengths are not known in advance. Its answers are on disk
before it is, and are joined into ``<store>.answers.jsonl`` at the end: chats that ``--data`` takes
(``answer_files.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dspark.cache.codec.base import axis_of
from dspark.cache.codec.state_errors import StateError
from dspark.cache.errors import EngineError, UsageError
from dspark.cache.records import TokenSample, last_rows
from dspark.dump.corpus.masks import (
    MALFORMED,
    NO_ANSWER,
    REFUSED,
    TOO_FEW,
    Dropped,
    Made,
    SampleMaker,
    sample_key,
    unusable,
)
from dspark.dump.corpus.messages import Message
from dspark.dump.corpus.parts import PartReader, PartRows
from dspark.dump.corpus.rows import BadRow, Row
from dspark.dump.corpus.shapes import ChatRow
from dspark.dump.corpus.template import Refused, Template
from dspark.dump.engines.answers import MASK_RULE, Answered, Ask, Sampling, seed_of
from dspark.dump.engines.engine import Captured, CodedStates
from dspark.dump.regenerate.answer_files import AnswerFiles
from dspark.dump.regenerate.heard import Listener

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dspark.cache.codec.base import Codec
    from dspark.cache.parts.record import PartRecord
    from dspark.dump.engines.engine import Engine

PART_ROWS = 256
NO_PROMPT = "no user turn"
TOO_LONG = "prompt leaves no room for an answer"
EMPTY = "answer has fewer than two tokens"
NO_CALL = "the target did not make the call whose result the row records"


def turns(row: Row) -> list[list[Message]]:
    """Yield the messages before each answer, without the corpus's own answers. An answer is due
    before every user turn but the first, before tool results (which answer its calls), and at the
    end.
    """
    assert isinstance(row.value, ChatRow)
    out: list[list[Message]] = [[]]
    for message in row.value.messages:
        if message["role"] == "assistant":
            continue
        asked = any(m["role"] in ("user", "tool") for m in out[-1])
        result = message["role"] == "tool"
        if asked and (message["role"] == "user" or (result and out[-1][-1]["role"] != "tool")):
            out.append([])
        out[-1].append(message)
    return out


class Prompts(SampleMaker):
    """Renders turns. Stands in for a ``SampleMaker`` before there are answers (plan, self-check,
    calibration): a sample is the first prompt, all of it supervised.
    """

    def __init__(
        self,
        tokenizer: Any,
        sampling: Sampling,
        seq_length: int,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        day: str | None = None,
    ) -> None:
        thinking = {} if sampling.thinking is None else {"enable_thinking": sampling.thinking}
        self.template = Template(tokenizer, {**(template_kwargs or {}), **thinking}, day)
        self.tokenizer, self.sampling, self.seq_length = tokenizer, sampling, seq_length
        self.mask_rule = f"{MASK_RULE} ({sampling})"
        self.listener = Listener(self.template)
        self.keeps_history = self.template.keeps_history()
        self.tokenised = False

    def ids(self, messages: list[Message], tools: list[Any] | None) -> list[int]:
        """Return the prompt that asks for the answer to ``messages``. Raises Dropped if the
        template refuses them.
        """
        try:
            text = self.template.render(
                [self.template.form(m) for m in messages], tools, prompt=True
            )
        except Refused as error:
            raise Dropped(REFUSED, str(error)) from error
        out: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return out

    def make(self, row: Row) -> Made:
        if isinstance(row.value, BadRow):
            return Made([], MALFORMED, row.value.detail)
        if not isinstance(row.value, ChatRow):
            raise UsageError(
                "--regenerate needs chats: this corpus holds tokens, which do not show "
                "where a prompt ends."
            )
        if (why := unusable(row.value)) is not None:
            return why
        first = turns(row)[0]
        if not any(m["role"] == "user" for m in first):
            return Made([], NO_PROMPT)
        try:
            ids = np.asarray(self.ids(first, row.value.tools), np.int32)
        except Dropped as drop:
            return Made([], drop.reason, drop.detail)
        if len(ids) + 2 > self.seq_length:
            return Made([], TOO_LONG)
        return Made([TokenSample(row.number, sample_key(first), ids, np.ones(len(ids), np.bool_))])


# a sample, its states, whether its last answer came to its end
Kept = tuple[TokenSample, CodedStates, bool]


@dataclass(slots=True)
class Conversation:
    """A row in progress: turns still to come, messages so far, and complete samples. Answers share
    a sample as long as each prompt begins, token by token, with the text so far; otherwise a new
    sample begins. If the template is known to rewrite its history, the states of every answer are
    kept for that case.
    """

    row: Row
    coming: list[list[Message]]
    said: list[Message] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)  # of the last turn's prompt and answer
    spans: list[tuple[int, int]] = field(default_factory=list)
    states: CodedStates | None = None
    turn: int = 0
    first: int = 0  # the first answer supervised in ``ids``
    finished: bool = True
    done: list[Kept] = field(default_factory=list)
    lost: int = 0  # answers whose states are not kept, because their tokens change when retokenised
    prompts: Prompts | None = None
    answer: int = 0  # which of several conversations of the row

    def ask(self, key: int, prompts: Prompts) -> Ask | str:
        """Return the next turn's prompt, or why there is none."""
        assert isinstance(self.row.value, ChatRow)
        self.prompts = prompts
        coming = self.coming.pop(0)
        if not self._paired(coming):
            return NO_CALL
        self.said += coming
        try:
            prompt = prompts.ids(self.said, self.row.value.tools)
        except Dropped as drop:
            return drop.reason
        room = min(prompts.sampling.max_tokens, prompts.seq_length - len(prompt))
        if room < 2:
            return TOO_LONG
        if prompt[: len(self.ids)] != self.ids:
            self._end_sample(prompt)
        self.turn += 1
        seed = seed_of(self.row.number, self.turn, self.answer)
        keep = not self.coming or not prompts.keeps_history
        return Ask(key, prompt, room, seed, keep, tuple(self.spans), self.row.number)

    def _end_sample(self, prompt: list[int]) -> None:
        """End a sample that the next prompt does not begin with; it may have been asked for without
        its states.
        """
        if self.states is not None:
            self.done.append(self.kept())
            self.spans, self.first = [], self.turn
        else:
            before = len(self.spans)
            self.spans = [s for s in self.spans if prompt[: s[1]] == self.ids[: s[1]]]
            self.lost += before - len(self.spans)
        self.states = None

    def _paired(self, coming: list[Message]) -> bool:
        """Give the k-th recorded result the id of the k-th call. False if the numbers differ."""
        results = [m for m in coming if m["role"] == "tool"]
        if not results:
            return True
        calls = self.said[-1].get("tool_calls") or [] if self.said else []
        if len(calls) < len(results):
            return False
        places = [i for i, m in enumerate(coming) if m["role"] == "tool"]
        for at, call in zip(places, calls, strict=False):
            coming[at] = coming[at] | {"tool_call_id": call["id"], "name": call["function"]["name"]}
        return True

    def hear(self, answered: Answered, tokenizer: Any) -> None:
        start = len(answered.ask.prompt)
        self.ids = [*answered.ask.prompt, *answered.ids]
        self.spans = [*answered.ask.spans, (start, len(self.ids))]
        self.states = answered.states
        self.finished = answered.finished
        assert self.prompts is not None
        ids = list(answered.ids)
        text = tokenizer.decode(ids[:-1] if answered.finished else ids, skip_special_tokens=False)
        template = self.prompts.template
        text = text.removesuffix(template.end) if template.end else text
        opened = tokenizer.decode(answered.ask.prompt[-32:], skip_special_tokens=False)
        self.said.append(self.prompts.listener.hear(text, opened, 10 * self.turn))

    def sample(self) -> TokenSample:
        mask = np.zeros(len(self.ids), np.bool_)
        for a, b in self.spans:
            mask[a:b] = True
        first = next(i for i, m in enumerate(self.said) if m["role"] == "assistant")
        ids = np.asarray(self.ids, np.int32)
        return TokenSample(self.row.number, sample_key(self.said[:first]), ids, mask, self.first)

    def kept(self) -> Kept:
        assert self.states is not None
        return self.sample(), self.states, self.finished


class Regenerator:
    """Makes parts out of prompts. ``reader`` reads the corpus, counts rows and limits how many may
    be dropped; its own parts are not used.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Prompts,
        stops: Sequence[int],
        codec: Codec,
        reader: PartReader,
        answers: AnswerFiles,
        min_supervised: int,
    ) -> None:
        self.engine = engine
        self.prompts, self.stops, self.codec = prompts, stops, codec
        self.reader, self.answers, self.min_supervised = reader, answers, min_supervised

    def parts(
        self, committed: Mapping[int, PartRecord]
    ) -> Iterator[tuple[PartRows, list[CodedStates]]]:
        """Yield every missing part with its states."""
        for part, rows in self.reader.blocks(committed):
            # Before asking more, not after a part was answered: that part is kept.
            self.reader.check_dropped()
            states = self._answer(part, rows)
            self.reader.rows_read += part.row_stop - part.row_start
            yield part, states

    def _answer(self, part: PartRows, rows: list[Row]) -> list[CodedStates]:
        """Fill ``part`` with the samples of ``rows``; returns their states."""
        talks: dict[int, Conversation] = {}
        asks: list[Ask] = []
        ended: list[Conversation] = []
        failed: list[tuple[Row, str]] = []
        count = self.prompts.sampling.answers

        def end(talk: Conversation, reason: str | None = None) -> None:
            """Keep the complete samples of a conversation that ends here."""
            if talk.states is not None:
                talk.done.append(talk.kept())
            enough = self.min_supervised
            talk.done = [k for k in talk.done if int(k[0].loss_mask.sum()) >= enough]
            if not talk.done or reason == NO_CALL:
                failed.append((talk.row, reason or TOO_FEW))
                return
            if reason is not None:
                self.reader.notes[f"answer left out: {reason}"] += 1
            if talk.lost:
                self.reader.notes["answer in a later prompt has other tokens, not supervised"] += (
                    talk.lost
                )
            ended.append(talk)

        def ask_next(key: int) -> None:
            talk = talks[key]
            ask = talk.ask(key, self.prompts)
            if isinstance(ask, str):
                end(talk, ask)
            else:
                asks.append(ask)

        for row in rows:
            made = self.prompts.make(row)
            if not made.samples:
                self.reader.drop(part, row, made.dropped or NO_ANSWER)
                continue
            for answer in range(count):
                key = row.number * count + answer
                talks[key] = Conversation(row, turns(row), answer=answer)
                ask_next(key)
        while asks:  # one round per turn; conversations end at different rounds
            round_, asks = asks, []
            for answered in self._answered(round_, talks):
                key = answered.ask.key
                talk = talks[key]
                if len(answered.ids) < 2:
                    end(talk, EMPTY)
                    continue
                talk.hear(answered, self.prompts.tokenizer)
                if talk.coming:
                    ask_next(key)
                else:
                    end(talk)
        self._count_failed(part, failed, {talk.row.number for talk in ended})
        ended.sort(key=lambda talk: (talk.row.number, talk.answer))
        whole = sorted(
            (kept for talk in ended for kept in talk.done), key=lambda k: (k[0].row, k[0].turn)
        )
        part.samples = [sample for sample, _, _ in whole]
        part.truncated = sum(not finished for _, _, finished in whole)
        self.answers.save(part.index, [_line(talk, count) for talk in ended])
        return [states for _, states, _ in whole]

    def _answered(
        self, asks: Sequence[Ask], talks: Mapping[int, Conversation]
    ) -> Iterator[Answered]:
        """Yield the engine's answers; a state that cannot be stored is an error that names its
        row.
        """
        try:
            yield from self.engine.answer(asks, self.prompts.sampling, self.stops, self.codec)
        except StateError as error:
            if error.conversation is None:
                raise
            row = talks[error.conversation].row
            raise EngineError(
                f"row {row.number} (counted from 0; {row.where}), prompt and answer: {error}"
            ) from error

    def _count_failed(self, part: PartRows, failed: list[tuple[Row, str]], kept: set[int]) -> None:
        """Drop a row, once, if none of its conversations is complete; else leave out the incomplete
        ones.
        """
        for row, reason in failed:
            if row.number in kept:
                self.reader.notes[f"answer left out: {reason}"] += 1
            else:
                kept.add(row.number)
                self.reader.drop(part, row, reason)


def _line(talk: Conversation, count: int) -> dict[str, Any]:
    """Format a conversation for the file of answers; ``answer``: which of its row's several."""
    out = {
        "row": talk.row.number,
        "messages": talk.said,
        "finished": talk.finished,
        "samples": len(talk.done),
    }
    return out | {"answer": talk.answer} if count > 1 else out


def batches_of(
    part: int, samples: Sequence[TokenSample], states: Sequence[CodedStates]
) -> Iterator[Captured]:
    """Yield the part's samples one by one, as an engine's stream would."""
    for i, (sample, coded) in enumerate(zip(samples, states, strict=True)):
        rows = {"token": len(sample.input_ids), "last": int(last_rows(sample.loss_mask).sum())}
        for name, array in coded.arrays.items():
            axis = axis_of(name)
            assert array.shape[0] == rows.get(axis, len(array)), (sample.row, name, array.shape)
        yield Captured(part, [i], coded)
