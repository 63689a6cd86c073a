"""A target's chat template: what it renders, and how it renders an answer, found by rendering words
that occur nowhere else. Nothing here depends on a family's name. It finds out whether contents are
text or lists of parts, which field's thought reaches the text, whether a call needs its arguments
as an object or as JSON text and its missing content as null, what a prompt ends with, and how an
answer ends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2.exceptions import TemplateError

from dspark.cache.errors import UsageError
from dspark.dump.corpus.messages import THOUGHTS, Message

ASKED, SAID, THOUGHT, CALLED, GIVEN = "quexaro", "zyntova", "mulbrek", "fethuro", "wadjino"
FAULTS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
MOCK_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": CALLED,
            "description": "d",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]


class Refused(Exception):
    """The template cannot render these messages; holds its own error text."""


class Template:
    """``kwargs``: passed to the template with every chat. ``day``: the ISO date that the template
    sees as today; None = the real one.
    """

    def __init__(
        self, tokenizer: Any, kwargs: Mapping[str, Any] | None = None, day: str | None = None
    ) -> None:
        self.text = chat_template(tokenizer)
        self.tokenizer, self.kwargs, self.day = tokenizer, dict(kwargs or {}), day
        self.specials = sorted(
            (t.content for t in tokenizer.added_tokens_decoder.values() if t.content.strip()),
            key=len,
        )[::-1]
        self._special = (
            re.compile("|".join(map(re.escape, self.specials))) if self.specials else None
        )
        self.parts = False  # contents are lists of parts
        self.thought: str | None = None  # the field whose thought reaches the text
        self.empty_call: str | None = None  # the content of a call without text
        self.call_text = False  # a call's arguments are JSON text
        self.developer = True
        self.opening = ""  # what a prompt ends with, as far as an answer begins with it
        self.rest = ""  # what a prompt ends with beyond that
        self.between = ""  # what an answer without a thought has in front of its text
        self.tail = ""  # what follows an answer's text
        self.end = ""  # the part of it that the target writes
        self._learn()

    @property
    def dated(self) -> bool:
        return "strftime_now" in self.text

    def render(
        self, forms: Sequence[Message], tools: Any = None, *, prompt: bool = False, **more: Any
    ) -> str:
        """Render ``forms`` (from ``form``). Raises Refused if the template does."""
        extra = self.kwargs | more
        if self.day is not None and self.dated:
            extra["strftime_now"] = Today(self.day)
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(forms), tools=tools, tokenize=False, add_generation_prompt=prompt, **extra
                )
            )
        except FAULTS as error:
            raise Refused(str(error) or type(error).__name__) from error

    def form(self, message: Message) -> Message:
        """Convert a message to the form that this template reads."""
        out = dict(message)
        if out["role"] == "developer" and not self.developer:
            out["role"] = "system"
        thought = out.pop("reasoning_content", None)
        if thought is not None:
            out[self.thought or "reasoning_content"] = thought
        calls = out.get("tool_calls")
        if calls:
            if not out["content"]:
                out["content"] = self.empty_call if out["content"] is None else out["content"]
            if self.call_text:
                out["tool_calls"] = [_with_text(c) for c in calls]
        if self.parts and isinstance(out["content"], str):
            out["content"] = [{"type": "text", "text": out["content"]}]
        return out

    def try_render(self, forms: Sequence[Message], tools: Any = None, **more: Any) -> str:
        """As ``render``; empty if the template refuses."""
        try:
            return self.render(forms, tools, **more)
        except Refused:
            return ""

    def split_specials(self, text: str) -> list[str]:
        """Split ``text`` at special tokens."""
        return self._special.split(text) if self._special else [text]

    def whole_specials(self, text: str, at: int) -> int:
        """Return ``at``, or the start of the special token in ``text`` that it would cut."""
        for found in self._special.finditer(text) if self._special else ():
            if found.start() < at < found.end():
                return found.start()
        return at

    def keeps_history(self) -> bool:
        """Tell whether a later prompt begins with an answer exactly as it was served and written,
        including its thought.
        """
        ask, say = (
            self.form({"role": "user", "content": ASKED}),
            {"role": "assistant", "content": SAID},
        )
        said = self.form(say | ({"reasoning_content": THOUGHT} if self.thought else {}))
        text, prompt = self.try_render([ask, said]), self.try_render([ask], prompt=True)
        later = self.try_render([ask, said, ask], prompt=True)
        own = text[: text.rfind(SAID) + len(SAID)] + self.end
        return text.startswith(prompt) and later.startswith(own)

    def _learn(self) -> None:
        ask, say = {"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}
        for parts in (False, True):
            self.parts = parts
            text = self.try_render([self.form(ask), self.form(say)])
            if ASKED in text and SAID in text:
                break
        else:
            self.parts = False
            return
        ask, say = self.form(ask), self.form(say)
        at = text.index(SAID)
        asked, prompt = self.try_render([ask]), self.try_render([ask], prompt=True)
        shared = common(prompt, text[:at])
        self.opening, self.rest = (
            prompt[min(common(asked, prompt), shared) : shared],
            prompt[shared:],
        )
        self.between = text[shared:at]
        self.tail = text[at + len(SAID) :]
        self.end = self._own_end(self.tail)
        self.thought = self._learn_thought(ask, say)
        self._learn_calls(ask)
        told = self.try_render(
            [{**ask, "role": "developer"}, {**ask, "content": self._as(GIVEN)}, say]
        )
        self.developer = ASKED in told

    def _as(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self.parts else text

    def _own_end(self, tail: str) -> str:
        """Return how much of ``tail`` the target writes: up to the end of the first run of special
        tokens, or everything but white space if there are none.
        """
        first = self._special.search(tail) if self._special else None
        if first is None or self._special is None:
            return tail.rstrip()
        stop = first.end()
        while (more := self._special.match(tail, stop)) is not None:
            stop = more.end()
        return tail[:stop]

    def _learn_thought(self, ask: Message, say: Message) -> str | None:
        for name in THOUGHTS:
            if THOUGHT in self.try_render([ask, {**say, name: THOUGHT}]):
                return name
        call = _mock_call({})
        for name in THOUGHTS:  # some render only the thoughts of calls
            for content in (None, ""):
                message = {
                    "role": "assistant",
                    "content": content,
                    name: THOUGHT,
                    "tool_calls": [call],
                }
                if THOUGHT in self.try_render([ask, message], MOCK_TOOLS):
                    return name
        return None

    def _learn_calls(self, ask: Message) -> None:
        """Choose the form of calls: arguments as an object and content as null if the template
        renders those, since they are as given; else the first form that it renders.
        """
        for content in (None, ""):
            for as_text in (False, True):
                call = _mock_call({GIVEN: 1})
                message = {
                    "role": "assistant",
                    "content": content,
                    "tool_calls": [_with_text(call) if as_text else call],
                }
                text = self.try_render([ask, message], MOCK_TOOLS)
                said = text.rpartition(ASKED)[2]
                if CALLED in said and GIVEN in said and "None" not in said and "null" not in said:
                    self.empty_call, self.call_text = content, as_text
                    return
        self.empty_call = ""


class Today:
    """The template's clock, stopped at an ISO date."""

    def __init__(self, day: str) -> None:
        self.day = day

    def __call__(self, form: str) -> str:
        return datetime.fromisoformat(self.day).strftime(form)


