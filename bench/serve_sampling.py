"""Is a served draft lossless at temperature 1? First three tokens of many runs against the target's
exact joint distribution.

python bench/serve_sampling.py [--trials 600] [--engines transformers,vllm] writes
bench/results/serve_sampling.json

Eight tokens, so that all 512 answers of three tokens can be listed; a tiny random target and a
random draft that is often refused. Pearson's statistic, cells of fewer than 5 expected pooled; of
triples, pairs and first tokens; ``holds`` if all survival probabilities are above 0.001 / 3, so a
sound engine fails at most one run in a thousand. Every run has a seed of its own. Without a GPU
vLLM needs DSPARK_TRITON_INTERPRETER.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, write
from dspark.tools.decode.decode import speculative_generate
from dspark.tools.decode.outcome import Outcome, summarise
from dspark.tools.decode.target import DecodingTarget
from dspark.tools.decode.vllm_serve import ServeRequest, run_vllm
from dspark.train.draft.saved.folder import save_draft

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny_models as tiny
from chance import chi_square

VOCAB, PROMPT, ERROR_RATE = 8, [1, 2], 1e-3


def joint(model: Any) -> torch.Tensor:
    """p(a, b, c) of the first three tokens at temperature 1, fp32 [VOCAB, VOCAB, VOCAB]."""
    pairs = torch.cartesian_prod(torch.arange(VOCAB), torch.arange(VOCAB))
    ids = torch.cat([torch.tensor(PROMPT).expand(len(pairs), -1), pairs], 1)
    with torch.inference_mode():
        p = model(input_ids=ids).logits.float().softmax(-1)
    at = len(PROMPT) - 1
    first, second = p[:, at].gather(1, pairs[:, :1]), p[:, at + 1].gather(1, pairs[:, 1:])
    return (first * second * p[:, at + 2]).view(VOCAB, VOCAB, VOCAB)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=600)
    parser.add_argument("--engines", default="transformers,vllm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    model = tiny.target(vocab_size=VOCAB, initializer_range=0.15)
    draft = tiny.draft(model, mask_token_id=VOCAB - 1)
    expected, results = joint(model), dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder:
        target = f"{folder}/target"
        model.save_pretrained(target)
        save_draft(f"{folder}/draft", draft, dtype=torch.float32)
        for engine in args.engines.split(","):
            outcomes: list[Outcome] = []
            if engine == "vllm":
                outcomes = run_vllm(
                    ServeRequest(
                        target=target,
                        draft=f"{folder}/draft",
                        num_speculative_tokens=draft.config.block_size,
                        prompts=[PROMPT] * args.trials,
                        max_tokens=3,
                        temperature=1.0,
                        seed=args.seed,
                        dtype="float32",
                    )
                )
            else:
                generator = torch.Generator().manual_seed(args.seed)
                with DecodingTarget(model, tiny.LAYERS) as tapped:
                    for _ in range(args.trials):
                        out = speculative_generate(
                            tapped,
                            draft,
                            PROMPT,
                            max_tokens=3,
                            temperature=1.0,
                            generator=generator,
                        )
                        outcomes.append(out.outcome(draft.config.block_size))
            counts = torch.zeros(VOCAB, VOCAB, VOCAB)
            for outcome in outcomes:
                counts[tuple(outcome.tokens)] += 1
            p = chi_square(counts.flatten(), expected.flatten() * args.trials)
            # First tokens alone and pairs alone, where each cell holds more runs.
            one = chi_square(counts.sum((1, 2)), expected.sum((1, 2)) * args.trials)
            two = chi_square(counts.sum(2).flatten(), expected.sum(2).flatten() * args.trials)
            totals = summarise(outcomes)
            results[engine] = {
                "p_value": p,
                "p_value_first": one,
                "p_value_pairs": two,
                "holds": min(p, one, two) > ERROR_RATE / 3,
                "drafts": totals["drafts"],
                "mean_accepted_length": totals["mean_accepted_length"],
                "se": totals["mean_accepted_length_se"],
            }
    write(
        "serve_sampling",
        {
            "trials": args.trials,
            "seed": args.seed,
            "vocabulary": VOCAB,
            "error_rate": ERROR_RATE,
            "temperature": 1.0,
        },
        results,
        args.results,
    )


if __name__ == "__main__":
    main()
