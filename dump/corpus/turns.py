"""Split a chat into its answers, each as the text the target was served and the text it wrote.

An answer is what its turn adds to the prompt before it: the history is rendered with the generation
prompt, then through the turn, and the difference is what the target wrote, up to the turn's end. If
the template renders the turn differently from what the prompt promised (a prompt that opens or
closes a thought that the turn does not have), the context is the one that this answer was served
in. An answer that does not reach the text completely (its thought, its calls) gives no label: it is
left out, with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dspark.dump.corpus.messages import Message
from dspark.dump.corpus.shapes import ChatRow
from dspark.dump.corpus.template import Refused, Template, common

WAY_OUT = "remove such rows, or let the target answer: --regenerate"
REWRITES = f"the template renders the history differently after the answer is added ({WAY_OUT})"
REFUSED = "template refuses the row"
NO_THOUGHT = f"the template leaves out the answer's thought ({WAY_OUT})"
NO_CALLS = f"the template leaves out the answer's tool calls ({WAY_OUT})"
NO_TEXT = f"the template leaves out the answer's text ({WAY_OUT})"

OPENS = re.compile(r"think|thought|reason|analy|reflect", re.IGNORECASE)
TAG = re.compile(r"<[^<>]+>|\[/?[A-Z_]+\]|◁[^◁▷]+▷")
WRITTEN = re.compile(
    r"(thoughts?|thinking|reason|analysis|chain_of_thought|cot|rationale|audio|refusal|channel|tool|function)(_\w+)?|reasoning\w*"
)
UNCLOSED = re.compile(r"\s*<(think|thinking|thought|reasoning)>(?!.*</\1>)(.*)", re.DOTALL)
INLINE = re.compile(
    r"\s*(?:<(think|thinking|thought|reasoning)>)?(.*?)</(think|thinking|thought|reasoning)>",
    re.DOTALL,
)


class Dropped(Exception):
    """A row or an answer gives no label: ``reason`` is what is counted, ``detail`` is about this
    one.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)
class Turn:
    """Answer ``number`` (0-based): the target was served ``context`` and wrote ``own``; the
    template adds ``after``.
    """

    number: int
    context: str
    own: str
    after: str = ""

    @property
    def upto(self) -> str:
        return self.context + self.own

    @property
    def text(self) -> str:
        return self.context + self.own + self.after


