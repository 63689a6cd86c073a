"""Read logs of gateways and of OpenAI's batches as chats: the request, with the response as its
last message.

``request`` and ``response`` (also as ``*_body`` or JSON text), ``body``, a chat with its answer
beside it (``response``, ``completion``, ``choices`` ...), and OpenAI's responses (``input``,
``instructions``, ``output``). If there are several answers, the first is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from dspark.cache.errors import DataError
from dspark.dump.corpus.messages import REASONS, THOUGHTS, cut_by, from_text, speaker_of, text_of

Logged = Mapping[str, Any]
CHATS = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat", "contents")
ANSWERS = ("response", "completion", "answer", "output", "choices")
FURTHER = "further answers in a log, ignored"
BESIDE = "an answer beside a chat that already ends with one, ignored"
STREAM = "; join a stream of chunks into one message first"
NOT_SEARCHED = (
    *CHATS,
    "content",
    "tools",
    "input",
    "prompt",
    "text",
    "value",
    "request",
    "arguments",
)


def unwrapped(value: Logged, where: str) -> tuple[Logged, list[str]]:
    """Return a row with the complete chat, and what was left out of the original."""
    row = _with_request(value, where)
    if "custom_id" in row and not any(row.get(n) for n in (*CHATS, "prompt", "input")):
        raise DataError(
            f"{where}: a batch's answer without its request. Join output and input file by "
            "`custom_id`: a row with `body` and `response`."
        )
    name = next((n for n in CHATS if row.get(n) not in (None, "", [])), None)
    if name is None and row.get("prompt") is None and row.get("instruction") is None:
        row, name = _responses(row, where)
    if name is None and isinstance(row.get("prompt"), list):
        name = "prompt"
    if name is None:
        return row, []
    chat = _list(from_text(row[name], name, where), name, where)
    answer = next((n for n in ANSWERS if row.get(n) not in (None, "", [])), None)
    if answer is None:
        return {**row, name: chat}, []
    rest = {k: v for k, v in row.items() if k not in ANSWERS}
    if chat and _answered(chat[-1]):
        same = row[answer] == chat[-1].get("content", chat[-1].get("value"))
        return {**rest, name: chat}, [] if same else [BESIDE]
    said, further = _answer(row[answer], answer, where)
    thought = thought_beside(row)
    if thought and len(said) == 1 and not any(said[0].get(n) for n in THOUGHTS):
        said = [{**said[0], "reasoning_content": thought}]
    return {**rest, name: [*chat, *said]}, [FURTHER] * further


def thought_beside(row: Logged) -> str | None:
    """Return the thought given beside an answer. A single word (as ``"reasoning": "on"``) is a
    setting.
    """
    found = [row[n] for n in THOUGHTS if isinstance(row.get(n), str) and len(row[n].split()) > 1]
    return found[0] if found else None


def was_cut(value: Any, depth: int = 4) -> bool:
    """Tell whether a finish reason anywhere in the row's objects says that something other than the
    target ended the answer (messages have their own).
    """
    if (
        isinstance(value, str)
        and value[:1] == "{"
        and any(r in value for r in (*REASONS, "incomplete"))
    ):
        try:
            value = json.loads(value)
        except ValueError:
            return False
    if isinstance(value, list) and depth:
        return any(was_cut(v, depth - 1) for v in value[:1])
    if not isinstance(value, Mapping):
        return False
    if any(cut_by(value.get(r)) for r in REASONS) or value.get("truncated") is True:
        return True
    if value.get("incomplete_details") and isinstance(value["incomplete_details"], Mapping):
        return True
    return depth > 0 and any(
        was_cut(v, depth - 1) for k, v in value.items() if k not in NOT_SEARCHED
    )


def _with_request(value: Logged, where: str) -> Logged:
    """Return the row with the contents of its request, and its response."""
    name = next((n for n in ("request", "request_body", "body") if value.get(n) is not None), None)
    if name is None and isinstance(value.get("input"), Mapping) and "messages" in value["input"]:
        name = "input"
    if name is None:
        return value
    request = value[name]
    request = from_text(request, name, where) if isinstance(request, str) else request
    if not isinstance(request, Mapping):
        return value
    if isinstance(request.get("body"), Mapping):
        request = request["body"]
    if not any(request.get(n) is not None for n in (*CHATS, "input")):
        hint = (
            "; the prompt of /v1/completions is already rendered text: give tokens"
            if "prompt" in request
            else ""
        )
        raise DataError(
            f"{where}: a request without `messages` (its keys: "
            f"{sorted(map(str, request))[:12]}); expected a chat{hint}."
        )
    row = {k: v for k, v in value.items() if k not in (name, "response_body")}
    if value.get("response") is None and value.get("response_body") is not None:
        row["response"] = value["response_body"]
    return {**row, **request}


def _responses(row: Logged, where: str) -> tuple[Logged, str | None]:
    """A row of OpenAI's responses (``input`` items or text, ``instructions``, ``output``) as one
    with ``messages``.
    """
    asked = row.get("input")
    if not isinstance(asked, str | list) or not asked:
        return row, None
    if isinstance(asked, str):
        asked = [{"role": "user", "content": asked}]
    rest = {k: v for k, v in row.items() if k not in ("input", "instructions")}
    told = row.get("instructions")
    if isinstance(told, str) and told:
        rest["system"] = told
    return {**rest, "messages": _runs(asked, where)}, "messages"


def _runs(items: list[Any], where: str) -> list[Any]:
    """Join the items of each answer (its thought, its text, its calls) in a conversation."""
    out: list[Any] = []
    for own, run in groupby(items, _of_an_answer):
        given = list(run)
        parts = own and any(i.get("type") in ("reasoning", "function_call") for i in given)
        out += _items(given, f"{where}: `input`") if parts else given
    return out


def _of_an_answer(item: Any) -> bool:
    return isinstance(item, Mapping) and (
        item.get("type") in ("reasoning", "function_call") or _answered(item)
    )


def _answered(message: Any) -> bool:
    speaker = message.get("role", message.get("from")) if isinstance(message, Mapping) else None
    return isinstance(speaker, str) and speaker_of(speaker) == "assistant"


def _answer(response: Any, name: str, where: str) -> tuple[list[Any], int]:
    """Return an answer's messages with its finish reason, and the number of further answers."""
    if isinstance(response, str):
        read = None
        if response.lstrip()[:1] == "{":
            try:
                read = json.loads(response)
            except ValueError:
                read = None
        if name != "response" or not isinstance(read, Mapping) or not _logged(read):
            return [{"role": "assistant", "content": response}], 0
        response = read
    if name == "choices":
        response = {"choices": response}
    if isinstance(response, list):
        return _items(response, f"{where}: `{name}`"), 0
    if isinstance(response, Mapping) and isinstance(response.get("body"), Mapping | str):
        response = from_text(response["body"], "body", where)
    if not isinstance(response, Mapping):
        raise DataError(
            f"{where}: `{name}` is a {type(response).__name__}, expected an object or text."
        )
    if response.get("error") and not response.get("choices"):
        raise DataError(
            f"{where}: `{name}` is an error ({str(response['error'])[:80]}): there is no answer."
        )
    return _message_in(response, name, where)


