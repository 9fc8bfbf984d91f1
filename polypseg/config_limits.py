"""Which values the settings may take."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from deqsolvers.backward import BACKWARDS
from deqsolvers.hypersolver.losses import UNROLLS
from polypseg.data.groups import compile_group

if TYPE_CHECKING:
    from polypseg.config import Config

ENCODERS = ("b0", "b1", "b2", "b3", "b4", "b5")
SEGFORMERS = tuple(f"segformer-{size}" for size in ENCODERS)  # these have an explicit phase only
MODELS = ("polypdeq-add", "polypdeq-res", "mdeq", *SEGFORMERS)
CLASSES = (1, 3)
TRAIN_ON = ("split", "all")
PRECISIONS = ("fp32", "bf16", "fp16")
INITIALIZERS = ("zero", "convolution", "deep")
CLASSIC_SOLVERS = ("picard", "anderson", "broyden")
LARGEST_SEED = 2**63 - 1  # torch takes no larger one everywhere


def out_of_range(config: Config) -> list[str]:
    """One text for every setting whose value is not possible."""
    faults = []

    def check(fine: bool, name: str, value: Any, wanted: str) -> None:
        if not fine:
            faults.append(f"{name} must be {wanted}, got {value!r}")

    def one_of(name: str, value: str, known: Iterable[str]) -> None:
        check(value in known, name, value, f"one of {', '.join(known)}")

    one_of("model.name", config.model.name, MODELS)
    one_of("model.encoder", config.model.encoder, ENCODERS)
    check(config.model.classes in CLASSES, "model.classes", config.model.classes, "1 or 3")
    one_of("data.train_on", config.data.train_on, TRAIN_ON)
    one_of("explicit.precision", config.explicit.precision, PRECISIONS)
    one_of("implicit.precision", config.implicit.precision, PRECISIONS)
    one_of("implicit.solver", config.implicit.solver, CLASSIC_SOLVERS)
    one_of("hyper.initializer", config.hyper.initializer, INITIALIZERS)
    one_of("hyper.mode", config.hyper.mode, UNROLLS)
    one_of("implicit.backward", config.implicit.backward, BACKWARDS)
    if config.data.group:
        try:
            compile_group(config.data.group)
        except ValueError as error:
            faults.append(f"data.{error}")
    size = config.data.size
    check(size > 0 and size % 32 == 0, "data.size", size, "a positive multiple of 32")
    scales = config.data.scales
    finite = all(math.isfinite(s) and s > 0 for s in scales)
    check(finite, "data.scales", scales, "positive and finite")
    check(bool(scales), "data.scales", scales, "at least one number")
    for name, phase in (
        ("explicit", config.explicit),
        ("implicit", config.implicit),
        ("hyper", config.hyper),
        ("solve", config.solve),
        ("data", config.data),
        ("model", config.model),
    ):
        for key, value in vars(phase).items():
            if key == "workers":
                check(value >= -1, f"{name}.{key}", value, "at least -1")
            elif key in ("warm_epochs", "rank", "alternate"):
                check(value >= 0, f"{name}.{key}", value, "at least 0")
            elif isinstance(value, int):
                check(value >= 1, f"{name}.{key}", value, "at least 1")
            elif isinstance(value, float) and not math.isfinite(value):
                check(False, f"{name}.{key}", value, "a finite number")
            elif key == "clip":
                check(value > 0, f"{name}.{key}", value, "above 0")
            elif key in ("warmup", "ema", "jacobian_share"):
                check(0 <= value <= 1, f"{name}.{key}", value, "between 0 and 1")
            elif isinstance(value, float):
                check(value >= 0, f"{name}.{key}", value, "at least 0")
    for name, network in (("explicit", config.explicit), ("implicit", config.implicit)):
        parts, batch = network.accumulate, network.batch
        whole = f"a divisor of {name}.batch, {batch}"
        check(parts < 1 or batch % parts == 0, f"{name}.accumulate", parts, whole)
    fine = 0 <= config.seed <= LARGEST_SEED
    check(fine, "seed", config.seed, f"between 0 and {LARGEST_SEED} (2**63 - 1)")
    return faults
