"""``--regenerate``: the corpus gives the prompts, the target its own answers, and the states of both are kept from the run that made them.

Rows go turn by turn: each prompt is rendered from the turns before with the target's own answers in them. Only the last turn's states are kept; they cover the whole
conversation, and earlier answers in it are supervised where the last prompt still begins with them token by token (templates that strip
thinking from history rewrite them; then they are context only).

A part is ``PART_ROWS`` rows here, because lengths are not known before. Its answers are on disk before it is, and are joined into
``<store>.answers.jsonl`` at the end: chats that ``--data`` takes (``answers_disk.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dspark.cache.codec.base import axis_of
from dspark.cache.errors import UsageError
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
from dspark.dump.corpus.parts import PartReader, PartRows
from dspark.dump.corpus.rows import BadRow, Row
from dspark.dump.corpus.shapes import ChatRow, Message
from dspark.dump.corpus.template import Refused, Template
from dspark.dump.engines.answers import MASK_RULE, Answered, Ask, Sampling, seed_of
from dspark.dump.engines.engine import Captured, CodedStates
from dspark.dump.regenerate.answer_files import AnswerFiles

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dspark.cache.codec.base import Codec
    from dspark.cache.files.part import PartRecord
    from dspark.dump.engines.engine import Engine

PART_ROWS = 256
NO_PROMPT = "no user turn"
TOO_LONG = "prompt leaves no room for an answer"
EMPTY = "answer has fewer than two tokens"


def turns(row: Row) -> list[list[Message]]:
    """The messages before each answer, the corpus's own answers left out: an answer is due before every user turn but the first, and at the end."""
    assert isinstance(row.value, ChatRow)
    out: list[list[Message]] = [[]]
    for message in row.value.messages:
        if message["role"] == "assistant":
            continue
        if message["role"] == "user" and any(m["role"] == "user" for m in out[-1]):
            out.append([])
        out[-1].append(message)
    return out


class Prompts(SampleMaker):
    """Renders turns. Stands for a ``SampleMaker`` before the answers are there (plan, self-check, calibration): a sample is the first prompt, all of it supervised."""

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
        self.tokenised = False

    def ids(self, messages: list[Message], tools: list[Any] | None) -> list[int]:
        """The prompt that asks for the answer to ``messages``. Raises Dropped where the template refuses them."""
        try:
            text = self.template.render([self.template.form(m) for m in messages], tools, prompt=True)
        except Refused as error:
            raise Dropped(REFUSED, str(error)) from error
        out: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return out

    def make(self, row: Row) -> Made:
        if isinstance(row.value, BadRow):
            return Made([], MALFORMED, row.value.detail)
        if not isinstance(row.value, ChatRow):
            raise UsageError("--regenerate needs chats: this corpus holds tokens, whose prompts end nowhere.")
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


@dataclass(slots=True)
class Conversation:
    """A row under way: turns still to come, and what has been said."""

    row: Row
    coming: list[list[Message]]
    said: list[Message] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)  # of the last turn's prompt and answer
    spans: list[tuple[int, int]] = field(default_factory=list)
    turn: int = 0
    finished: bool = True

    def ask(self, key: int, prompts: Prompts) -> Ask | str:
        """The next turn's prompt, or why there is none."""
        assert isinstance(self.row.value, ChatRow)
        self.said += self.coming.pop(0)
        try:
            prompt = prompts.ids(self.said, self.row.value.tools)
        except Dropped as drop:
            return drop.reason
        room = min(prompts.sampling.max_tokens, prompts.seq_length - len(prompt))
        if room < 2:
            return TOO_LONG
        if prompt[: len(self.ids)] != self.ids:
            self.spans = [s for s in self.spans if prompt[: s[1]] == self.ids[: s[1]]]
        self.turn += 1
        seed = seed_of(self.row.number, self.turn)
        return Ask(key, prompt, room, seed, not self.coming, tuple(self.spans))

    def hear(self, answered: Answered, tokenizer: Any) -> None:
        start = len(answered.ask.prompt)
        self.ids = [*answered.ask.prompt, *answered.ids]
        self.spans = [*answered.ask.spans, (start, len(self.ids))]
        text = tokenizer.decode(answered.ids, skip_special_tokens=True)
        self.said.append({"role": "assistant", "content": text})
        self.finished = answered.finished

    def sample(self) -> TokenSample:
        mask = np.zeros(len(self.ids), np.bool_)
        for a, b in self.spans:
            mask[a:b] = True
        first = next(i for i, m in enumerate(self.said) if m["role"] == "assistant")
        return TokenSample(
            self.row.number, sample_key(self.said[:first]), np.asarray(self.ids, np.int32), mask
        )


class Regenerator:
    """Makes parts out of prompts. ``reader`` has the corpus, counts its rows and judges how many of them may be dropped; its own parts are not asked for."""

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

    def parts(self, committed: Mapping[int, PartRecord]) -> Iterator[tuple[PartRows, list[CodedStates]]]:
        """Every part that is missing, with its states."""
        for part, rows in self.reader.blocks(committed):
            # Before more is asked, not behind an answered part: that one is to be kept.
            self.reader.check_dropped()
            states = self._answer(part, rows)
            self.reader.rows_read = part.row_stop
            yield part, states

    def _answer(self, part: PartRows, rows: list[Row]) -> list[CodedStates]:
        """Fills ``part`` with the samples of ``rows``; returns their states."""
        talks: dict[int, Conversation] = {}
        asks: list[Ask] = []
        kept: dict[int, tuple[TokenSample, CodedStates]] = {}

        def drop(row: Row, reason: str) -> None:
            self.reader.drop(part, row, reason)

        def ask_next(key: int) -> None:
            ask = talks[key].ask(key, self.prompts)
            if isinstance(ask, str):
                drop(talks[key].row, ask)
            else:
                asks.append(ask)

        for row in rows:
            made = self.prompts.make(row)
            if not made.samples:
                drop(row, made.dropped or NO_ANSWER)
                continue
            talks[row.number] = Conversation(row, turns(row))
            ask_next(row.number)
        while asks:  # a round a turn; conversations end at different rounds
            round_, asks = asks, []
            for answered in self.engine.answer(round_, self.prompts.sampling, self.stops, self.codec):
                key = answered.ask.key
                talk = talks[key]
                if len(answered.ids) < 2:
                    drop(talk.row, EMPTY)
                    continue
                talk.hear(answered, self.prompts.tokenizer)
                if answered.states is None:
                    ask_next(key)
                    continue
                sample = talk.sample()
                if int(sample.loss_mask.sum()) < self.min_supervised:
                    drop(talk.row, TOO_FEW)
                else:
                    kept[key] = sample, answered.states
        done = [talks[n] for n in sorted(kept)]
        part.samples = [kept[t.row.number][0] for t in done]
        part.truncated = sum(not t.finished for t in done)
        self.answers.save(
            part.index,
            [{"row": t.row.number, "messages": t.said, "finished": t.finished} for t in done],
        )
        return [kept[t.row.number][1] for t in done]


def batches_of(
    part: int, samples: Sequence[TokenSample], states: Sequence[CodedStates]
) -> Iterator[Captured]:
    """The part's samples one by one, as an engine's stream would give them."""
    for i, (sample, coded) in enumerate(zip(samples, states, strict=True)):
        rows = {"token": len(sample.input_ids), "last": int(last_rows(sample.loss_mask).sum())}
        for name, array in coded.arrays.items():
            axis = axis_of(name)
            assert array.shape[0] == rows.get(axis, len(array)), (sample.row, name, array.shape)
        yield Captured(part, [i], coded)
