"""The settings of a training run: one frozen dataclass, validated on construction, saved beside the
draft and compared on resume.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dspark.cache.errors import MismatchError, UsageError
from dspark.cache.files.urls import refuse_url
from dspark.train.draft import scaling, sight
from dspark.train.draft.config import DraftConfig

# Fields that may differ between a run and its resumption: they say where and how, not what is
# computed.
FREE_ON_RESUME = {
    "cache",
    "caches",
    "output",
    "device",
    "workers",
    "log_every",
    "checkpoint_freq",
    "tensorboard",
    "logger",
    "keep_checkpoints",
    "compile",
    "strategy",
    "activation_checkpointing",
    "recipe",
    "val_walk_rows",
    "select",
}

# The first is taken where none is given.
STRATEGIES = ("zero", "ddp", "fsdp2")
SCHEDULES = ("cosine", "linear", "wsd", "constant")
SELECT = ("last", "walk", "walk_greedy", "mean_accepted_length")

MOST_PASSES = 1000
LOGGERS = ("tensorboard", "wandb", "mlflow", "trackio")

# Settings of earlier releases at the values that changed nothing: a run with them continues.
WITHDRAWN = (("ema", 0.0), ("slot_weights", "decay"), ("noise_std", 0.0))


@dataclass(frozen=True, slots=True)
class Number:
    """The allowed values of a numeric setting, in words and as a test. NaN is refused, and infinity
    is allowed only where it has a meaning.
    """

    words: str
    holds: Callable[[float], bool]
    whole: bool = False
    endless: bool = False

    def allows(self, value: object) -> bool:
        kinds = int if self.whole else int | float
        if isinstance(value, bool) or not isinstance(value, kinds):
            return False
        return (isinstance(value, int) or self.endless or math.isfinite(value)) and self.holds(
            value
        )


COUNT = Number("a positive whole number", lambda n: n > 0, whole=True)
COUNT_OR_0 = Number("a whole number, 0 or more", lambda n: n >= 0, whole=True)
POSITIVE = Number("a positive number", lambda x: x > 0)
# no clipping, no decay
POSITIVE_OR_INF = Number("a positive number or inf", lambda x: x > 0, endless=True)
NOT_NEGATIVE = Number("a number, 0 or more", lambda x: x >= 0)
SHARE = Number("a share in [0, 1)", lambda x: 0 <= x < 1)
# still finite when multiplied by the number of steps
EPOCHS = Number("a positive number, at most 1e9", lambda x: 0 < x <= 1e9)
SEED = Number(
    "a whole number of 32 bits", lambda n: abs(n) < 1 << 32, whole=True
)  # the generators' limit

# Every numeric setting. One whose default is None may be None.
NUMBERS = {
    "epochs": EPOCHS,
    "max_steps": COUNT,
    "lr": POSITIVE,
    "min_lr_ratio": SHARE,
    "warmup_ratio": SHARE,
    "weight_decay": NOT_NEGATIVE,
    "grad_clip": POSITIVE_OR_INF,
    "total_seq_len": COUNT,
    "rows_per_step": COUNT,
    "max_anchors": COUNT_OR_0,
    "num_layers": COUNT,
    "num_heads": COUNT,
    "num_kv_heads": COUNT,
    "head_dim": COUNT,
    "intermediate_size": COUNT,
    "sliding_window": COUNT_OR_0,
    "block_size": COUNT,
    "markov_rank": COUNT_OR_0,
    "draft_vocab_size": COUNT,
    "confidence_head_alpha": NOT_NEGATIVE,
    "decay": POSITIVE_OR_INF,
    "val_fraction": SHARE,
    "val_rows": COUNT,
    "val_walk_rows": COUNT_OR_0,
    "checkpoint_freq": EPOCHS,
    "keep_checkpoints": COUNT,
    "seed": SEED,
    "workers": COUNT_OR_0,
    "log_every": COUNT,
}

_DRAFT: dict[str, Any] = {
    f.name: f.default for f in dataclasses.fields(DraftConfig)
}  # a draft's defaults are stated there


def with_passes(given: str) -> tuple[str, float]:
    """``PATH`` or ``PATH=PASSES`` of ``--cache``. Raises UsageError if the passes are not a
    positive number.
    """
    path, equals, number = given.rpartition("=")
    try:
        passes = float(number)
    except ValueError:  # an = in a path
        return given, 1.0
    if not equals or not path:
        return given, 1.0
    if not (0 < passes <= MOST_PASSES):
        raise UsageError(
            f"--cache {given}: {number} passes per epoch; expected a number above 0, at most "
            f"{MOST_PASSES}"
        )
    return path, passes


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Defaults are those of the published DSpark recipes where they agree (lr, warm-up, anchors,
    layers, rank).
    """

    cache: str
    """The store, or the first of several."""
    caches: tuple[str, ...] = ()
    """Every store, as ``--cache`` had it, where there are several or one has passes: ``PATH`` or
    ``PATH=PASSES`` per epoch.
    """
    output: str = "./draft"
    epochs: float = 3.0
    max_steps: int | None = None
    """Optimizer steps in all; also the length of the schedule. None: ``epochs`` of them."""
    lr: float = 6e-4
    min_lr_ratio: float = 0.0
    """Learning rate at the end of the schedule, as a share of ``lr``."""
    lr_schedule: str = "wsd"
    """How the rate falls after the warm-up: ``cosine``, ``linear``, ``wsd`` (over the last fifth)
    or ``constant`` (not at all).
    ``wsd`` gave 7.6 % more walk than cosine at equal steps, three paired seeds
    (docs/log/2026-11-26-wsd.md).
    """
    warmup_ratio: float = 0.04
    optimizer: str = "adamw"
    """``adamw``, or ``muon``: orthogonal steps for the matrices of the layers and ``fc``, AdamW for
    the rest. Measured on SmolLM2 only, 1,200 steps of each: tau 3.3 with muon at ``lr`` 2e-3, 2.1
    with adamw at 1e-3 (docs/log/2026-11-22-muon.md).
    """
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    total_seq_len: int | None = None
    """Tokens of a packed row. None: 4096, or the store's sequence length if that is longer."""
    rows_per_step: int = 8
    """Packed rows of an optimizer step, over all ranks: the same step on any number of them; rows
    beyond one per rank accumulate.
    """
    max_anchors: int = 512
    """Anchors drawn per row; 0 = every eligible one."""
    speculator_type: str = _DRAFT["speculator_type"]
    layers: tuple[int, ...] | None = None
    """Which of the store's layers the draft reads, as outputs of decoder layer i. None: what its
    type reads (``cache.target.taps``).
    """
    num_layers: int = _DRAFT["num_layers"]
    num_heads: int | None = None
    """Of a draft layer, as the next three. None: derived from the target
    (``cache.target.shape``).
    """
    num_kv_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    sliding_window: int | None = None
    """Tokens that a query of a sliding layer sees, itself among them. None or 0: all layers attend
    fully.
    """
    layer_types: tuple[str, ...] = ()
    """Per layer ``sliding_attention`` or ``full_attention``. (): with a window all sliding."""
    rope_scaling: str | None = None
    """JSON of what scales RoPE (``train/draft/scaling.py``). None or ``none``: nothing."""
    block_size: int = _DRAFT["block_size"]
    markov_rank: int = _DRAFT["markov_rank"]
    markov_head_type: str = _DRAFT["markov_head_type"]
    draft_vocab_size: int | None = None
    loss_fn: str = '{"ce": 0.1, "kl": 0.3, "l1": 0.6}'
    """JSON weights of ``ce``, ``kl`` and ``l1`` (= 2 TV) or ``tv`` (= l1 / 2);
    ``ObjectiveConfig.from_json`` reads it. Measured on SmolLM2 only, at equal time: 6.2 ± 0.3 %
    more walk than the published ``{"ce": 0.1, "l1": 0.9}``
    (docs/log/2026-11-26-equal-time-three-seeds.md).
    """
    confidence_head_alpha: float = 1.0
    decay: float = 4.0
    """Slot k weighs exp(-k / decay)."""
    val_fraction: float = 0.05
    """Share of prompts (by hash) held out."""
    val_rows: int = 64
    """Packed rows of the held-out samples that a validation reads, at most; ``dspark-tools score``
    reads them all.
    """
    val_walk_rows: int = 8
    """Of these rows, how many the walk is computed on (``objective/walk.py``): at every anchor, so
    a multiple of their cost. 0: none.
    """
    select: str = "last"
    """Which draft is exported: that of the ``last`` milestone, or of the one with the highest
    ``walk``, ``walk_greedy`` or ``mean_accepted_length`` in validation.
    """
    checkpoint_freq: float = 1.0
    """Epochs between checkpoints and validations; 0.25 = four per epoch."""
    keep_checkpoints: int = 2
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    """Of the forward and backward pass: bfloat16 on cuda, float32 on cpu. Master weights are always
    float32.
    """
    workers: int | None = None
    """Processes that read the store, for each rank. None: 0 on cpu; on cuda a rank's share of the
    cores less one, 8 at most.
    """
    log_every: int = 10
    tensorboard: bool = True
    logger: tuple[str, ...] = ()
    """Loggers besides TensorBoard, of ``LOGGERS``."""
    compile: bool | None = None
    """torch.compile the backbone. None: on cuda, for types that gain by it. Rows are then padded to
    one shape.
    """
    activation_checkpointing: bool = False
    """Keep only the input of each draft layer for the backward pass and compute the rest again:
    less memory per row, more time.
    """
    strategy: str | None = None
    """Of several processes: ``zero`` (a rank holds the draft, and a share of masters and moments),
    ``ddp`` (all) or ``fsdp2`` (a share of all between steps, torch's). None: zero, the fastest and
    the smallest (docs/log/2026-11-22-two-gpus.md).
    """
    init_from: str | None = None
    """Folder of a draft whose tensors this one begins with (``train/draft/saved/warm.py``). None:
    random ones.
    """
    recipe: str | None = None
    """Name of the recipe that the settings came from; for the record, since the settings themselves
    are above.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, expected = getattr(self, field.name), NUMBERS.get(field.name)
            if expected is None or (value is None and field.default is None):
                continue
            if not expected.allows(value):
                raise UsageError(f"{field.name} is {value!r}, expected {expected.words}")
        pair = isinstance(self.betas, tuple) and len(self.betas) == 2
        if not (pair and all(SHARE.allows(beta) for beta in self.betas)):
            raise UsageError(f"betas are {self.betas}, expected two numbers in [0, 1)")
        if unknown := sorted(set(self.logger) - set(LOGGERS)):
            raise UsageError(f"--logger {unknown[0]}: expected {', '.join(LOGGERS)}")
        if self.layers is not None and list(self.layers) != sorted(set(self.layers)):
            raise UsageError(
                f"--layers {','.join(map(str, self.layers))}: expected each layer once, in "
                "ascending order"
            )
        if self.strategy not in (None, *STRATEGIES):
            raise UsageError(f"strategy is {self.strategy!r}, expected {', '.join(STRATEGIES)}")
        if self.lr_schedule not in SCHEDULES:
            raise UsageError(
                f"lr_schedule is {self.lr_schedule!r}, expected {', '.join(SCHEDULES)}"
            )
        if self.select not in SELECT:
            raise UsageError(f"select is {self.select!r}, expected {', '.join(SELECT)}")
        if self.select != "last" and not (
            self.val_fraction and (self.val_walk_rows or "walk" not in self.select)
        ):
            raise UsageError(
                f"--select {self.select} needs validation: set --val-fraction above 0, and "
                "--val-walk-rows for a walk"
            )
        _ = self.attention, self.stores  # refuse
        refuse_url(self.output, "--output")
        if self.optimizer not in ("adamw", "muon"):
            raise UsageError(f"optimizer is {self.optimizer!r}, expected adamw or muon")

    @property
    def stores(self) -> tuple[tuple[str, float], ...]:
        """Path and passes per epoch of every store."""
        return tuple(map(with_passes, self.caches)) or ((self.cache, 1.0),)

    @property
    def attention(self) -> dict[str, Any]:
        """What a draft is sized with beside its layers' widths (``DraftConfig.sized_for``)."""
        scaled = None if self.rope_scaling is None else scaling.parse(self.rope_scaling)
        return {
            "sliding_window": self.sliding_window or None,
            "layer_types": sight.layer_kinds(self.layer_types, "--layer-types")
            if self.sliding_window != 0
            else (),
            "rope_scaling": scaled,
        }

    @property
    def of_several(self) -> str:
        """The strategy, given or not, that several processes take."""
        return self.strategy or STRATEGIES[0]

    @property
    def loggers(self) -> tuple[str, ...]:
        """Every logger of the run, each once."""
        return tuple(dict.fromkeys((*(("tensorboard",) if self.tensorboard else ()), *self.logger)))

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {
            "betas": list(self.betas),
            "logger": list(self.logger),
            "layer_types": list(self.layer_types),
            "caches": list(self.caches),
            "layers": None if self.layers is None else list(self.layers),
        }

    def flags(self) -> dict[str, Any]:
        """The settings under the names of their flags, as ``--config`` takes them back."""
        out = self.to_json()
        kinds = ",".join(self.layer_types) or None
        return out | {"cache": out.pop("caches") or [self.cache], "layer_types": kinds}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> TrainConfig:
        from dspark.cache.typed_json import wrong_type

        known = {f.name for f in dataclasses.fields(cls)}
        data = {k: v for k, v in data.items() if k in known or (k, v) not in WITHDRAWN}
        if unknown := set(data) - known:
            raise UsageError(f"{where}: unknown keys {sorted(unknown)}")
        if "cache" not in data:
            raise UsageError(f"{where} names no cache; expected the settings of a training")
        if wrong := wrong_type(cls, data):
            raise UsageError(f"{where}: {wrong}")
        lists = ("betas", "caches", "logger", "layers", "layer_types")
        data |= {k: tuple(data[k]) for k in lists if isinstance(data.get(k), list)}
        try:
            return cls(**data)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from error

    def continues(self, earlier: TrainConfig, where: str) -> None:
        """Raise MismatchError, naming every difference, unless this run goes on with
        ``earlier``.
        """
        a, b = earlier.to_json(), self.to_json()
        a["passes"], b["passes"] = ([n for _, n in config.stores] for config in (earlier, self))
        diffs = [
            f"{k}: {a[k]!r} there, {b[k]!r} now"
            for k in a
            if k not in FREE_ON_RESUME and a[k] != b[k]
        ]
        if diffs:
            raise MismatchError(
                f"{where} was trained with other settings: "
                + "; ".join(diffs)
                + ". Use those, or another --output."
            )
