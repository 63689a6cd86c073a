"""``make campaign``: what is done to stores and trainings so that they can be trusted, with a seed.
Prints a JSON object per campaign; exit code 1 where one has findings.

    python tests/campaign/run.py [NAME ...] [--scale S] [--seed N]

Names: dump, regenerate, recode, import, export, train (kills); stores, plain, dumped, trainings
(damage); writers; transient; hostile. ``--scale 1`` are the figures in docs/trust.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

KILLS = {"dump": 200, "regenerate": 40, "recode": 60, "import": 40, "export": 40, "train": 60}
OTHERS = {
    "stores": 1100,
    "plain": 300,
    "dumped": 300,
    "trainings": 400,
    "writers": 40,
    "transient": 0,
    "hostile": 2000,
}


def run(name: str, count: int, seed: int, folder: Path) -> dict[str, object]:
    """One campaign in an empty ``folder``."""
    import damage
    import hostile
    import kills
    import transient
    import writers

    if name in KILLS:
        return kills.campaign(folder, kills.MAKE[name](folder), count, seed)
    table = {
        "stores": lambda: damage.stores_campaign(folder, count, seed),
        "plain": lambda: damage.stores_campaign(folder, count, seed, pack="none"),
        "dumped": lambda: damage.dumped_campaign(folder, count, seed),
        "trainings": lambda: damage.trainings_campaign(folder, count, seed),
        "writers": lambda: writers.campaign(folder, count, seed),
        "transient": lambda: transient.campaign(folder, count, seed),
        "hostile": lambda: hostile.campaign(folder, count, seed),
    }
    return table[name]()


def main() -> None:
    names = KILLS | OTHERS
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", choices=[*names, []], default=list(names))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=17)
    asked = parser.parse_args()
    failed = False
    for name in asked.names:
        count = names[name] if not names[name] else max(1, round(names[name] * asked.scale))
        with tempfile.TemporaryDirectory() as folder:
            found = run(name, count, asked.seed, Path(folder))
        print(json.dumps({"campaign": name, "seed": asked.seed} | found), flush=True)
        failed |= bool(found["findings"])
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
