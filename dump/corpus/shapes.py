"""Bring rows of all known shapes into one of two forms: a chat of OpenAI-like messages, or tokens
with their loss mask. Known shapes: ``messages`` or ``conversations`` (any dialect of
``messages.py``, also as JSON text), ``prompt`` with ``completion``, a chat with its answer beside
it and logs (``logs.py``), and ``input_ids`` with ``loss_mask``. Null padding from data frames
counts as absent. Any other row is a DataError that names the row and the key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dspark.cache.errors import DataError
from dspark.dump.corpus.logs import ANSWERS, CHATS, thought_beside, unwrapped, was_cut
from dspark.dump.corpus.messages import (
    CUT_MARK,
    LOST_NULL,
    UNTAUGHT,
    Message,
    cut_by,
    from_text,
    read_messages,
    text_of,
    without_nulls,
)

CONVERSATION_IDS = (
    "primary_id",
    "conversation_id",
    "conv_id",
    "dialog_id",
    "session_id",
    "id",
    "uuid",
)
PROMPTS = ("prompt", "instruction", "question", "query")
MASKS = ("loss_mask", "assistant_masks", "completion_mask")
NULLS = "null in a call's arguments, taken as a data frame's padding"
EXPECTED = (
    "expected `messages` (a chat), `prompt` and `completion`, or `input_ids` and `loss_mask` "
    "(tokens); rename the column that holds it"
)


@dataclass(frozen=True, slots=True)
class ChatRow:
    """A conversation. ``finished`` False: its last answer was cut short, so its end must not be
    taught.

    ``cut``: indices of messages that were cut short too. ``untaught``: indices of messages that the
    row excludes from training. ``kwargs``: the row's own arguments to the template. ``notes``: what
    the messages leave out of the row.
    """

    messages: list[Message]
    tools: list[Any] | None
    finished: bool
    cut: frozenset[int] = frozenset()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    untaught: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Tokens with their loss mask, as given. ``conversation``: the id of their conversation; None
    if no key gives it.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    conversation: str | None = None


def parse_row(value: Any, where: str) -> ChatRow | TokenRow:
    """Check a row and convert it to our form. Raises DataError that names ``where`` and the key."""
    if not isinstance(value, Mapping):
        raise DataError(
            f"{where}: found a JSON {type(value).__name__}, expected an object with `messages` "
            "or `input_ids`."
        )
    if value.get("input_ids") is not None:
        return _token_row(value, where)
    row, notes = unwrapped(value, where)
    out = read_messages(_conversation(row, where), where)
    if not out:
        raise DataError(f"{where}: `messages` is empty.")
    out = _with_system(row, out, where)
    if any(m.pop(LOST_NULL, False) for m in out):
        notes = [*notes, NULLS]
    cut = frozenset(i for i, m in enumerate(out) if m.pop(CUT_MARK, False)) | _cut_by_list(
        value, out
    )
    untaught = frozenset(i for i, m in enumerate(out) if m.pop(UNTAUGHT, False))
    kwargs = from_text(row.get("chat_template_kwargs"), "chat_template_kwargs", where) or {}
    if not isinstance(kwargs, Mapping):
        raise DataError(
            f"{where}: `chat_template_kwargs` is a {type(kwargs).__name__}, expected an object."
        )
    finished = row.get("finished") is not False and not was_cut(value)
    return ChatRow(out, _tools(row, where), finished, cut, dict(kwargs), untaught, tuple(notes))


def _conversation(row: Mapping[str, Any], where: str) -> list[Any]:
    for name in CHATS:
        if row.get(name) not in (None, "", []):
            return row[name]  # type: ignore[no-any-return]  # a list, as logs.py has made it
    prompt = next((row[n] for n in PROMPTS if row.get(n) is not None), None)
    if isinstance(prompt, list):
        return prompt
    if prompt is not None:
        if isinstance(prompt, str) and isinstance(row.get("input"), str) and row["input"]:
            prompt = f"{prompt}\n\n{row['input']}"
        answer = next((row[n] for n in ANSWERS if row.get(n) is not None), None)
        said = [] if answer is None else _said(answer, "assistant")
        if said and (thought := thought_beside(row)) and "reasoning_content" not in said[0]:
            said = [{**said[0], "reasoning_content": thought}]
        return _history(row, where) + _said(prompt, "user") + said
    if any(n in row for n in CHATS):
        raise DataError(f"{where}: `{next(n for n in CHATS if n in row)}` is empty.")
    raise DataError(f"{where}: found keys {sorted(map(str, row))}, {EXPECTED}.")


def _history(row: Mapping[str, Any], where: str) -> list[Any]:
    """Read the history before a prompt: pairs of question and answer, as in Alpaca's dialects."""
    out: list[Any] = []
    for pair in row.get("history") or []:
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(t, str) for t in pair)
        ):
            raise DataError(
                f"{where}: `history` holds {str(pair)[:80]!r}, expected pairs of question and "
                "answer."
            )
        out += [*_said(pair[0], "user"), *_said(pair[1], "assistant")]
    return out


