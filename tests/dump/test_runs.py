"""Fast ways of rendering and finding tokens, each held against the slow one; and what they cost in
a long chat.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from template_cells import tokenizer

from dspark.dump.corpus import masks
from dspark.dump.corpus.coded import encode
from dspark.dump.corpus.masks import SampleMaker
from dspark.dump.corpus.rows import row_of
from dspark.dump.corpus.template import Template
from dump_targets import CHATML, build_tokenizer

WORDS = ["the", "cat", "é", "…", "\n", " ", "<b>", "東京", "12", "🙂", "  x", "mat.", "Paris"]


def words(rng: random.Random, most: int = 9) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))


def chat(rng: random.Random, turns: int, odd: int | None = None) -> dict[str, Any]:
    """A chat of random words, with or without a system prompt; answer ``odd`` begins with a
    thought.
    """
    out = [{"role": "system", "content": words(rng)}] if rng.random() < 0.3 else []
    for n in range(turns):
        said = f"<think>{words(rng)}</think>" if n == odd else ""
        out += [
            {"role": "user", "content": words(rng)},
            {"role": "assistant", "content": said + words(rng)},
        ]
    return {"messages": out + ([{"role": "user", "content": "x"}] if rng.random() < 0.2 else [])}


def made(tok: Any, row: dict[str, Any], seq_length: int) -> list[tuple[Any, ...]]:
    maker = SampleMaker(
        tok,
        tokenised=False,
        vocab_size=10**6,
        seq_length=seq_length,
        min_supervised=1,
        day="2026-01-01",
    )
    found = maker.make(row_of(0, "f:1", row))
    return [(s.turn, s.key, s.input_ids.tolist(), s.loss_mask.tolist()) for s in found.samples]


@pytest.mark.parametrize(
    "name", ["chatml", "qwen2_5", "llama3_1", "gemma", "phi3", "mistral", "qwen3", "gptoss"]
)
def test_one_rendering_gives_what_one_per_answer_gives(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tok = build_tokenizer(CHATML) if name == "chatml" else tokenizer(name)
    rng, used = random.Random(name), []
    leading = masks.leading
    for trial in range(6):
        turns = rng.randint(9, 24)
        row = chat(rng, turns, odd=12 if trial % 3 == 2 else None)
        seq_length = rng.choice([120, 400, 10_000])
        monkeypatch.setattr(masks, "leading", lambda *a: (used.append(leading(*a)), used[-1])[1])
        fast = made(tok, row, seq_length)
        monkeypatch.setattr(masks, "leading", lambda *a: None)
        assert fast == made(tok, row, seq_length)
    # Templates that write something around an answer's text are left to the other way.
    assert any(used) == (name in ("chatml", "qwen2_5", "llama3_1", "gemma", "phi3"))


def spaced(trim: bool) -> Any:
    tok = build_tokenizer(CHATML)
    from tokenizers import processors

    tok.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    return tok


@pytest.mark.parametrize("trim", [False, True])
def test_where_a_character_is_among_the_tokens(trim: bool) -> None:
    tok, rng = spaced(trim), random.Random(0)
    for _ in range(12):
        text = words(rng, 30)
        coded = encode(tok, text, rng.choice([7, 10_000]))
        plain = tok(text, add_special_tokens=False, return_offsets_mapping=True)
        count = len(coded.ids)
        assert coded.ids.tolist() == plain["input_ids"][:count]
        assert coded.offsets.tolist() == [list(o) for o in plain["offset_mapping"][:count]]
        places = list(range(len(text) + 1))
        slow = coded._edges(places)
        assert [coded.edges([at])[0] for at in places] == slow
        for start, stop in [sorted(rng.sample(places, 2)) for _ in range(20)]:
            a, b = slow[start], slow[stop]
            if a is not None and b is not None:
                found = np.flatnonzero(masks.inside(coded.offsets, start, stop))
                assert found.tolist() == list(range(a, b))


def test_a_long_chat_is_rendered_a_fixed_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear in its turns, and no further than seq_length."""
    rendered: list[int] = []
    render = Template.render
    monkeypatch.setattr(
        Template,
        "render",
        lambda self, forms, *a, **k: rendered.append(len(forms)) or render(self, forms, *a, **k),
    )
    tok = build_tokenizer(CHATML)

    def cost(turns: int, seq_length: int) -> tuple[int, int]:
        row = {
            "messages": [
                {"role": r, "content": f"say {n}"}
                for n in range(turns)
                for r in ("user", "assistant")
            ]
        }
        maker = SampleMaker(
            tok, tokenised=False, vocab_size=400, seq_length=seq_length, min_supervised=1
        )
        rendered.clear()
        (sample,) = maker.make(row_of(0, "f:1", row)).samples
        return sum(rendered), len(sample.input_ids)

    few, many = cost(400, 10**6), cost(1600, 10**6)
    assert many[0] < 4.2 * few[0]
    assert many[0] < 8 * 3200
    beyond, cut = cost(20_000, 500)
    assert cut == 500
    assert beyond < 1000
