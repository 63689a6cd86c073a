"""Where the seconds of dspark-dump, dspark-train and dspark-tools score go besides their steps.

    python bench/start_phases.py --model MODEL --data chat.jsonl [--dump "--limit 3000"]
        [--train "--max-steps 60"] [--profile]

Three rounds of all three commands, each command a process of its own: with empty caches of compiled
code, with what the first round left in them, and (``--profile``) once more under cProfile, whose
tables of the main thread go to NAME.COMMAND.txt beside the results. Phases are read from the times
in the commands' own logs: ``settle`` is from the command to the first line, ``check`` to the
self-check (weights are read in it), ``calibrate`` to the store's beginning, ``capture`` to the last
part, ``first_step`` and ``steps_and_validations`` as named, ``finish`` to the last line of the log,
``exit`` what the process takes after that.
Writes NAME.json to ``--results`` after every command.
"""

from __future__ import annotations

import argparse
import datetime
import re
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path

from common import RESULTS, reported, write

COMMANDS = ("dump", "train", "score")
STAMP = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) (.*)")
# In a child: a command under a profile, and then what torch says of its compilations.
PROFILED = """
import cProfile, io, pstats, sys
from importlib import import_module
tool, profile = sys.argv[1:3]
sys.argv = ["dspark-" + tool, *sys.argv[3:]]
seen = cProfile.Profile()
seen.enable()
try:
    import_module(f"dspark.{tool}.cli").main()
finally:
    seen.disable()
    text = io.StringIO()
    table = pstats.Stats(seen, stream=text)
    table.sort_stats("cumulative").print_stats(150)
    table.sort_stats("tottime").print_stats(60)
    if "torch._dynamo.utils" in sys.modules:
        text.write(sys.modules["torch._dynamo.utils"].compile_times(aggregate=True))
    open(profile, "w").write(text.getvalue())
"""
# Phase -> the first line of the log that ends it; the last phase lasts to the exit.
DUMP = (("settle", "writer "), ("check", "self-check "), ("calibrate", "size .*measured"))
TRAIN = (("settle", "draft of"), ("first_step", "step=1 "))


def stamps(log: Path) -> list[tuple[float, str]]:
    """The lines of a log that have a time: when (Unix time), and what they say."""
    out = []
    for line in log.read_text().splitlines():
        if found := STAMP.match(line):
            at = datetime.datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S,%f")
            out.append((at.timestamp(), found[2].removeprefix("INFO ")))
    return out


def phases(tool: str, log: Path, began: float, ended: float) -> dict[str, float]:
    """Seconds of a command by phase."""
    lines, out, since = stamps(log), {}, began
    for name, pattern in DUMP if tool == "dump" else TRAIN:
        at = next((at for at, text in lines if re.match(pattern, text)), since)
        out[name], since = at - since, at
    if tool == "dump":
        part = max((at for at, text in lines if text.startswith("part ")), default=since)
        out["capture"], since = part - since, part
    else:
        judged = [at for at, text in lines if "validation=True" in text]
        step = max((at for at, text in lines if re.match(r"step=\d+ .*loss=", text)), default=since)
        out["steps_and_validations"], since = max(step, *judged, since) - since, step
        since = max([step, *judged])
    out["finish"] = lines[-1][0] - since
    out["exit"] = ended - lines[-1][0]
    return {name: round(seconds, 2) for name, seconds in out.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--dump", default="", help="more flags of dspark-dump")
    parser.add_argument("--train", default="", help="more flags of dspark-train")
    parser.add_argument("--score", default="", help="more flags of dspark-tools score")
    parser.add_argument("--profile", action="store_true", help="a third round, under cProfile")
    parser.add_argument("--work", type=Path, help="folder for store and draft [a temporary one]")
    parser.add_argument("--name", default="start_phases")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    rows = []
    said = {name: getattr(args, name) for name in COMMANDS}
    with tempfile.TemporaryDirectory() as made:
        work = args.work or Path(made)
        store, draft = work / "hs.zarr", work / "draft"
        cache = Path(made) / "cache"
        env = {
            "XDG_CACHE_HOME": str(cache),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "TRITON_CACHE_DIR": str(cache / "triton"),
        }
        where = ["--cache", str(store), "--draft", str(draft), "--split", "validation"]
        words = {
            "dump": ["--model", args.model, "--data", args.data, "--output", str(store)],
            "train": ["--cache", str(store), "--output", str(draft), "--no-tensorboard"],
            "score": ["score", *where],
        }
        logs = {"dump": store.with_suffix(".zarr.log"), "train": draft / "train.log"}
        for state in ("empty", "filled", *(["profile"] if args.profile else [])):
            shutil.rmtree(store, ignore_errors=True)
            shutil.rmtree(draft, ignore_errors=True)
            logs["dump"].unlink(missing_ok=True)
            for name in COMMANDS:
                tool = "tools" if name == "score" else name
                told = str(args.results / f"{args.name}.{name}.txt")
                flags = [*words[name], *shlex.split(getattr(args, name)), "--json"]
                call = ["-m", f"dspark.{tool}"]
                if state == "profile":
                    call = ["-c", PROFILED, tool, told]
                began = time.time()
                done = reported([*call, *flags], env=env)
                ended = began + done["wall_seconds"]
                found = phases(name, logs[name], began, ended) if name in logs else {}
                row = {"command": name, "caches": state, "seconds": round(ended - began, 2)}
                row["tau"] = done.get("mean_accepted_length")
                rows.append(row | {"phases": found})
                print(rows[-1], file=sys.stderr, flush=True)
                write(args.name, said, rows, args.results, show=False)
    write(args.name, said, rows, args.results)


if __name__ == "__main__":
    main()
