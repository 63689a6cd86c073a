"""Every family as a tiny random checkpoint: dump, two steps of training, export, check; the draft
served by real vLLM; and vLLM's states against transformers'.

    python bench/families.py [--only llama,glm_moe_dsa] [--stages journey,served,states]
        [--limit 240]

Each stage of each family is a process of its own with a limit, ended with all that it started.
Results are added to those that are there, so that one machine may do the one half and one the
other. A family that a stage cannot run is listed with that stage's own reason. Writes
bench/results/families.json after every stage; ``python docs/make/targets.py`` then writes the
table. ``served`` needs the folders of ``journey`` and runs after it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import families
from engines import difference, random_samples
from family_journey import LAYERS, journey
from family_serving import serving
from limited import run

from common import RESULTS, hardware, versions, write
from dspark.cache.errors import DsparkError, EngineError
from dspark.cache.records import last_rows
from dspark.cache.target.logits import Logits
from dspark.dump.checks.states import HeadOf, agreement, check
from dspark.dump.engines.engine import Engine, States
from dspark.dump.engines.hf import TransformersEngine
from dspark.dump.engines.vllm.engine import VllmEngine
from dspark.dump.target.config import load_target

STAGES = ("journey", "served", "states")


def child(stage: str, kind: str, folder: Path) -> dict[str, Any]:
    """What a stage finds, or where it stopped."""
    try:
        if stage == "journey":
            (folder / stage).mkdir()
            return journey(kind, folder / stage)
        if stage == "served":
            return serving(folder / "journey" / "target", folder / "journey" / "published")
        return measure(kind, folder / kind, folder / f"{stage}.log")
    except DsparkError as error:
        return {"stopped": f"{type(error).__name__}: {error}"[:600]}


def limited(stage: str, kind: str, folder: Path, seconds: float) -> dict[str, Any]:
    """``child`` in a session of its own, which is ended as a whole behind ``seconds``."""
    call = [__file__, "--child", stage, "--only", kind, "--folder", str(folder)]
    ended = run(call, folder / f"{stage}.log", seconds)
    out = folder / f"{stage}.json"
    last = next((line for line in reversed(ended.log.splitlines()) if line.strip()), "")
    found = json.loads(out.read_text()) if out.is_file() else {"stopped": f"{ended.words}: {last}"}
    return found | {"seconds": round(ended.seconds), "seen": stamp()}


def stamp() -> dict[str, Any]:
    """When and with what a result was seen: the file holds those of several days and machines."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"date": today, "hardware": hardware(), "versions": versions()}


def measure(kind: str, folder: Path, log: Path) -> dict[str, Any]:
    """Both engines over the same random ids in fp32; ``log`` has what this process prints."""
    families.save(folder, kind)
    target = load_target(str(folder))
    samples = random_samples(12, families.VOCAB, 100)
    logits = Logits.of_config(target.config)
    shapes = target.shapes
    out: dict[str, Any] = {"tokens": sum(len(s.input_ids) for s in samples), "logits": str(logits)}
    ours = TransformersEngine.load(
        str(folder), shapes, LAYERS, device="cpu", dtype="float32", batch_tokens=1024
    )
    states = checked(ours, samples, out, logits)
    try:
        theirs = VllmEngine.load(
            str(folder),
            shapes,
            LAYERS,
            dtype="float32",
            seq_length=128,
            spool=folder.with_suffix(".spool"),
            batch_tokens=None,
        )
    except EngineError as error:
        return out | {"vllm": f"does not start: {own_reason(log) or error}"[:600]}
    try:
        other = checked(theirs, samples, out, logits)
    except EngineError as error:
        return out | {"vllm": f"does not run: {own_reason(log) or error}"[:600]}
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


def checked(
    engine: Engine, samples: list[Any], out: dict[str, Any], logits: Logits
) -> list[States]:
    found, states = check(engine, samples, engine.frozen(), "float32", LAYERS, logits)
    out[engine.name] = {"top1": found.top1, "agree": found.agree, "worst_logprob": found.worst}
    return [states[i] for i in range(len(samples))]


def own_reason(log: Path) -> str | None:
    """The first error that one of vLLM's processes printed which is not about another one."""
    for line in log.read_text(errors="replace").splitlines():
        found = re.search(r"\b(\w*Error: .*)", line)
        if found and not re.search("CalledProcessError|subprocess", found[1]):
            return found[1][:300]
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="families, commas between them  [default: all]")
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--limit", type=float, default=240, help="seconds of a stage")
    parser.add_argument("--child", choices=STAGES, help="internal")
    parser.add_argument("--folder", type=Path, help="internal")
    args = parser.parse_args()
    if args.child:
        found = child(args.child, args.only, args.folder)
        (args.folder / f"{args.child}.json").write_text(json.dumps(found))
        return
    kinds = args.only.split(",") if args.only else [*families.MAKERS, *families.REFUSED]
    stages = args.stages.split(",")
    before = RESULTS / "families.json"
    results = json.loads(before.read_text())["results"] if before.exists() else {}
    config = {"dtype": "float32", "layers": list(LAYERS), "layers_in_all": families.LAYERS}
    for kind in kinds:
        here = results.setdefault(kind, {})
        with tempfile.TemporaryDirectory() as scratch:
            for stage in stages:
                if stage != "journey" and kind in families.REFUSED:
                    continue
                if stage == "served" and "stopped" in here["journey"]:
                    continue
                here[stage] = limited(stage, kind, Path(scratch), args.limit)
                write("families", config, results, show=False)
                print(kind, stage, json.dumps(here[stage]), file=sys.stderr, flush=True)
    write("families", config, results)


if __name__ == "__main__":
    main()
