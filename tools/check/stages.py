"""The stages of check: the files, then the target's own answers, then the real server.

Each stage needs more than the one before it: config.json and tensors (``rules``), the target's
weights (``symptoms``), an installed vLLM (``parity``). A stage that did not run is named, so that
silence never counts as a pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark.cache.target.shape import rope_base
from dspark.dump.engines.registry import ENGINES
from dspark.tools.check.servers import (
    can_serve,
    served_states,
    servers_for,
    who_serves,
)

QUESTIONS = (
    "Write a Python function that returns the n-th Fibonacci number.",
    "Explain in a few sentences why the sky is blue.",
    "What is 17 times 23? Show the steps.",
    "Write a short story about a lighthouse keeper.",
    "Give me three tips for learning a new language.",
    "Translate into French: The weather is beautiful today.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckConfig:
    """``serve`` None = if vLLM is installed. ``data`` None = a few built-in questions (random ids
    for a target without a tokenizer).
    """

    draft: str
    model: str
    num_speculative_tokens: int | None = None
    data: str | None = None
    limit: int = 6
    max_tokens: int = 64
    decode: bool = True
    serve: bool | None = None
    device: str = "auto"
    dtype: str = "auto"


def check(config: CheckConfig, note: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Return the report that ``--json`` prints; ``ok`` if there is neither an error nor a
    suspicion.
    """
    from dspark.cache.errors import DraftError
    from dspark.dump.target.config import load_target
    from dspark.tools.check import files as files_only
    from dspark.tools.check.files import Finding
    from dspark.tools.check.rules import judge

    files = files_only.Files.read(config.draft)
    target = load_target(config.model)
    findings = judge(files, target.config, config.num_speculative_tokens)
    findings += mask_token(files, target)
    findings.append(Finding("note", "servers", who_serves(target)))
    told = served_states(target.whole.architectures or () if target.whole else ())
    if told:
        findings.append(Finding("note", "served-states", told))
    behaviour: dict[str, Any] = {}
    served: dict[str, Any] | None = None
    if config.decode:
        from dspark.tools.decode.target import load_model

        note("loading the target")
        model = load_model(config.model, config.device, config.dtype)
        try:
            behaviour, served = _decode(config, files, target, model, findings, note)
        except DraftError as wrong:
            if not any(f.level == "error" for f in findings):
                findings.append(Finding("error", "config", str(wrong)))
            findings.append(
                Finding(
                    "note",
                    "behaviour",
                    "not judged: the draft cannot be loaded as its config describes it",
                )
            )
    else:
        findings.append(Finding("note", "behaviour", "not judged (--no-decode)"))
    if served is None:
        findings.append(
            Finding(
                "note",
                "served",
                f"blocks were NOT compared with a real server: {_why_not_served(config)}",
            )
        )
    gain = gained(config, behaviour)
    if gain is not None:
        findings.append(Finding("note", "gain", gain["text"]))
    form = "speculators" if files.speculators else "flat"
    servers = servers_for(files.described(), form, findings)
    return {
        "ok": all(f.level == "note" for f in findings),
        "draft": config.draft,
        "target": config.model,
        "format": form,
        "findings": files_only.to_json(findings),
        "behaviour": behaviour,
        "gain": gain,
        "served": served,
        "vllm": servers,
    }


def gained(config: CheckConfig, behaviour: dict[str, Any]) -> dict[str, Any] | None:
    """Estimate whether serving the draft pays: accepted length against the cost of a step. None if
    behaviour was not judged.

    A step with the draft reads the draft's weights beside the target's; decoding one sequence is
    bound by reading.
    """
    from dspark.tools.judge.eval_report import relative_cost

    length = behaviour.get("as_configured")
    cost = None if length is None else relative_cost(config.model, config.draft)
    if length is None or cost is None:
        return None
    speed = length / (1 + cost)
    verdict = "it should be faster" if speed > 1 else "SLOWER than the target alone"
    text = (
        f"accepted length {length:.2f}, a step with the draft costs {1 + cost:.2f} of the "
        f"target's: at best {speed:.2f}x; {verdict}"
    )
    return {
        "accepted_length": length,
        "relative_cost": cost,
        "theoretical_gain": speed,
        "text": text,
    }


