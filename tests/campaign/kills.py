"""Processes that write are killed at a moment before or after a rename, fsync, link, deletion or
new folder, and run again until they end: the result must be that of an unbroken run. Dumps,
recodings, imports, dumps that regenerate, exports, trainings.

A case is a chain: killed at a random moment, run again with ``--resume`` (or, every fourth time,
``--overwrite``), killed again or not, until it ends.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults

# What a training says whose --overwrite was killed while it deleted: what is left is not whole.
AGAIN = "an --overwrite was stopped while it deleted"

Work = Callable[[Path, str], None]  # (output, "new" | "resume" | "overwrite")


@dataclasses.dataclass
class Kind:
    """Something that writes an output. ``equal`` compares two outputs, and returns what differs."""

    name: str
    work: Work
    equal: Callable[[Path, Path], list[str]]
    resumes: bool = True


def same_store(a: Path, b: Path) -> list[str]:
    from dspark.cache.stores.verify import verify

    left, right = faults.tree(a), faults.tree(b)
    return [n for n in sorted(left | right) if left.get(n) != right.get(n)] + verify(b).findings


def same_draft(a: Path, b: Path) -> list[str]:
    """Tensors and numbers: the library writes the keys of a file's header in any order."""
    import torch
    from safetensors.torch import load_file

    left, right = (load_file(p / "model.safetensors") for p in (a, b))
    out = [
        n
        for n in left | right
        if n not in left or n not in right or not torch.equal(left[n], right[n])
    ]
    speed = ("tokens_per_second", "step_ms", "data_wait_fraction")
    rows = [
        [
            {k: v for k, v in json.loads(line).items() if k not in speed}
            for line in (p / "metrics.jsonl").read_text().splitlines()
        ]
        for p in (a, b)
    ]
    return out + ([] if rows[0] == rows[1] else ["metrics.jsonl"])


def same_export(a: Path, b: Path) -> list[str]:
    import torch
    from safetensors.torch import load_file

    left, right = (load_file(p / "model.safetensors") for p in (a, b))
    names = sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
    return [n for n in left | right if not torch.equal(left[n], right[n])] + (
        [] if names else ["names"]
    )


def campaign(folder: Path, kind: Kind, kills: int, seed: int) -> dict[str, Any]:
    """Kill ``kind`` until ``kills`` of its processes have been; compare each output that ends."""
    rng = random.Random(seed)
    whole, said = folder / f"{kind.name}-whole", folder / f"{kind.name}.said"
    code = faults.attempt(lambda: kind.work(whole, "new"), None, said)
    assert code == 0, said.read_text()
    moments = int(said.read_text())
    killed = chains = equal = told = 0
    findings: list[str] = []
    began = time.monotonic()
    while killed < kills and len(findings) < 20:
        output, mode = folder / f"{kind.name}-{chains}", "new"
        # A third of the chains begin with an output that is there and is to be replaced.
        if chains % 3 == 2:
            faults.copied(whole, output)
            mode = "overwrite"
        code, path = -9, []
        while code == -9:
            at = rng.randrange(moments) if killed < kills else None
            path.append(f"{mode} until {at}")
            code = faults.attempt(
                lambda output=output, mode=mode: kind.work(output, mode), at, said
            )  # type: ignore[misc]
            if code == -9:
                killed += 1
                mode = "overwrite" if rng.random() < 0.25 or not kind.resumes else "resume"
                if not output.exists() and mode == "overwrite":
                    mode = "new"
            elif code and mode == "resume" and AGAIN in said.read_text():
                code, mode, told = -9, "overwrite", told + 1
        chains += 1
        differ = [said.read_text()] if code else kind.equal(whole, output)
        differ += [
            f"left: {p.name}"
            for p in folder.iterdir()
            if p.name.startswith((f".staging-{output.name}", f"{output.name}.lock"))
        ]
        equal += not differ
        if differ:
            findings.append(f"{path}: {differ} (kept: {faults.kept(output, output.name)})")
        shutil.rmtree(output, ignore_errors=True)
    return {
        "kind": kind.name,
        "moments": moments,
        "kills": killed,
        "outputs": chains,
        "told to overwrite again": told,
        "equal": equal,
        "findings": findings,
        "seconds": round(time.monotonic() - began),
    }


