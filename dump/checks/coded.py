"""Check, before anything is written, that the path the dump uses returns the states that the
self-check saw. ``states.py`` checks states that an engine returns one sample at a time. A dump uses
another path: whole batches, which a vLLM worker gathers and codes itself. So the same samples take
that path once, with the store's own codec; no other check would notice a wrong column or row. This
also compiles what an engine compiles at its first coded batch (8 s for vLLM's worker on an H100).

With ``--regenerate``, states come from the run that answers (``Engine.answer``): the gathering and
coding are the same, but the choice of rows differs and is not checked here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from dspark.cache.codec.base import Tokens, axis_of, tokens_of
from dspark.cache.errors import EngineError
from dspark.dump.checks.states import NOTHING_WRITTEN
from dspark.dump.engines.engine import CodedStates, States

if TYPE_CHECKING:
    import torch

    from dspark.cache.codec.base import Codec
    from dspark.cache.records import TokenSample
    from dspark.dump.engines.engine import Captured, Engine

# Median over a sample's tokens, of the difference over the size of a token's state in one layer.
# Batches of other shapes round differently, by a percent or two, which coarse cells raise to up to
# a quarter; another layer's or token's states differ by 1 or more. Not a norm over the sample: one
# massive token would hide all others.
TOLERANCE = 0.5


def check_coded(
    engine: Engine,
    samples: Sequence[TokenSample],
    states: Sequence[States],
    codec: Codec,
    layers: Sequence[int],
) -> None:
    """Check that ``engine.stream`` returns the coded ``states`` of ``samples``; raises EngineError
    with the sample and the layer. Decoded states are compared token by token, for each of
    ``layers`` and for the last state.
    """
    import torch

    missing = set(range(len(samples)))
    embedding = engine.frozen().embed_tokens if codec.needs_tokens else None

    def known(members: Sequence[int], device: torch.device) -> Tokens | None:
        if embedding is None:
            return None
        return tokens_of([samples[i] for i in members], embedding.to(device))

    with torch.inference_mode():
        for captured in engine.stream(iter([list(samples)]), codec):
            for i, streamed in _by_sample(captured, states, codec, known):
                if i not in missing:
                    raise _failed(engine, f"its stream returned the states of sample {i} twice")
                missing.remove(i)
                want = as_stored(codec, states[i], known([i], states[i].aux.device))
                off = [_off(streamed.aux[:, k], want.aux[:, k]) for k in range(len(layers))]
                for layer, by in zip(
                    [*layers, "last"], [*off, _off(streamed.last, want.last)], strict=True
                ):
                    if not by <= TOLERANCE:
                        raise _failed(
                            engine,
                            f"the coded states of sample {i}, layer {layer}, differ from its "
                            f"states by {by:.2f} (relative, median over tokens), expected at "
                            f"most {TOLERANCE}",
                        )
    if missing:
        raise _failed(engine, f"its stream returned no states for samples {sorted(missing)}")


def _by_sample(
    captured: Captured,
    states: Sequence[States],
    codec: Codec,
    known: Callable[[Sequence[int], torch.device], Tokens | None],
) -> Iterator[tuple[int, States]]:
    """Yield the samples of a batch with their states as a store would return them."""
    import torch

    given = captured.states() if callable(captured.states) else captured.states
    if captured.ready is not None:
        captured.ready.synchronize()
    hidden = states[0].aux.shape[-1]
    members = list(captured.members)
    rows = [len(states[i].aux) for i in members], [len(states[i].last) for i in members]
    specs = codec.arrays(*states[0].aux.shape[1:])
    counts = {"token": sum(rows[0]), "last": sum(rows[1])}
    if isinstance(given, CodedStates):
        sizes = {name: len(x) for name, x in given.arrays.items() if axis_of(name) != "exact"}
    else:
        sizes = {"aux": len(given.aux), "last_": len(given.last)}
    if any(n != counts[axis_of(name)] for name, n in sizes.items()):
        raise EngineError(
            f"self-check failed: the engine's stream returned {sizes} rows for samples "
            f"{members}, expected {counts}. {NOTHING_WRITTEN}"
        )
    if isinstance(given, CodedStates):
        coded = {n: torch.from_numpy(a) for n, a in given.arrays.items()}
        assert set(coded) >= set(specs), (sorted(coded), sorted(specs))
        found = States(*codec.decode(coded, hidden, known(members, torch.device("cpu"))))
    else:
        found = as_stored(codec, given, known(members, given.aux.device))
    yield from zip(members, map(States, *map(torch.split, found, rows)), strict=True)


def as_stored(codec: Codec, states: States, tokens: Tokens | None = None) -> States:
    """Return ``states`` as a store with ``codec`` would return them."""
    hidden = states.aux.shape[-1]
    return States(*codec.decode(codec.encode(*states, tokens), hidden, tokens))


def by_state(found: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Relative size of each state's difference, for states [..., H]: float32 [...]."""
    found, want = found.float(), want.float().to(found.device)
    out: torch.Tensor = (found - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-6)
    return out


def _off(found: torch.Tensor, want: torch.Tensor) -> float:
    """Median relative difference of states [T, H]; 0 if there are none."""
    return float(by_state(found, want).quantile(0.5)) if len(want) else 0.0


def _failed(engine: Engine, what: str) -> EngineError:
    return EngineError(f"self-check of the {engine.name} engine failed: {what}. {NOTHING_WRITTEN}")
