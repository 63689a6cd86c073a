"""What is safe when a training stops: printed when a signal ends it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dspark.cache.errors import Stopped
from dspark.train.run import checkpoint, folder


def saved_in(output: Path, *, resume: bool = True) -> Callable[[], str]:
    """Return what is safe of a training in ``output``. Without ``resume``, a training that exists
    when this is called is another one.
    """
    before = folder.identity(output)

    def safe() -> str:
        if (output / folder.CLEARING).exists():
            return f"The training at {output} is partly deleted. Use --overwrite again."
        if not resume and before is not None and folder.identity(output) == before:
            return f"The training at {output} is unchanged."
        whole = checkpoint.found(output / "checkpoints")
        if not whole:
            return "No step was saved."
        step = int(whole[-1].name.removeprefix("step_"))
        return f"Step {step} is saved in {whole[-1]}. Rerun the same command with --resume."

    return safe


@contextmanager
def interrupted(safe: Callable[[], str]) -> Iterator[None]:
    """Convert a KeyboardInterrupt outside the steps to Stopped."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Stopped(f"stopped. {safe()}") from error