def _logged(read: Logged) -> bool:
    """Tell whether the JSON text of a response is a server's response, rather than an answer that
    is JSON.
    """
    whole = isinstance(read.get("choices") or read.get("output"), list) or isinstance(
        read.get("content"), list
    )
    inner = isinstance(read.get("message") or read.get("body"), Mapping)
    return (
        whole
        or inner
        or (read.get("role") == "assistant" and "content" in read)
        or bool(read.get("error"))
    )


def _message_in(response: Logged, name: str, where: str) -> tuple[list[Any], int]:
    choices = response.get("choices")
    outer, further = response, 0
    if isinstance(choices, list) and choices and isinstance(choices[0], Mapping):
        outer, further = choices[0], len(choices) - 1
        message = outer.get("message")
        if message is None and isinstance(outer.get("text"), str):
            message = {"content": outer["text"]}
    elif isinstance(response.get("output"), list):
        return _items(response["output"], f"{where}: `{name}`.output"), 0
    else:
        said = any(n in response for n in ("content", "tool_calls"))
        message = response.get("message") or (response if said else None)
    if not isinstance(message, Mapping):
        streamed = STREAM if _streamed(response) else ""
        raise DataError(
            f"{where}: `{name}` has keys {sorted(map(str, response))[:12]}, expected `choices` "
            f"with a `message`{streamed}."
        )
    reasons = {r: outer[r] for r in REASONS if outer.get(r) is not None}
    return [
        {"role": "assistant", **{k: v for k, v in message.items() if v is not None}, **reasons}
    ], further


def _streamed(response: Logged) -> bool:
    return "chunks" in response or "delta" in str(response.get("choices"))[:200]


def _items(items: list[Any], here: str) -> list[Any]:
    """Return the items of one answer: a message unchanged, or the output items of OpenAI's
    responses joined into one message.
    """
    if len(items) == 1 and isinstance(items[0], Mapping) and {"role", "content"} <= set(items[0]):
        return items
    out: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": []}
    for item in items:
        kind = item.get("type") if isinstance(item, Mapping) else None
        if (
            kind in (None, "message")
            and _answered(item)
            and not out["tool_calls"]
            and (text := text_of(item.get("content"))) is not None
        ):
            out["content"] += text
        elif kind == "reasoning":
            thought = text_of(item.get("content") or item.get("summary") or "") or ""
            out["reasoning_content"] = out.get("reasoning_content", "") + thought
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments", {})}
            out["tool_calls"].append({"id": item.get("call_id"), "function": function})
        else:
            streamed = STREAM if "delta" in str(item)[:200] else ""
            raise DataError(
                f"{here} has an item {str(item)[:80]!r}; expected reasoning, message and "
                f"function_call, in this order{streamed}."
            )
    return [{k: v for k, v in out.items() if v != []}]


def _list(value: Any, name: str, where: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataError(f"{where}: `{name}` is of type {type(value).__name__}, expected a list.")
    return value