def _decode(
    config: CheckConfig,
    files: Any,
    target: Any,
    model: Any,
    findings: list[Any],
    note: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Add the findings of the stages that run the target; returns behaviour, and parity with the
    server or None.
    """
    from dspark.tools.check.files import Finding
    from dspark.tools.check.probe import answer_of
    from dspark.tools.check.symptoms import against_record, readings, symptoms
    from dspark.tools.check.tensor_rules import frozen
    from dspark.tools.decode.target import DecodingTarget, greedy_alone
    from dspark.train.draft.saved.folder import load_draft

    layers = range(-1, target.shapes.num_layers)
    prompts = _prompts(config, target)
    with DecodingTarget(model, list(layers), decodes=False) as tapped:
        findings += frozen(files, tapped.frozen)
        draft = load_draft(config.draft, tapped.frozen, dtype=model.dtype).to(model.device).eval()
        answers = []
        for number, prompt in enumerate(prompts, 1):
            note(f"the target answers prompt {number} of {len(prompts)}")
            tokens = greedy_alone(
                model, prompt, max_tokens=config.max_tokens, stop_ids=target.eos_token_ids
            )
            answers.append(answer_of(tapped, prompt, tokens))
        others = readings(
            draft,
            target.shapes.num_layers,
            rope_base(target.config),
            mask_candidates(target),
            tapped.frozen.norm,
        )
        found, behaviour = symptoms(draft, answers, others, note)
    findings += found + against_record(Path(config.draft), behaviour)
    served = None
    if config.serve if config.serve is not None else can_serve():
        from dspark.tools.check.parity import serve_and_compare

        note("starting vLLM")
        dtype = str(model.dtype).removeprefix("torch.")
        parity = serve_and_compare(
            model,
            config.model,
            config.draft,
            prompts[:2],
            max_tokens=min(config.max_tokens, 32),
            stop_ids=target.eos_token_ids,
            dtype=dtype,
        )
        served = parity.to_json() | {"dtype": dtype}
        equal = (
            f"{parity.equal} of {parity.compared} blocks drafted by our decoder and by vLLM are "
            "equal, token for token"
        )
        if parity.holds:
            findings.append(Finding("note", "served", f"{equal}; same output"))
        else:
            # Below float32 near-ties fall either way, block by block; a wrong draft or kernel
            # differs almost everywhere.
            level = (
                "error" if dtype == "float32" or parity.equal < 0.8 * parity.compared else "note"
            )
            findings.append(
                Finding(
                    level,
                    "served",
                    f"only {equal} ({dtype}); same output: {parity.same_output}. First: "
                    f"{parity.different[:1]}",
                )
            )
    return behaviour, served


def mask_token(files: Any, target: Any) -> list[Any]:
    """Check the mask token: if text uses it, the draft cannot tell it from text. Judged only if
    training left no record.
    """
    from dspark.tools.check.files import Finding

    mask, tokenizer = files.flat.get("mask_token_id"), target.tokenizer
    if not isinstance(mask, int):
        return []
    if not 0 <= mask < target.shapes.vocab_size:
        return [
            Finding(
                "error",
                "mask-token",
                f"mask_token_id {mask} is outside the target's vocabulary of "
                f"{target.shapes.vocab_size}",
            )
        ]
    if (
        tokenizer is None
        or files.trained is not None
        or mask >= len(tokenizer)
        or mask in tokenizer.added_tokens_decoder
    ):
        return []
    return [
        Finding(
            "suspicion",
            "mask-token",
            f"mask_token_id {mask} is an ordinary token, {tokenizer.convert_ids_to_tokens(mask)!r}",
        )
    ]


def mask_candidates(target: Any) -> list[int]:
    """Return ids that drafts for this target may have been trained with as mask token: unused rows,
    special tokens, the ends of the vocabulary.
    """
    vocab, tokenizer = target.shapes.vocab_size, target.tokenizer
    special = [] if tokenizer is None else [len(tokenizer), *sorted(tokenizer.added_tokens_decoder)]
    return [i for i in [*special, *target.eos_token_ids, vocab - 1, 0] if 0 <= i < vocab]


def _prompts(config: CheckConfig, target: Any) -> list[list[int]]:
    import random

    from dspark.dump.corpus.template import Template
    from dspark.tools.decode.prompts import read_prompts

    if config.data is not None:
        found = read_prompts(
            config.data,
            target.tokenizer,
            vocab_size=target.shapes.vocab_size,
            room=None,
            limit=config.limit,
        )
        return [p.ids for p in found]
    if target.tokenizer is None:
        chance = random.Random(0)
        return [
            [chance.randrange(target.shapes.vocab_size) for _ in range(8 + i)]
            for i in range(config.limit)
        ]
    asked = QUESTIONS[: config.limit]
    chat = target.tokenizer.chat_template is not None
    if chat:
        template = Template(target.tokenizer)
        asks = [template.form({"role": "user", "content": q}) for q in asked]
        texts = [template.render([ask], prompt=True) for ask in asks]
    else:
        texts = list(asked)
    return [target.tokenizer(t, add_special_tokens=not chat)["input_ids"] for t in texts]


def _why_not_served(config: CheckConfig) -> str:
    if config.serve is False or not config.decode:
        return "it was not asked for"
    if not ENGINES["vllm"].available:
        return "vLLM is not installed here"
    return (
        "there is no GPU, or the draft could not be loaded (without a GPU vLLM needs "
        "DSPARK_TRITON_INTERPRETER, see docs/serving.md)"
    )
