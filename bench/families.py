"""Every family as a tiny random checkpoint: dump, two steps of training, export, check; and states
of real vLLM against transformers.

    python bench/families.py [--only llama,glm_moe_dsa] [--no-vllm]

Results are added to those that are there, so that one machine may do the one half and one the
other. A family that a stage cannot run is listed with that stage's own reason. Writes
bench/results/families.json; ``python docs/make/targets.py`` then writes the table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import families
from engines import difference, random_samples
from family_journey import LAYERS, journey

from common import RESULTS, hardware, versions, write
from dspark.cache.errors import DsparkError, EngineError
from dspark.cache.records import last_rows
from dspark.cache.target.logits import Logits
from dspark.dump.checks.states import HeadOf, agreement, check
from dspark.dump.engines.engine import Engine, States
from dspark.dump.engines.hf import TransformersEngine
from dspark.dump.engines.vllm.engine import VllmEngine
from dspark.dump.target.config import load_target


def through(kind: str, folder: Path) -> dict[str, Any]:
    """Dump, training, export and check, or where they stopped."""
    folder.mkdir()
    try:
        return journey(kind, folder)
    except DsparkError as error:
        return {"stopped": f"{type(error).__name__}: {error}"[:600]}


def stamp() -> dict[str, Any]:
    """When and with what a result was seen: the file holds those of several days and machines."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"date": today, "hardware": hardware(), "versions": versions()}


def measure(kind: str, folder: Path) -> dict[str, Any]:
    """Both engines over the same random ids in fp32."""
    families.save(folder, kind)
    target = load_target(str(folder))
    samples = random_samples(12, families.VOCAB, 100)
    logits = Logits.of_config(target.config)
    shapes = target.shapes
    out: dict[str, Any] = {"tokens": sum(len(s.input_ids) for s in samples), "logits": str(logits)}
    ours = TransformersEngine.load(
        str(folder), shapes, LAYERS, device="cpu", dtype="float32", batch_tokens=1024
    )
    states = run(ours, samples, out, logits)
    messages = folder.with_suffix(".log")
    try:
        with stderr_to(messages):
            theirs = VllmEngine.load(
                str(folder),
                shapes,
                LAYERS,
                dtype="float32",
                seq_length=128,
                spool=folder.with_suffix(".spool"),
                batch_tokens=None,
            )
    except EngineError:
        return out | {"vllm": f"does not start: {own_reason(messages)}"}
    try:
        other = run(theirs, samples, out, logits)
    except EngineError as error:
        return out | {"vllm": reason(error)}
    finally:
        theirs.close()
    aux, others = (torch.cat([s.aux for s in each]) for each in (states, other))
    out["difference"] = {str(i): difference(aux[:, k], others[:, k]) for k, i in enumerate(LAYERS)}
    out["difference"]["last"] = difference(
        *(torch.cat([s.last for s in each]) for each in (states, other))
    )
    where = [last_rows(s.loss_mask).nonzero()[0].tolist() for s in samples]
    head = HeadOf(ours.frozen(), logits)
    found = agreement([s.last for s in other], where, ours.predict(samples), head, "float32")
    out["top1_vllm_states_against_transformers"] = found.top1
    return out


def run(engine: Engine, samples: list[Any], out: dict[str, Any], logits: Logits) -> list[States]:
    found, states = check(engine, samples, engine.frozen(), "float32", LAYERS, logits)
    out[engine.name] = {"top1": found.top1, "agree": found.agree, "worst_logprob": found.worst}
    return [states[i] for i in range(len(samples))]


@contextmanager
def stderr_to(path: Path) -> Iterator[None]:
    """This process's and its children's stderr."""
    kept = os.dup(2)
    with open(path, "wb") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def own_reason(messages: Path) -> str:
    """The first error that one of vLLM's processes printed which is not about another one."""
    for line in messages.read_text(errors="replace").splitlines():
        found = re.search(r"\b(\w*Error: .*)", line)
        if found and not re.search("CalledProcessError|subprocess", found[1]):
            return found[1][:300]
    return "no reason found"


def reason(error: EngineError) -> str:
    return str(error)[:600]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="families, commas between them  [default: all]")
    parser.add_argument(
        "--no-vllm", action="store_true", help="only dump, training, export and check"
    )
    args = parser.parse_args()
    kinds = args.only.split(",") if args.only else [*families.MAKERS, *families.REFUSED]
    before = RESULTS / "families.json"
    results = json.loads(before.read_text())["results"] if before.exists() else {}
    for kind in kinds:
        with tempfile.TemporaryDirectory() as scratch:
            here = results.setdefault(kind, {})
            here["journey"] = through(kind, Path(scratch) / "journey") | {"seen": stamp()}
            if not args.no_vllm and kind in families.MAKERS:
                here |= measure(kind, Path(scratch) / kind) | {"vllm_seen": stamp()}
            print(kind, json.dumps(here), file=sys.stderr)
    config = {"dtype": "float32", "layers": list(LAYERS), "layers_in_all": families.LAYERS}
    write("families", config, results)


if __name__ == "__main__":
    main()
