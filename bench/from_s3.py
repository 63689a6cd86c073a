"""The same training from a store on the disk and from an S3 server on the same machine: tokens per
second and the share of the time that the step waits for data.

    python bench/from_s3.py --work DIR [--gpus 2] [--runs disk,s3,s3-kept] [--steps 50]
    python bench/from_s3.py --work DIR --device cpu --shape tiny --tokens 256 --steps 10
        a dry run through gloo

``disk``: a local folder. ``s3``: nothing is kept locally (``DSPARK_CACHE_GB=0``), so every epoch
comes from the server. ``s3-kept``: with the local cache of pieces, empty at first. A run may be
named more than once.

The server is moto's, one store held in the memory of ``--servers`` processes that share a port: a
single one is bound by one interpreter. It shares the host with the trainer, so no network is
measured, its processes take cores that a trainer would have for itself, and the disk is the page
cache. Needs ``moto[s3]``, flask, flask-cors and obstore. Prints and writes
bench/results/from_s3.json: a row a run, as bench/scaling.py's, with what the server sent.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from scaling import SHAPES, run, write_store

from common import RESULTS, write
from s3_server import BUCKET, SETTINGS

RUNS = ("disk", "s3", "s3-kept")


class Counted:
    """A WSGI application whose requests and body bytes are added up over all processes."""

    def __init__(self, inner: Any, totals: Any) -> None:
        self.inner, self.totals = inner, totals

    def __call__(self, environ: Any, start_response: Any) -> Any:
        def counted(status: str, headers: Any, *more: Any) -> Any:
            lengths = (v for k, v in headers if k.lower() == "content-length")
            with self.totals.get_lock():
                self.totals[0] += 1
                self.totals[1] += int(next(lengths, 0))
            return start_response(status, headers, *more)

        return self.inner(environ, counted)


def fill(store: Path) -> None:
    """Make the objects of a local store moto's own, in this process's memory."""
    os.environ["MOTO_S3_DEFAULT_KEY_BUFFER_SIZE"] = str(1 << 40)  # a file's offset would be shared
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    backend.create_bucket(BUCKET, SETTINGS["AWS_DEFAULT_REGION"])
    for path in sorted(store.rglob("*")):
        if path.is_file():
            key = f"{store.name}/{path.relative_to(store).as_posix()}"
            backend.put_object(BUCKET, key, path.read_bytes())


def serve(listening: socket.socket, totals: Any) -> None:
    import logging

    from moto.moto_server.werkzeug_app import (
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    make_server(
        "127.0.0.1",
        listening.getsockname()[1],
        Counted(DomainDispatcherApplication(create_backend_app), totals),
        threaded=True,
        request_handler=MotoRequestHandler,
        fd=listening.fileno(),
    ).serve_forever()


@contextmanager
def servers(store: Path, count: int) -> Iterator[tuple[str, Any]]:
    """``count`` processes that serve the store; its URL, and requests and bytes so far. The
    environment names them.
    """
    fork = multiprocessing.get_context("fork")
    totals = fork.Array("q", 2)
    fill(store)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(1024)
        running = [
            fork.Process(target=serve, args=(listening, totals), daemon=True) for _ in range(count)
        ]
        for process in running:
            process.start()
        os.environ.update(
            SETTINGS, AWS_ENDPOINT_URL=f"http://127.0.0.1:{listening.getsockname()[1]}"
        )
        try:
            yield f"s3://{BUCKET}/{store.name}", totals
        finally:
            for process in running:
                process.terminate()
                process.join()


def one(args: argparse.Namespace, name: str, url: str, totals: Any) -> dict[str, Any]:
    """One training; its curve, its speed, and what the server sent for it."""
    kept = args.work / "objects"
    shutil.rmtree(kept, ignore_errors=True)
    os.environ["DSPARK_CACHE_DIR"] = str(kept)
    os.environ["DSPARK_CACHE_GB"] = "50" if name == "s3-kept" else "0"
    args.cache = args.store if name == "disk" else url
    before, began = list(totals), time.perf_counter()
    found = run(args, args.gpus[0], "ddp" if args.gpus[0] > 1 else "one")
    seconds = time.perf_counter() - began
    requests, sent = (after - b for after, b in zip(totals, before, strict=True))
    return {
        "from": name,
        **found,
        "requests": requests,
        "sent_gb": sent / 1e9,
        "sent_mb_per_s": sent / 1e6 / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for the store and drafts")
    parser.add_argument("--shape", default="qwen3-4b", choices=SHAPES)
    parser.add_argument("--gpus", default=[2], type=lambda text: [int(text)])
    parser.add_argument("--runs", default=",".join(RUNS), help=f"of {', '.join(RUNS)}")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--log-every", type=int, default=5, help="steps of a timed window")
    parser.add_argument("--rows-per-step", type=int, default=8)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=1024, help="of a sample")
    parser.add_argument("--servers", type=int, default=max(2, (os.cpu_count() or 1) // 2))
    parser.add_argument("--train", default="", help="more flags of dspark-train")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.set_defaults(whole=False)  # a flag of scaling.py's own
    args = parser.parse_args()
    names = args.runs.split(",")
    if unknown := set(names) - set(RUNS):
        parser.error(f"--runs: {', '.join(sorted(unknown))}; expected some of {', '.join(RUNS)}")
    args.work.mkdir(parents=True, exist_ok=True)
    args.store = args.work / f"random-{args.shape}.zarr"
    if not args.store.exists():
        write_store(args.store, SHAPES[args.shape][0], args.samples, args.tokens)
    config = {k: str(v) for k, v in vars(args).items() if k not in ("work", "results", "store")}
    results: list[dict[str, Any]] = []
    with servers(args.store, args.servers) as (url, totals):
        for name in names:
            results.append(one(args, name, url, totals))
            first, last = results[0]["loss"], results[-1]["loss"]
            results[-1]["losses_equal_the_first_run"] = first == last
            # After every run, so that one that is cut short leaves what it measured.
            write("from_s3", config, results, args.results, show=len(results) == len(names))


if __name__ == "__main__":
    main()
