"""Steps of training as programs: what they cost when compiled, how long they take to trace, and how that is told.

"traced" is the processor time that `jax.make_jaxpr` takes for the loss, and for the loss with its gradient. CPython
keeps its frames in chunks, and a call that happens to cross from one chunk to the next is slow, so that the same trace
takes half as long again from one place of the stack as from another. The runs are therefore spread over a whole chunk;
the variants take turns, and medians are compared.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from rich.console import Console
from rich.table import Table

Tree = Any

CHUNK = 128  # frames of `deeper` in one of CPython's stack chunks: 16 KiB of frames of 128 bytes
SAME_COST = 1.001  # of the hand-written step's FLOPs
SAME_MEMORY = 1.03  # of its temporary memory, which XLA assigns otherwise in each release
OF_FULL = 0.68  # of full fine-tuning's FLOPs, with LoRA on every Dense
TRACING = 1.15  # of the bare backbone's tracing time


@dataclasses.dataclass(frozen=True)
class Training:
    """`loss(trainable, frozen, batch)`, and the parameters that it takes, as shapes or arrays."""

    loss: Callable[[Tree, Tree, Mapping[str, Any]], jax.Array]
    trainable: Tree
    frozen: Tree


def step_of(training: Training, tx: optax.GradientTransformation) -> Callable[..., tuple[Tree, Tree, jax.Array]]:
    """One step of training: new trainable parameters, new state, loss."""

    def step(trainable: Tree, state: Tree, frozen: Tree, batch: Mapping[str, Any]) -> tuple[Tree, Tree, jax.Array]:
        loss, grads = jax.value_and_grad(training.loss)(trainable, frozen, batch)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss

    return step


def lower(training: Training, inputs: Mapping[str, Any]) -> jax.stages.Lowered:
    """One step of AdamW, for shapes."""
    tx = optax.adamw(1e-3)
    state = jax.eval_shape(tx.init, training.trainable)
    return jax.jit(step_of(training, tx)).lower(training.trainable, state, training.frozen, inputs)


def cost(training: Training, inputs: Mapping[str, Any]) -> dict[str, float]:
    """FLOPs and bytes of temporary memory of the compiled step."""
    lowered = lower(training, inputs)
    compiled = lowered.compile()
    return {"flops": flops(lowered, compiled), "temp": compiled.memory_analysis().temp_size_in_bytes}


def flops(lowered: jax.stages.Lowered, compiled: jax.stages.Compiled) -> float:
    """Those of the program. Off the CPU, XLA does not count products that it hands to libraries.

    There, the program counts as it is before it is compiled, if jax says something of that.
    """
    before = None if jax.default_backend() == "cpu" else lowered.cost_analysis()
    counted: Any = before or compiled.cost_analysis()
    found: float = counted["flops"]
    return found


def tracing_times(
    variants: Mapping[str, Training], inputs: Mapping[str, Any], runs: int
) -> dict[str, dict[str, float]]:
    """Median seconds to trace the loss, and the loss with its gradient. The variants take turns."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"forward": [], "gradient": []} for name in variants}
    for run in range(-1, runs):
        for name, training in variants.items():
            for what in ("forward", "gradient"):
                gc.collect()
                gc.disable()
                start = time.process_time()
                deeper(
                    max(run, 0) * CHUNK // runs, lambda t=training, w=what: trace(t, inputs, gradient=w == "gradient")
                )
                if run >= 0:  # the first fills caches inside jax
                    seconds[name][what].append(time.process_time() - start)
                gc.enable()
    return {name: {what: statistics.median(times) for what, times in kinds.items()} for name, kinds in seconds.items()}


def trace(training: Training, inputs: Mapping[str, Any], gradient: bool) -> Any:
    """The jaxpr of the loss. A fresh function each time: a cached trace would take no time."""

    def loss(*arguments: Any) -> jax.Array:
        return training.loss(*arguments)

    return jax.make_jaxpr(jax.value_and_grad(loss) if gradient else loss)(training.trainable, training.frozen, inputs)


def deeper(frames: int, call: Callable[[], Any]) -> Any:
    """Makes a call from further up the stack."""
    return deeper(frames - 1, call) if frames else call()


# --- the report


@dataclasses.dataclass(frozen=True)
class Figure:
    """One line of the report."""

    what: str
    value: float
    unit: str = ""
    goal: float | None = None

    @property
    def reached(self) -> bool | None:
        return None if self.goal is None else self.value <= self.goal


def report(figures: Sequence[Figure], console: Console) -> None:
    table = Table("figure", "", "goal", "reached")
    for column in table.columns[1:3]:
        column.justify = "right"
    for figure in figures:
        goal = "" if figure.goal is None else f"≤ {figure.goal:g}"
        reached = {None: "", True: "[green]yes[/]", False: "[red]no[/]"}[figure.reached]
        value = f"{figure.value:.2e}" if 0 < figure.value < 1e-3 else f"{figure.value:,.4f}"
        table.add_row(figure.what, f"{value} {figure.unit}".strip(), goal, reached)
    console.print(table)


def write(file: Path, sizes: Any, figures: Sequence[Figure]) -> None:
    """Writes the figures, and what they are of."""
    content = {
        "sizes": dataclasses.asdict(sizes),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "figures": [{**dataclasses.asdict(figure), "reached": figure.reached} for figure in figures],
    }
    file.write_text(json.dumps(content, indent=2) + "\n")
