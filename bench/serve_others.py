"""Drafts in the forms of other projects, served by real vLLM as they are and repacked by ``dspark-tools export``: our blocks against its.

    python bench/serve_others.py [--forms deepspec,specforge,speculators,glm,both-ways,z-lab,swa] [--name serve_others]

Tiny random targets and drafts (``tests/published.py``) that have learnt two of the answers, greedy, float32. What vLLM does not load is
recorded with the end of its message. Without a GPU set DSPARK_TRITON_INTERPRETER to tests/vllm_cpu/triton_interpreter; each start of vLLM
then takes about 40 s. Writes bench/results/NAME.json after every form.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, write
from dspark.cache.errors import EngineError
from dspark.tools.check.parity import compare
from dspark.tools.decode.decode import speculative_generate
from dspark.tools.decode.target import Target, greedy_alone
from dspark.tools.decode.vllm_serve import ServeRequest, run_vllm
from dspark.tools.publish.export import export
from dspark.train.draft.folder import load_draft

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import published

import tiny_models as tiny

PROMPTS = [[50, 60, 70], [5, 6, 7, 8, 9], list(range(20, 60)), [i * 7 % 150 for i in range(120)]]
MAX_TOKENS = 24


def served(
    target: str, draft: Path, ours: list[Any], alone: list[list[int]], size: int, method: str
) -> dict[str, Any]:
    """Parity of one folder in vLLM, or why it was not loaded."""
    request = ServeRequest(
        target=target, draft=str(draft), num_speculative_tokens=size, prompts=PROMPTS, max_tokens=MAX_TOKENS, dtype="float32",
        speculation={"method": method}, trace=True,
    )  # fmt: skip
    started = time.perf_counter()
    try:
        outcomes = run_vllm(request)
    except EngineError as error:
        lines = [line for line in str(error).splitlines() if "Error" in line]
        return {"method": method, "not_loaded": lines[-1][-400:] if lines else str(error)[-400:]}
    parity = compare(ours, outcomes)
    lossless = [o.tokens for o in outcomes] == alone
    return {
        "method": method,
        "lossless": lossless,
        **parity.to_json(),
        "seconds": time.perf_counter() - started,
    }


def case(folder: Path, form: str) -> dict[str, Any]:
    """One form: opened and decoded by us, served as it is, repacked and served."""
    model = tiny.target("qwen3")
    alone = [greedy_alone(model, p, max_tokens=MAX_TOKENS) for p in PROMPTS]
    made = tiny.draft(model, **published.shape(form))
    size = made.config.block_size
    tiny.agree(model, made, [p + a for p, a in zip(PROMPTS[:2], alone[:2], strict=True)], steps=80)
    target = str(folder / "target")
    model.save_pretrained(target)
    theirs, ours = published.write(folder / "theirs", form, made, verifier=target), folder / "ours"
    export(str(theirs), str(ours), dtype="fp32", target=target, pictures=False)
    with Target(model, made.config.target_layer_ids) as tapped:
        opened = load_draft(theirs, tapped.frozen).eval()
        assert opened.config == made.config, (opened.config, made.config)
        blocks = [
            speculative_generate(tapped, opened, p, max_tokens=MAX_TOKENS).outcome(size) for p in PROMPTS
        ]
    own = "dflash" if form in published.PLAIN else "dspark"
    return {
        "form": form, "block_size": size, "as_it_is": served(target, theirs, blocks, alone, size, own),
        "repacked": served(target, ours, blocks, alone, size, "dspark"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--forms", default=",".join(published.FORMS))
    parser.add_argument("--name", default="serve_others", help="of the file in bench/results")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for form in args.forms.split(","):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(case(Path(folder), form))
        print(rows[-1], file=sys.stderr, flush=True)
        write(args.name, {"forms": args.forms}, rows, args.results, show=form == args.forms.split(",")[-1])


if __name__ == "__main__":
    main()