class Chat:
    """One row's messages under one template."""

    def __init__(self, template: Template, row: ChatRow) -> None:
        self.template, self.row = template, row
        self.forms = [template.form(m) for m in row.messages]
        self.at = [i for i, m in enumerate(row.messages) if m["role"] == "assistant"]
        self._prompts: dict[int, str] = {}

    def prompt(self, i: int) -> str:
        """Return what was served for message ``i``. Raises Dropped if the template refuses it."""
        if i not in self._prompts:
            self._prompts = {i: self._render(self.forms[:i], prompt=True)}
        return self._prompts[i]

    def prompt_with(self, i: int, contents: dict[int, str]) -> str:
        """Return the prompt of message ``i`` as if earlier messages had these contents."""
        messages = self.row.messages
        changed = {
            k: self.template.form(messages[k] | {"content": text})
            for k, text in contents.items()
            if k < i
        }
        return self._render(
            [changed.get(k, form) for k, form in enumerate(self.forms[:i])], prompt=True
        )

    def simple(self, number: int) -> bool:
        """Tell whether answer ``number`` is only text and is supervised completely."""
        i = self.at[number]
        message = self.row.messages[i]
        blank = not (message["content"] or "").strip()
        return (
            len(message) == 2
            and not blank
            and self._plain(message)
            and not self._cut(i)
            and i not in self.row.untaught
        )

    def turn(self, number: int) -> Turn:
        """Return answer ``number``. Raises Dropped if it gives no label."""
        i = self.at[number]
        message = self.row.messages[i]
        if self._plain(message) and i and i + 1 < len(self.forms):
            found = self._in_next(number, i, message)
            if found is not None:
                return found
        return self._apart(number, i, message)

    def _render(self, forms: list[Message], **more: Any) -> str:
        try:
            return self.template.render(forms, self.row.tools, **(dict(self.row.kwargs) | more))
        except Refused as why:
            raise Dropped(REFUSED, str(why)) from why

    def _cut(self, i: int) -> bool:
        return i in self.row.cut or (not self.row.finished and i == self.at[-1])

    def _plain(self, message: Message) -> bool:
        t = self.template
        simple = (
            bool(message["content"])
            and not message.get("tool_calls")
            and "reasoning_content" not in message
        )
        return (
            simple
            and not (t.between or t.rest)
            and bool(t.end)
            and not INLINE.match(message["content"])
        )

    def _in_next(self, number: int, i: int, message: Message) -> Turn | None:
        """Find the answer in the prompt of the next one, if the template puts nothing around an
        answer's text but its end; the result equals ``_apart``'s, without another rendering.
        """
        if self._cut(i) or number + 1 == len(self.at):
            return None
        served = self.prompt(i)
        following = self.prompt(self.at[number + 1])
        for text in (message["content"], message["content"].strip()):
            own = text + self.template.end
            if text and following.startswith(served + own):
                return Turn(number, served, own)
        return None

    def _apart(self, number: int, i: int, message: Message) -> Turn:
        """Find the answer as the difference between its prompt and the text through it."""
        failed: list[Dropped] = []
        for form in self._variants(i, message):
            try:
                context, wrote = self._split(i, form)
                context, wrote = self._whole(context, wrote, message, self._served(i))
            except Dropped as why:
                failed.append(why)
                continue
            stop = self._stop(wrote, message, self._cut(i))
            return Turn(number, context, wrote[:stop], wrote[stop:])
        # A missing field says more than the refusal of another form.
        raise next((why for why in failed if why.reason != REFUSED), failed[0])

    def _served(self, i: int) -> str | None:
        try:
            return self.prompt(i) if i else None
        except Dropped:
            return None

    def _variants(self, i: int, message: Message) -> list[Message]:
        """Return the forms to try: the message as given; with a thought in its text moved to its
        field; with the empty content of a call written the other way.
        """
        out = [self.forms[i]]
        begun = UNCLOSED.fullmatch(message["content"] or "") if self.template.thought else None
        if begun is not None and "reasoning_content" not in message:  # cut within its thought
            moved = message | {"content": "", "reasoning_content": begun[2].strip("\n")}
            return [self.template.form(moved)]
        thought = INLINE.match(message["content"] or "") if self.template.thought else None
        if thought is not None and "reasoning_content" not in message:
            rest = message["content"][thought.end() :].lstrip("\n")
            moved = message | {"content": rest, "reasoning_content": thought[2].strip("\n")}
            out.append(self.template.form(moved))
        if message.get("tool_calls") and not message["content"]:
            out += [f | {"content": None if f["content"] == "" else ""} for f in out]
        return out

    def _split(self, i: int, form: Message) -> tuple[str, str]:
        """Return the context and what the turn adds to it."""
        through = self._render([*self.forms[:i], form])
        if i == 0:
            return self._first(through)
        served = self.prompt(i)
        if through.startswith(served):
            # A header that the prompt leaves to the turn (none after a tool's result) is not part
            # of the answer.
            opening = (
                self.template.opening
                if through.startswith(self.template.opening, len(served))
                else ""
            )
            return served + opening, through[len(served + opening) :]
        if "enable_thinking" in self.template.text:
            for thinking in (False, True):
                other = self._render(self.forms[:i], prompt=True, enable_thinking=thinking)
                if through.startswith(other):
                    return other, through[len(other) :]
        rest = self.template.rest
        base = served.removesuffix(rest)
        if rest and served.endswith(rest) and through.startswith(base):
            wrote = through[len(base) :]
            return (base if opens_thought(rest) else served), wrote
        raise Dropped(REWRITES)

    def _first(self, through: str) -> tuple[str, str]:
        """Return the context of an answer that nothing was asked before: what precedes a word in
        its place, up to the end of the prompt's own ending.
        """
        word = "zyntova"
        header = self._render(
            [self.template.form({"role": "assistant", "content": word})]
        ).partition(word)[0]
        opening = self.template.opening
        asked = opening and opening in header and not self.template.rest
        at = header.rfind(opening) + len(opening) if asked else len(header)
        start = common(header[:at], through)
        if start < at and opening:  # this turn has another header (no text, only calls)
            found = through.find(opening.rstrip())
            start = found + len(opening.rstrip()) if found >= 0 else start
        return through[:start], through[start:]

    def _whole(
        self, context: str, wrote: str, message: Message, served: str | None
    ) -> tuple[str, str]:
        """Return ``context`` and ``wrote`` if they contain all of the message. Raises Dropped if
        they do not, or contain it twice.
        """
        content = message["content"] if isinstance(message["content"], str) else ""
        inline = INLINE.match(content)
        thought = str(message.get("reasoning_content") or (inline[2] if inline else "")).strip()
        text = (content[inline.end() :] if inline else content).strip()
        if text and text not in wrote:
            raise Dropped(NO_TEXT)
        for call in message.get("tool_calls") or []:
            if not _called(call, wrote):
                raise Dropped(NO_CALLS, f"call of {call['function']['name']!r}")
        names = [c["function"]["name"] for c in message.get("tool_calls") or []]
        behind = wrote.rpartition(text)[2] if text else wrote
        if any(wrote.count(n) < names.count(n) for n in names):
            raise Dropped(NO_CALLS, f"{len(names)} calls, of which the template leaves some out")
        if thought and thought not in wrote:
            return self._with_lost_thought(context, wrote, message, served, text, behind)
        if inline and "reasoning_content" not in message:
            before = wrote[: wrote.find(thought)] if thought else ""
            closer = f"</{inline[3]}>"
            if self.template.thought and closer in before:
                raise Dropped(NO_THOUGHT, "an empty thought before the real one")
        return context, wrote

    def _with_lost_thought(
        self, context: str, wrote: str, message: Message, served: str | None, text: str, behind: str
    ) -> tuple[str, str]:
        """Put an answer whose thought the template strips behind its prompt as the target wrote it:
        possible if the thought is in the text, or if the prompt opens it.
        """
        content = message["content"] if isinstance(message["content"], str) else ""
        visible = wrote[: len(wrote) - len(behind)] if text else ""
        if served is None or visible.strip() != text:
            raise Dropped(NO_THOUGHT)
        rest = self.template.rest if served.endswith(self.template.rest) else ""
        opener = re.fullmatch(r"<(\w+)>\s*", rest)
        if "reasoning_content" in message:
            if opener is None or not opens_thought(rest):
                raise Dropped(NO_THOUGHT)
            thought = message["reasoning_content"]
            thought += "" if thought.endswith("\n") else "\n"
            lead = "" if content.startswith("\n") else "\n\n"
            return served, f"{thought}</{opener[1]}>{lead}{content}{behind}"
        raw = content.strip()
        if rest and opens_thought(rest):
            raw = raw.removeprefix(rest) if raw.startswith(rest) else raw.removeprefix(rest.strip())
        return served, raw + behind

    def _stop(self, wrote: str, message: Message, cut: bool) -> int:
        """Return where the target's own text ends within ``wrote``."""
        t = self.template
        if not cut:
            if t.tail and wrote.endswith(t.tail):
                return len(wrote) - len(t.tail) + len(t.end)
            return len(wrote.rstrip())
        content = message["content"] if isinstance(message["content"], str) else ""
        for piece in (content.strip(), message.get("reasoning_content", "").strip()):
            if piece and (at := wrote.rfind(piece)) >= 0:
                return at + len(piece)
        return 0


