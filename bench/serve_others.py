"""Drafts in the forms of other projects, served by real vLLM as they are and repacked by
``dspark-tools export``: our blocks against its.

    python bench/serve_others.py [--forms deepspec,specforge,speculators,glm,both-ways,z-lab,swa]
        [--name serve_others]

Tiny random targets and drafts (``tests/published.py``) that have learnt two of the answers, greedy,
float32. What vLLM does not load is recorded with the end of its message. Without a GPU set
DSPARK_TRITON_INTERPRETER to tests/vllm_cpu/triton_interpreter. Writes bench/results/NAME.json after
either way.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, write
from dspark.cache.errors import EngineError
from dspark.tools.check.parity import parity_of
from dspark.tools.decode.decode import speculative_generate
from dspark.tools.decode.target import DecodingTarget, greedy_alone
from dspark.tools.decode.vllm_serve import ServeRequest, run_vllm_each
from dspark.tools.publish.export import export
from dspark.train.draft.model import DraftModel
from dspark.train.draft.saved.folder import load_draft

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import published

import tiny_models as tiny

PROMPTS = [[50, 60, 70], [5, 6, 7, 8, 9], list(range(20, 60)), [i * 7 % 150 for i in range(120)]]
MAX_TOKENS = 20


def random_draft(model: Any, form: str) -> DraftModel:
    """A draft of the form's shape for ``model``, large random weights."""
    shape = dataclasses.replace(tiny.draft(model).config, **published.shape(form))
    torch.manual_seed(1)
    out = DraftModel(shape, DecodingTarget(model, tiny.LAYERS).frozen)
    with torch.no_grad():
        for _, parameter in out.trained():
            if parameter.ndim == 2:
                parameter.normal_(std=0.15)
    return out.float().eval()


@dataclass
class Form:
    """One form: what our decoder makes of it, and the folders and methods that vLLM is asked to
    serve.
    """

    name: str
    size: int
    alone: list[list[int]]
    ours: list[Any]
    asked: dict[str, ServeRequest]

    @classmethod
    def make(cls, folder: Path, name: str) -> Form:
        """Random weights that have learnt two answers, written as that project does, opened and
        decoded by us, repacked.
        """
        model = tiny.target("qwen3")
        alone = [greedy_alone(model, p, max_tokens=MAX_TOKENS) for p in PROMPTS]
        made = random_draft(model, name)
        size = made.config.block_size
        tiny.agree(
            model, made, [p + a for p, a in zip(PROMPTS[:2], alone[:2], strict=True)], steps=80
        )
        target = str(folder / "target")
        model.save_pretrained(target)
        theirs, repacked = (
            published.write(folder / "theirs", name, made, verifier=target),
            folder / "ours",
        )
        export(str(theirs), str(repacked), dtype="fp32", target=target, pictures=False)
        with DecodingTarget(model, made.config.target_layer_ids) as tapped:
            opened = load_draft(theirs, tapped.frozen).eval()
            wanted = published.shape(name) | {"block_size": size}
            assert {field: getattr(opened.config, field) for field in wanted} == wanted, (
                opened.config
            )
            ours = [
                speculative_generate(tapped, opened, p, max_tokens=MAX_TOKENS).outcome(size)
                for p in PROMPTS
            ]
        as_it_is = "dflash" if name in published.PLAIN else "dspark"
        asked = {
            way: ServeRequest(
                target=target,
                draft=str(draft),
                num_speculative_tokens=size,
                prompts=PROMPTS,
                max_tokens=MAX_TOKENS,
                dtype="float32",
                speculation={"method": method},
                trace=True,
            )
            for way, draft, method in (
                ("as_it_is", theirs, as_it_is),
                ("repacked", repacked, "dspark"),
            )
        }
        return cls(name, size, alone, ours, asked)

    def row(self, way: str, outcomes: list[Any]) -> dict[str, Any]:
        parity = parity_of(self.ours, outcomes)
        lossless = [o.tokens for o in outcomes] == self.alone
        return self._about(way) | {"lossless": lossless, **parity.to_json()}

    def refused(self, way: str, error: Exception) -> dict[str, Any]:
        lines = [line for line in str(error).splitlines() if "Error" in line]
        return self._about(way) | {"not_loaded": lines[-1][-400:] if lines else str(error)[-400:]}

    def _about(self, way: str) -> dict[str, Any]:
        method = self.asked[way].speculation["method"]
        return {"form": self.name, "way": way, "method": method, "block_size": self.size}


def serve(jobs: list[tuple[Form, str]]) -> list[dict[str, Any]]:
    """All in one process of vLLM, which is imported once; one by one if that ends."""
    try:
        answers = run_vllm_each([form.asked[way] for form, way in jobs])
        return [
            form.row(way, outcomes) for (form, way), outcomes in zip(jobs, answers, strict=True)
        ]
    except EngineError as error:
        if len(jobs) == 1:
            return [jobs[0][0].refused(jobs[0][1], error)]
    return [row for job in jobs for row in serve([job])]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--forms", default=",".join(published.FORMS))
    parser.add_argument("--ways", default="repacked,as_it_is")
    parser.add_argument("--name", default="serve_others", help="of the file in bench/results")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    names = args.forms.split(",")
    with tempfile.TemporaryDirectory() as folder:
        forms = [Form.make(Path(folder) / name, name) for name in names]
        for way in args.ways.split(","):
            rows += serve([(form, way) for form in forms])
            write(args.name, {"forms": names}, rows, args.results, show=False)
            print("\n".join(map(str, rows)), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
