"""The target's own answers: what is asked, how answers are sampled, and what an engine returns.
Pure data; no engine here.

Legend: P tokens of a prompt, A of its answer, S = P + A, L aux layers, H hidden size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from dspark.cache.errors import UsageError

if TYPE_CHECKING:
    from dspark.cache.codec.base import ArraySpec
    from dspark.dump.engines.engine import CodedStates

GREEDY = 1e-5  # temperatures below this mean greedy decoding
DEFAULT_MAX_TOKENS = 2048
MOST_ANSWERS = 256
MASK_RULE = "regenerate"  # how the manifest's mask_rule begins in a store whose target answered


# One rule per setting, both for the flag (before the target is read) and for
# generation_config.json.
def check_temperature(value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise UsageError(f"--temperature: found {value}, expected a finite number, 0 or more.")


def check_top_p(value: float) -> None:
    if not 0 < value <= 1:
        raise UsageError(f"--top-p: found {value}, expected above 0 and at most 1.")


def check_max_tokens(value: int) -> None:
    if value < 2:
        raise UsageError(
            f"--max-tokens: found {value}, expected at least 2: a draft learns nothing "
            "from a shorter answer."
        )


def check_answers(value: int) -> None:
    if not 1 <= value <= MOST_ANSWERS:
        raise UsageError(f"--answers: found {value}, expected 1 to {MOST_ANSWERS} per prompt.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the target answers. ``answers``: conversations per row. ``top_k`` 0: no limit.
    ``thinking``: passed to the chat template as ``enable_thinking``; None omits it.
    """

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    thinking: bool | None
    answers: int = 1

    def __post_init__(self) -> None:
        check_answers(self.answers)
        check_temperature(self.temperature)
        check_top_p(self.top_p)
        check_max_tokens(self.max_tokens)
        if self.top_k < 0:
            raise UsageError(
                f"top_k: found {self.top_k} in the target's generation_config.json, expected 0 "
                "(no limit) or more."
            )

        if self.answers > 1 and self.greedy:
            raise UsageError(
                f"--answers {self.answers}: at temperature {self.temperature:g} all of them "
                "would be the same. Give a --temperature."
            )

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY

    def __str__(self) -> str:
        """Format it as in the manifest: two runs that differ here do not write one store."""
        several = "" if self.answers == 1 else f", {self.answers} answers"
        think = "" if self.thinking is None else f", thinking {'on' if self.thinking else 'off'}"
        return (
            f"temperature {self.temperature:g}, top_p {self.top_p:g}, top_k {self.top_k}, "
            f"max_tokens {self.max_tokens}{think}{several}"
        )


def recommended(
    model: str,
    temperature: float | None,
    top_p: float | None,
    max_tokens: int | None,
    thinking: bool | None,
    answers: int = 1,
) -> Sampling:
    """Return what the target's generation_config.json recommends (plain sampling if it says
    nothing), overridden by the flags.
    """
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(model).to_dict()
    except OSError:
        found = {}
    own = {"top_p": 1.0, "top_k": 0} | {k: v for k, v in found.items() if v is not None}
    if "temperature" not in own:
        own["temperature"] = 0.0 if own.get("do_sample") is False else 1.0
    return Sampling(
        temperature=own["temperature"] if temperature is None else temperature,
        top_p=own["top_p"] if top_p is None else top_p,
        top_k=0 if own["top_k"] == -1 else own["top_k"],  # -1: how vLLM writes "no limit"
        max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
        thinking=thinking,
        answers=answers,
    )


@dataclass(frozen=True, slots=True)
class Ask:
    """One turn. ``key`` comes back with its answer. ``keep``: return the states too; ``spans``:
    earlier answers ``[start, stop)`` inside ``prompt``; ``row``: the one that errors name, which is
    not ``key`` where a row is answered several times (None: it is).
    """

    key: int
    prompt: list[int]
    max_tokens: int
    seed: int
    keep: bool
    spans: tuple[tuple[int, int], ...] = ()
    row: int | None = None

    @property
    def named_row(self) -> int:
        return self.key if self.row is None else self.row


class Answered(NamedTuple):
    """``ids``: the answer's tokens [A], including its end, if it reached one. ``states``: of prompt
    and answer, coded, aux [S, ...], if asked for. The last token is never fed to the target, so it
    has no state: its row repeats the one before. No anchor follows it, so nothing attends to it.
    """

    ask: Ask
    ids: list[int]
    finished: bool
    states: CodedStates | None


def stored_runs(ask: Ask) -> list[list[int | None]]:
    """Return the positions ``[start, stop)`` whose last state is stored: of an earlier answer, all
    but its last token; of the new answer, all that have a state (None = to the end).
    """
    before: list[list[int | None]] = [[a, b - 1] for a, b in ask.spans if b - a > 1]
    return [*before, [len(ask.prompt), None]]


def seed_of(row: int, turn: int, answer: int = 0) -> int:
    """Return the seed of a row's ``answer``-th conversation and turn, the same in every run."""
    named = f"{row}:{turn}" + (f":{answer}" if answer else "")
    return int.from_bytes(hashlib.sha256(named.encode()).digest()[:4], "little")


def repeat_last(coded: dict[str, Any], specs: Mapping[str, ArraySpec]) -> dict[str, Any]:
    """Extend the coded states of an answer's S - 1 tokens to S tokens by repeating the last one."""
    import numpy as np

    return {
        name: np.concatenate([a, a[-1:]]) if name in specs and specs[name].axis == "token" else a
        for name, a in coded.items()
    }