def today() -> str:
    """Return the date that a new store fixes for its template."""
    return datetime.now().date().isoformat()


def common(a: str, b: str) -> int:
    """Count the characters that ``a`` and ``b`` share at their start."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a.startswith(b[:middle]) else (low, middle - 1)
    return low


def chat_template(tokenizer: Any) -> str:
    """Return the template's text, or raise a clear error."""
    if tokenizer is None:
        raise UsageError(
            "the target has no tokenizer, so chat rows cannot be tokenised. Give rows with "
            "`input_ids` and `loss_mask`."
        )
    if not tokenizer.is_fast:
        raise UsageError(
            "the target's tokenizer gives no character offsets (it is not a fast one). Give rows "
            "with `input_ids` and `loss_mask`."
        )
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise UsageError(
            "the target's tokenizer has no chat template, so chat rows cannot be rendered. Use "
            "an instruction-tuned target, put a chat_template.jinja "
            "into its folder, or give rows with `input_ids` and `loss_mask`."
        )
    return str(template)


def _mock_call(arguments: Any) -> dict[str, Any]:
    return {
        "type": "function",
        "id": "call00001",
        "function": {"name": CALLED, "arguments": arguments},
    }


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    if isinstance(function.get("arguments"), str):
        return call
    arguments = json.dumps(function.get("arguments", {}), ensure_ascii=False)
    return call | {"function": function | {"arguments": arguments}}
