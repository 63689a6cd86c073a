"""What a store of many parts costs before its first sample: ``open``, ``info`` and the plan of a
training's first epoch, locally and from an S3 server on loopback.

    python bench/large_store.py [--parts 10000] [--samples 1000000]
        [--out bench/results/large_store.json]

Manifest, index and the target's files are real; the parts' folders are empty, for none of these
commands looks into them.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import zarr

import dspark.cache
from common import write
from dspark.cache.canonical import sealed
from dspark.cache.codec import registry
from dspark.cache.files.calibration import codec_info
from dspark.cache.files.layout import INDEX, INDEX_KEY, PARTS, ROOT_KEY, TARGET, part_name
from dspark.cache.files.metadata import write_attributes
from dspark.cache.files.place import place_of
from dspark.cache.manifest import Counts
from dspark.cache.parts.index import TURN, index_specs, index_sums
from dspark.cache.parts.part import write_array
from dspark.cache.target.files import write_target
from dspark.tools.stores.info import info
from dspark.train.data.stream import pack
from s3_server import BUCKET, s3_server
from stores import frozen, manifest


def make(path: Path, parts: int, samples: int) -> None:
    """A store of so many parts, as its writer leaves it, but for the parts' files."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(200, 2000, samples)
    stored = lengths // 3
    per_part = -(-samples // parts)
    index: dict[str, Any] = {
        "sample_start": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "sample_last_start": np.concatenate([[0], np.cumsum(stored)]).astype(np.int64),
        "sample_row": np.arange(samples, dtype=np.int64),
        TURN: np.zeros(samples, np.int32),
        "sample_key": rng.integers(0, 256, (samples, 16), np.uint8),
        "sample_supervised": (stored + 1).astype(np.int32),
        "part_first_sample": np.minimum(np.arange(parts + 1) * per_part, samples).astype(np.int64),
        "part_number": np.arange(parts, dtype=np.int64),
    }
    path.mkdir()
    m = manifest(codec=codec_info(registry.make("rotated-4-4")))
    sha = write_target(path / TARGET, frozen(), m.target.config, {})
    counts = Counts(
        parts=parts,
        samples=samples,
        tokens=int(lengths.sum()),
        supervised_tokens=int((stored + 1).sum()),
        last_rows=int(stored.sum()),
        rows_read=samples,
    )
    m = dataclasses.replace(
        m, target=dataclasses.replace(m.target, weights_sha256=sha), counts=counts, complete=True
    )
    zarr.create_group(path / PARTS, zarr_format=3)
    for i in range(parts):
        (path / PARTS / part_name(i)).mkdir()
    zarr.create_group(path / INDEX, zarr_format=3)
    for spec in index_specs(index):
        write_array(path / INDEX, spec, index[spec.name])
    about = {
        "part_crc32c": rng.integers(0, 2**32, parts).tolist(),
        "array_crc32c": index_sums(index),
        "bytes": {
            "aux_code": counts.tokens * 96,
            "last_code": counts.last_rows * 32,
            "": parts * 20000,
        },
    }
    write_attributes(path / INDEX, INDEX_KEY, sealed(about))
    write_attributes(path, ROOT_KEY, sealed(m.to_json()))


def measure(store: str) -> dict[str, float]:
    """Seconds, of cold objects of ours: the page cache is warm."""
    out = {}
    began = time.perf_counter()
    cache = dspark.cache.open(store)
    samples = len(cache)
    out["open"] = time.perf_counter() - began
    began = time.perf_counter()
    info(store)
    out["info"] = time.perf_counter() - began
    began = time.perf_counter()
    order = np.random.default_rng(0).permutation(samples)
    pack(order, cache.lengths, 4096)
    out["plan of an epoch"] = time.perf_counter() - began
    return {name: round(seconds, 3) for name, seconds in out.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", type=int, default=10000)
    parser.add_argument("--samples", type=int, default=1000000)
    parser.add_argument("--out", default="large_store")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made, s3_server() as proxy:
        local, remote = Path(made) / "hs.zarr", f"s3://{BUCKET}/hs.zarr"
        make(local, args.parts, args.samples)
        place = place_of(remote)
        for name in place_of(local).sizes(""):
            place.write(name, (local / name).read_bytes())
        proxy.count.clear()
        dspark.cache.open(remote).index  # noqa: B018
        requests = {"open": proxy.count.total()}
        proxy.count.clear()
        info(remote)
        requests["info"] = proxy.count.total()
        results = {"local": measure(str(local)), "remote": measure(remote), "requests": requests}
        write(args.out, {"parts": args.parts, "samples": args.samples}, results)


if __name__ == "__main__":
    main()
