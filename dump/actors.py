"""``--ray N``: run the shards of a dump as tasks of a Ray cluster, which places them, assigns GPUs
and restarts them if they are killed.

Each task is one ``--shard I/N`` into the same store, so no row is stored twice, whatever Ray does:
a part is committed once, and a part that was unfinished when its process was killed has no record,
so only that part is redone by the next attempt. The store, the corpus and the target must be
reachable from every node.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.cache.errors import EngineError, UsageError

if TYPE_CHECKING:
    from dspark.dump.config import DumpConfig
    from dspark.dump.progress import Display

TRIES = -1  # as often as Ray has to
ADDRESS = "RAY_ADDRESS"


def dump(config: DumpConfig, show: Display) -> dict[str, Any]:
    """Run ``config.ray`` shards to their end; returns the report of the one that finished the
    store.
    """
    try:
        import ray
    except ImportError as error:
        raise UsageError("--ray needs the package ray: pip install 'dspark[ray]'") from error
    assert config.ray is not None
    own = not ray.is_initialized()
    if own:
        local = None if ADDRESS in os.environ else "local"
        ray.init(
            address=local, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR
        )
    try:
        gpus = gpus_of(config, ray.cluster_resources().get("GPU", 0))
        show.say(f"ray      {config.ray} dumps, {gpus} GPUs each, on {len(ray.nodes())} nodes")
        task = ray.remote(max_retries=TRIES, num_cpus=1, num_gpus=gpus)(run_shard)
        waiting = {task.remote(one): i for i, one in enumerate(shards(config))}
        out: dict[str, Any] = {}
        while waiting:
            done, _ = ray.wait(list(waiting))
            number = waiting.pop(done[0])
            found, failed = ray.get(done[0])
            if failed is not None:
                raise EngineError(f"shard {number}/{config.ray}: {failed}")
            show.say(
                f"shard {number}/{config.ray} has ended: the store has {found['parts']:,} parts"
            )
            out = found if found["complete"] or not out.get("complete") else out
        return out
    finally:
        if own:
            ray.shutdown()


def gpus_of(config: DumpConfig, there: float) -> int:
    """Return the number of GPUs per shard: what its engine is asked to use, else one; none with
    ``--device cpu`` or in a cluster without GPUs.
    """
    if config.device == "cpu" or (config.device == "auto" and not there):
        return 0
    return (config.tensor_parallel_size or 1) * (config.data_parallel_size or 1)


def shards(config: DumpConfig) -> list[DumpConfig]:
    """Return the dump of each task. Paths are absolute, and a lock whose holder shows no sign of
    life is taken over, since Ray knows that the holder is dead.
    """
    assert config.ray is not None
    output, calibration = (
        w.absolute() if isinstance(w, Path) else w for w in (config.output, config.calibration)
    )
    assert output is not None
    whole = dataclasses.replace(
        config,
        ray=None,
        break_lock=True,
        output=output,
        model=_absolute(config.model),
        data=tuple(map(_absolute, config.sources)) or None,
        calibration=calibration,
    )
    return [dataclasses.replace(whole, shard=f"{i}/{config.ray}") for i in range(config.ray)]


def _absolute(name: str) -> str:
    """Make ``name`` absolute; in ``FILE=SHARE``, the file."""
    file, sign, share = (name, "", "") if Path(name).exists() else name.rpartition("=")
    return f"{Path(file).absolute()}{sign}{share}" if file and Path(file).exists() else name


def run_shard(config: DumpConfig) -> tuple[dict[str, Any] | None, str | None]:
    """Run one shard in a process of the cluster; returns the report, or the message of an error
    that would recur on another attempt.
    """
    from dspark.cache.errors import DsparkError, Stopped
    from dspark.dump.progress import Display
    from dspark.dump.run import dump as run

    try:
        return run(config, Display()), None
    except Stopped:
        # Cancelled by the cluster, as when a node is drained. Ray retries tasks whose process is
        # gone, not tasks that failed.
        os._exit(1)
    except DsparkError as error:
        return None, str(error)
