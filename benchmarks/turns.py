"""Contenders that take their steps in turn in one process, and what each step took."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import math
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from steps import Training, Tree, flops, step_of

FULL = "full fine-tuning"
RATE, WEIGHT_DECAY = 1e-3, 1e-4  # of AdamW
SETTLE = 0.02  # seconds in which the threads of the contender before stop waiting for work

# What glibc should do with memory that is freed: keep it. Else it gives the temporaries of XLA's step back to the
# kernel, and gets them again as pages that are to be zeroed, in each step anew.
KEEP_MEMORY = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1)}


def adamw() -> optax.GradientTransformation:
    """The optimizer of all contenders."""
    return optax.adamw(RATE, weight_decay=WEIGHT_DECAY)


def size(tree: Tree) -> int:
    """Bytes of all leaves; shapes suffice."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def compiled(training: Training, inputs: Mapping[str, Any]) -> tuple[jax.stages.Compiled, dict[str, Any]]:
    """The step of AdamW, for shapes, with what can be said of it before it runs."""
    tx = adamw()
    state = jax.eval_shape(tx.init, training.trainable)
    step = jax.jit(step_of(training, tx), donate_argnums=(0, 1))
    start = time.perf_counter()
    traced = step.trace(training.trainable, state, training.frozen, inputs)
    after_trace = time.perf_counter()
    lowered = traced.lower()
    after_lower = time.perf_counter()
    program = lowered.compile()
    done = time.perf_counter()
    memory = program.memory_analysis()
    arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
    return program, {
        "flops": flops(lowered, program),
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": arguments,
        "output_bytes": outputs,
        "alias_bytes": memory.alias_size_in_bytes,
        "peak_bytes": arguments + outputs - memory.alias_size_in_bytes + memory.temp_size_in_bytes,
        "trace_seconds": after_trace - start,
        "lower_seconds": after_lower - after_trace,
        "compile_seconds": done - after_lower,
        "optimizer_bytes": size(state),
        "trained_parameters": sum(leaf.size for leaf in jax.tree.leaves(training.trainable)),
    }


class Taken(NamedTuple):
    """What a step took."""

    seconds: float
    processor_seconds: float  # of all cores together; what else runs on the machine hardly changes it
    system_seconds: float  # of these, in the kernel
    page_faults: int  # pages of memory that the process touched for the first time


@dataclasses.dataclass
class Contender:
    """Takes a step of training when it is asked to, waits for it, and returns the loss before it."""

    name: str
    step: Callable[[], float]
    figures: dict[str, Any]
    losses: list[float] = dataclasses.field(default_factory=list)

    def take(self) -> Taken:
        """A step."""
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        self.losses.append(self.step())
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        system = after.ru_stime - before.ru_stime
        return Taken(seconds, after.ru_utime - before.ru_utime + system, system, after.ru_minflt - before.ru_minflt)


def contender(
    name: str, built: tuple[jax.stages.Compiled, dict[str, Any]], trainable: Tree, frozen: Tree, batch: Tree
) -> Contender:
    """A contender whose step is what `compiled` made, on arrays."""
    program, figures = built
    held = trainable, adamw().init(trainable)

    def step() -> float:
        nonlocal held
        *held, loss = program(*held, frozen, batch)
        jax.block_until_ready(held)
        return float(loss)

    return Contender(name, step, figures)


def take_turns(contenders: Sequence[Contender], rounds: int) -> dict[str, dict[str, Any]]:
    """What a step takes, of contenders that take turns in one process.

    In its turn each waits until the threads of the one before sleep, and takes two steps, of which the second counts:
    the first finds the caches full of another's data.
    """
    taken: dict[str, list[Taken]] = {contender.name: [] for contender in contenders}
    for i in range(rounds + 1):
        first = i % len(contenders)  # nobody always runs after the same one
        for contender in [*contenders[first:], *contenders[:first]]:
            time.sleep(SETTLE)
            contender.take()
            taken[contender.name].append(contender.take())
    return {name: spread(steps[1:]) for name, steps in taken.items()}  # the first round warms up


def spread(steps: Sequence[Taken]) -> dict[str, Any]:
    """The median of each figure, the shortest and the longest step, and the seconds of all of them."""
    all_of = {field: [getattr(step, field) for step in steps] for field in Taken._fields}
    medians = {field: statistics.median(values) for field, values in all_of.items()}
    seconds = all_of["seconds"]
    return medians | {"shortest": min(seconds), "longest": max(seconds), "all": seconds}


def ratio(these: Sequence[float], those: Sequence[float]) -> dict[str, float]:
    """The median of the ratios turn by turn, and the quartiles, between which half of them lie."""
    ratios = [a / b for a, b in zip(these, those, strict=True)]
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return {"median": float(middle), "low": float(low), "high": float(high)}


def require_same_losses(contenders: Sequence[Contender], tolerance: float) -> float:
    """The largest difference from the first contender, of the losses before training and after a step.

    Full fine-tuning starts with the same loss, and goes elsewhere.

    Raises:
      AssertionError: it is above the tolerance: these do not compute the same, and their times say nothing.
    """
    first, worst = contenders[0], 0.0
    for contender in contenders[1:]:
        steps = 1 if contender.name == FULL else 2
        for mine, its in zip(first.losses[:steps], contender.losses[:steps], strict=True):
            difference = abs(mine - its)
            if not difference <= tolerance or not math.isfinite(difference):
                raise AssertionError(
                    f"losses differ: {first.name} {first.losses[:steps]}, {contender.name} {contender.losses[:steps]}."
                )
            worst = max(worst, difference)
    return worst


def keep_memory() -> bool:
    """Tells glibc to; whether there is one and it took it. To be called before the first array."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return all([mallopt(parameter, value) for parameter, value in KEEP_MEMORY.values()])


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
