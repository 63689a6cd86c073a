"""Every block that real vLLM drafts against our decoder's: type, vocabulary, format, block size.
Writes bench/results/serve_parity.json.

python bench/serve_parity.py [--sizes 5,7,8] [--types dspark,eagle3,peagle] [--shapes
full,window,yarn] [--name serve_parity]

python bench/serve_parity.py --model TARGET --data PROMPTS.jsonl --draft DIR [--draft DIR ...]
    [--limit 8] [--name NAME]      trained drafts of a real target, in place of tiny random ones

Two targets per type and size: whole vocabulary, reduced one; each in every format that the type
has.

Tiny random targets, drafts that have learnt some of the answers (so that blocks of every length are
accepted), greedy, float32. Without a GPU set DSPARK_TRITON_INTERPRETER to
tests/vllm_cpu/triton_interpreter; each of the starts of vLLM then takes about 40 s.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, write
from dspark.tools.check.parity import ours_and_served, parity_of, serve_and_compare
from dspark.tools.decode.target import greedy_alone
from dspark.train.draft.saved.folder import save_draft, write_config
from dspark.train.draft.types import drafter

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny_models as tiny

PROMPTS = [[50, 60, 70], [5, 6, 7, 8, 9], list(range(20, 60)), [3], [140, 2, 77, 77, 31, 8]]
MAX_TOKENS = 48
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
# What a draft sees, and its RoPE. Windows only for dspark.
SHAPES: dict[str, dict[str, Any]] = {
    "full": {},
    "window": {"sliding_window": 6},
    "mixed": {"sliding_window": 6, "layer_types": ("sliding_attention", "full_attention")},
    "yarn": {"rope_scaling": _YARN},
    "window-yarn": {"sliding_window": 6, "rope_scaling": _YARN},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
}


def case(
    folder: Path, name: str, kind: str, reduced: bool, size: int, shape: str
) -> list[dict[str, Any]]:
    """One target and draft of the type ``name`` and of a ``shape``, served in its formats."""
    model = tiny.target(kind)
    alone = [greedy_alone(model, p, max_tokens=MAX_TOKENS) for p in PROMPTS]
    ids = (
        torch.tensor(sorted({*range(0, tiny.VOCAB, 3), *(t for a in alone[:3] for t in a)}))
        if reduced
        else None
    )
    own = {} if name == "dspark" else {"num_layers": 1, "target_layer_ids": (0, 1, 2)}
    draft = tiny.draft(
        model, draft_ids=ids, block_size=size, speculator_type=name, **own, **SHAPES[shape]
    )
    tiny.agree(
        model, draft, [p + a for p, a in zip(PROMPTS[:3], alone[:3], strict=True)], steps=100
    )
    target = str(folder / "target")
    model.save_pretrained(target)
    save_draft(folder / "draft", draft, dtype=torch.float32)
    out = []
    for layout in ("flat", "speculators") if drafter(name).spelled_by_speculators else ("flat",):
        verifier = (target, model.config.architectures) if layout == "speculators" else None
        write_config(folder / "draft", draft.config, torch.float32, verifier)
        started = time.perf_counter()
        parity = serve_and_compare(
            model, target, str(folder / "draft"), PROMPTS, max_tokens=MAX_TOKENS
        )
        out.append(
            {
                "type": name,
                "target": kind,
                "vocabulary": draft.config.draft_vocab_size,
                "of": tiny.VOCAB,
                "format": layout,
                "block_size": size,
                "shape": shape,
                **parity.to_json(),
                "seconds": time.perf_counter() - started,
            }
        )
        print(out[-1], file=sys.stderr, flush=True)
    return out


def random_ones(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Tiny targets and drafts of every type, size and shape that is asked for."""
    rows: list[dict[str, Any]] = []
    targets = (("qwen3", False), ("llama", True))
    names, sizes, shapes = args.types.split(","), args.sizes.split(","), args.shapes.split(",")
    for name, size, (kind, reduced), shape in product(names, map(int, sizes), targets, shapes):
        with tempfile.TemporaryDirectory() as folder:
            rows += case(Path(folder), name, kind, reduced, size, shape)
    return rows


def trained(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The same of each ``--draft`` on ``--model`` and the prompts of ``--data``."""
    from dspark.dump.target.config import load_target
    from dspark.tools.decode.prompts import read_prompts
    from dspark.tools.decode.target import load_model
    from dspark.train.draft.saved.folder import load_config

    target, out = load_target(args.model), []
    model = load_model(args.model, args.device, "float32")
    found = read_prompts(
        args.data,
        target.tokenizer,
        vocab_size=target.shapes.vocab_size,
        room=None,
        limit=args.limit,
    )
    for draft in args.draft:
        config, started = load_config(draft), time.perf_counter()
        ours, served = ours_and_served(
            model,
            args.model,
            draft,
            [prompt.ids for prompt in found],
            max_tokens=args.max_tokens,
            stop_ids=target.eos_token_ids,
        )
        alone = [
            greedy_alone(
                model, prompt.ids, max_tokens=args.max_tokens, stop_ids=target.eos_token_ids
            )
            for prompt in found
        ]
        out.append(
            {
                "type": config.speculator_type,
                "target": Path(args.model).name,
                "vocabulary": config.draft_vocab_size,
                "of": config.vocab_size,
                "block_size": config.block_size,
                "prompts": len(found),
                "lossless": [o.tokens for o in served] == alone,
                **parity_of(ours, served).to_json(),
                "seconds": time.perf_counter() - started,
            }
        )
        print(out[-1], file=sys.stderr, flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="5,7,8")
    parser.add_argument("--types", default="dspark")
    parser.add_argument("--shapes", default="full", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--name", default="serve_parity", help="of the file in bench/results")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--model", help="a real target, with --data and --draft")
    parser.add_argument("--data", help="its prompts")
    parser.add_argument("--draft", action="append", default=[])
    parser.add_argument("--limit", type=int, default=8, help="how many prompts")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    rows = trained(args) if args.draft else random_ones(args)
    results = {
        "holds": all(r["holds"] for r in rows), "blocks_compared": sum(r["compared"] for r in rows),
        "blocks_equal": sum(r["equal"] for r in rows), "cases": rows,
    }  # fmt: skip
    write(
        args.name,
        {
            "prompts": rows[0]["prompts"] if args.draft else len(PROMPTS),
            "max_tokens": args.max_tokens if args.draft else MAX_TOKENS,
            "dtype": "float32",
        },
        results,
        args.results,
    )


if __name__ == "__main__":
    main()