def flags(mode: str) -> dict[str, bool]:
    return {"resume": mode == "resume", "overwrite": mode == "overwrite"}


def dumping(folder: Path, *, regenerate: bool = False) -> Kind:
    """Dumps of a tiny target."""
    from dump_runs import corpus

    from dspark.dump.config import DumpConfig
    from dspark.dump.progress import Display
    from dspark.dump.run import dump
    from dump_targets import chat, save_target

    rows = [chat(f"u: {'one two ' * i}") for i in range(1, 7)] if regenerate else corpus(24)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    target = str(save_target(folder / "target"))
    config = DumpConfig(
        model=target, data=str(data), part_tokens=150, aux_bits=4, last_bits=4, workers=0
    )
    if regenerate:
        config = dataclasses.replace(
            config, regenerate=True, part_tokens=None, max_tokens=6, temperature=0.0, seq_length=120
        )

    def work(output: Path, mode: str) -> None:
        dump(dataclasses.replace(config, output=output, **flags(mode)), Display())

    return Kind("regenerate" if regenerate else "dump", work, same_store)


def recoding(folder: Path) -> Kind:
    import stores
    from dspark.cache.stores.recode import recode

    stores.write_store(folder / "source.zarr", [40, 52, 61, 44, 70, 33, 51])

    def work(output: Path, mode: str) -> None:
        recode(folder / "source.zarr", output, aux_bits=4, last_bits=4, workers=1, **flags(mode))

    return Kind("recode", work, same_store)


def importing(folder: Path) -> Kind:
    from tools.test_import import write_deepspec

    from dspark.tools.importers.importer import import_store
    from dump_targets import save_target

    target = save_target(folder / "target")
    write_deepspec(folder / "peer", foreign_rows(target))

    def work(output: Path, mode: str) -> None:
        import_store(folder / "peer", output, model=str(target), part_tokens=100, **flags(mode))

    return Kind("import", work, same_store)


def exporting(folder: Path) -> Kind:
    from core_cases import small_draft
    from dspark.tools.publish.export import export
    from dspark.train.draft.saved.folder import save_draft

    save_draft(folder / "published", small_draft())

    def work(output: Path, mode: str) -> None:
        export(
            str(folder / "published"),
            str(output),
            target="maker/model",
            pictures=False,
            overwrite=mode != "new",
        )

    return Kind("export", work, same_export, resumes=False)


def training(folder: Path) -> Kind:
    from small_trainings import small_training

    from dspark.train.loop import train

    settings = small_training(
        folder,
        [40, 52, 61, 44, 70],
        epochs=2,
        checkpoint_freq=0.5,
        device="cpu",
        keep_checkpoints=1,
    )

    def work(output: Path, mode: str) -> None:
        train(dataclasses.replace(settings, output=str(output)), **flags(mode))

    return Kind("train", work, same_draft)


MAKE: dict[str, Callable[[Path], Kind]] = {
    "dump": dumping,
    "regenerate": lambda folder: dumping(folder, regenerate=True),
    "recode": recoding,
    "import": importing,
    "export": exporting,
    "train": training,
}


def foreign_rows(target: Path) -> list[Any]:
    """Samples as another project's cache has them."""
    import numpy as np
    import torch
    from tools.test_import import LAYERS, Row
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    rng = np.random.default_rng(0)
    out = []
    for _ in range(8):
        n = int(rng.integers(20, 60))
        ids = rng.integers(4, 200, n).tolist()
        with torch.inference_mode():
            hidden = model.model(torch.tensor([ids]), output_hidden_states=True)
        states = torch.stack([hidden.hidden_states[j + 1][0] for j in LAYERS], dim=1).bfloat16()
        last = hidden.last_hidden_state[0].bfloat16()
        out.append(Row(ids, [int(p >= n // 3) for p in range(n)], states, last, last))
    return out