def opens_thought(rest: str) -> bool:
    """Tell whether the end of a prompt opens a thought and leaves it open."""
    return bool(OPENS.search(rest)) and len(TAG.findall(rest)) % 2 == 1


def lost_fields(message: Message, text: str) -> Iterator[tuple[str, bool]]:
    """Return the fields of an assistant's message, beside those that make up a turn, whose text is
    not in ``text``, each with whether the target must have written it (its name is that of a
    thought, a call or the like, and it holds more than a word).
    """
    for name, value in message.items():
        if name in ("role", "content", "tool_calls", "reasoning_content") or not value:
            continue
        said = value if isinstance(value, str) else json.dumps(value, default=str)
        if said not in text:
            more = isinstance(value, list | dict) or len(said.split()) > 1
            yield name, more and bool(WRITTEN.fullmatch(name))


def _called(call: dict[str, Any], text: str) -> bool:
    """Tell whether the name and arguments of a call are in ``text``, in whatever form."""
    function = call["function"]
    return function["name"] in text and all(w in text for w in _words(function.get("arguments")))


def _words(value: Any) -> Iterator[str]:
    """Yield the longest plain word of every text and number within ``value``."""
    if isinstance(value, dict):
        for k, v in value.items():
            yield from _words(k)
            yield from _words(v)
    elif isinstance(value, list):
        for v in value:
            yield from _words(v)
    elif isinstance(value, str):
        found = re.findall(r"[A-Za-z0-9]+", value)
        if found:
            yield max(found, key=len)