def _said(value: Any, role: str) -> list[Any]:
    if isinstance(value, list):
        return value
    return [value if isinstance(value, Mapping) else {"role": role, "content": value}]


def _with_system(row: Mapping[str, Any], messages: list[Message], where: str) -> list[Message]:
    """Put a system prompt given beside the chat in front of it, unless the chat has one."""
    for name in ("system", "system_prompt", "system_instruction"):
        given = row.get(name)
        if given is None or given in ("", []):
            continue
        text = text_of(given)
        if text is None:
            raise DataError(f"{where}: `{name}` is a {type(given).__name__}, expected text.")
        if messages[0]["role"] != "system":
            return [{"role": "system", "content": text}, *messages]
    return messages


def _cut_by_list(row: Mapping[str, Any], messages: list[Message]) -> frozenset[int]:
    """Return the answers that were cut, according to a list of finish reasons, one per answer."""
    reasons = row.get("finish_reasons", row.get("finish_reason"))
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not isinstance(reasons, list) or not answers:
        return frozenset()
    reasons = (
        reasons if len(reasons) == len(answers) else [None] * (len(answers) - 1) + reasons[-1:]
    )
    return frozenset(i for i, reason in zip(answers, reasons, strict=False) if cut_by(reason))


def _tools(row: Mapping[str, Any], where: str) -> list[Any] | None:
    """Return the tools in OpenAI's form, without a data frame's null padding."""
    name = "tools" if row.get("tools") else "functions"
    tools = from_text(row.get(name), name, where) or None
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise DataError(
            f"{where}: `{name}` is a {type(tools).__name__}, expected a list, or JSON text of one."
        )
    read = [from_text(t, name, where) if isinstance(t, str) else t for t in tools]
    out = []
    for tool in [without_nulls(t) for t in read if isinstance(t, Mapping)]:
        if "input_schema" in tool:  # Anthropic's name for it
            tool["parameters"] = tool.pop("input_schema")
        if "name" in tool and "function" not in tool:
            tool.pop("type", None)
            out.append({"type": "function", "function": tool})
        else:
            out.append(tool)
    return out or None


def _token_row(value: Mapping[str, Any], where: str) -> TokenRow:
    ids = _list(value["input_ids"], "input_ids", where)
    named = next((n for n in MASKS if value.get(n) is not None), None)
    if named is None and value.get("labels") is not None:
        mask = [int(label != -100) for label in _list(value["labels"], "labels", where)]
    elif named is None:
        raise DataError(f"{where}: `input_ids` without `loss_mask`; give one 0 or 1 per token.")
    else:
        mask = _list(value[named], named, where)
    if len(ids) != len(mask):
        raise DataError(
            f"{where}: {len(ids)} input_ids but {len(mask)} values of loss_mask; expected the "
            "same number."
        )
    if not ids:
        raise DataError(f"{where}: `input_ids` is empty.")
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise DataError(f"{where}: `input_ids` holds something that is not an integer.")
    if not all(isinstance(m, bool | int | float) and m in (0, 1) for m in mask):
        raise DataError(f"{where}: `loss_mask` holds something other than 0, 1, true, false.")
    called = [str(value[n]) for n in CONVERSATION_IDS if value.get(n) is not None]
    return TokenRow(ids, [bool(m) for m in mask], called[0] if called else None)


def _list(value: Any, name: str, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{where}: `{name}` is of type {type(value).__name__}, expected a list.")
    return value
