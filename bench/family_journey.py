"""One tiny random target through everything: dump, two steps of training, export, check. Used by
bench/families.py.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import families

LAYERS = (0, 2, 3)
ROWS, LENGTH = 24, 48
MASK_TOKEN = families.VOCAB - 1  # no row uses it


def write_rows(path: Path) -> Path:
    """Random ids with a loss mask: no family's tokenizer is at hand."""
    chance = random.Random(0)
    with path.open("w") as file:
        for _ in range(ROWS):
            ids = [chance.randrange(MASK_TOKEN - 1) for _ in range(LENGTH)]
            mask = [0] * (LENGTH // 3) + [1] * (LENGTH - LENGTH // 3)
            file.write(json.dumps({"input_ids": ids, "loss_mask": mask}) + "\n")
    return path


def journey(kind: str, folder: Path) -> dict[str, Any]:
    """What each stage says of ``kind``, whose checkpoint is written to ``folder``."""
    from dspark.dump.config import DumpConfig
    from dspark.dump.progress import Display
    from dspark.dump.run import dump
    from dspark.dump.target.config import load_target
    from dspark.dump.target.weights import find_frozen
    from dspark.tools.check.stages import CheckConfig, check
    from dspark.tools.publish.export import export

    model = families.save(folder / "target", kind)
    target = load_target(str(model))
    store, draft, out = folder / "hs.zarr", folder / "draft", folder / "published"
    dumped = dump(
        DumpConfig(
            model=str(model),
            data=str(write_rows(folder / "rows.jsonl")),
            output=store,
            layers=LAYERS,
            mask_token_id=MASK_TOKEN,
            device="cpu",
            engine="transformers",
        ),
        Display(),
    )
    config = train_two_steps(store, draft)
    exported = export(str(draft), str(out), dtype="fp32", pictures=False)
    report = check(
        CheckConfig(
            draft=str(out), model=str(model), limit=2, max_tokens=12, serve=False, device="cpu"
        )
    )
    levels = [f["level"] for f in report["findings"]]
    return {
        "frozen": str(find_frozen(str(model), target.shapes, target.whole)),
        "tokens": dumped.get("tokens"),
        "draft": config,
        "steps": 2,
        "exported_tensors": exported["tensors"],
        # Two steps teach nothing, so behaviour may look like a mistake; errors contradict the
        # files.
        "check_errors": [f["text"] for f in report["findings"] if f["level"] == "error"],
        "check_suspicions": levels.count("suspicion"),
    }


def train_two_steps(store: Path, draft: Path) -> dict[str, Any]:
    """Train; returns the draft's shape as its config.json has it."""
    from dspark.train.config import TrainConfig
    from dspark.train.loop import train

    train(
        TrainConfig(
            cache=str(store),
            output=str(draft),
            recipe="none",
            max_steps=2,
            num_layers=2,
            block_size=3,
            markov_rank=4,
            total_seq_len=128,
            rows_per_step=2,
            max_anchors=16,
            log_every=1,
            val_fraction=0.2,
            tensorboard=False,
            device="cpu",
            compile=False,
        )
    )
    config = json.loads((draft / "config.json").read_text())
    names = (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    return {name: config[name] for name in names}
