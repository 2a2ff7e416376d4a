"""The model's dense products alone, in XLA and in PyTorch: the part of a step that no library above them can change."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from contenders import Sized
from turns import SETTLE, ratio

Shape = tuple[int, int, int]

XLA, TORCH = "XLA", "PyTorch"


def of_a_step(sizes: Sized) -> dict[Shape, int]:
    """How often a step multiplies `(tokens, in)` by `(in, out)`, forward and for the gradients of the inputs.

    Those of LoRA, of attention and of the classifier are left out.
    """
    tokens, width = sizes.batch * sizes.length, sizes.hidden
    wide = sizes.config().intermediate_size
    square = 8 * sizes.layers - 3  # below the first query, key and value nothing trains
    return {
        (tokens, width, width): square,
        (tokens, width, wide): 2 * sizes.layers,
        (tokens, wide, width): 2 * sizes.layers,
    }


def in_xla(shape: Shape) -> Callable[[], Any]:
    x, kernel = (jnp.asarray(values) for values in _operands(shape))
    program = jax.jit(jnp.matmul).lower(x, kernel).compile()
    return lambda: program(x, kernel).block_until_ready()


def in_torch(shape: Shape, on: str) -> Callable[[], Any]:
    import torch
    import torch_peft

    torch.set_num_threads(torch_peft.threads())
    x, kernel = (torch.tensor(values, device=on) for values in _operands(shape))

    def run() -> None:
        torch.mm(x, kernel)
        if on == "cuda":
            torch.cuda.synchronize()

    return run


def _operands(shape: Shape) -> Iterator[np.ndarray]:
    tokens, d_in, d_out = shape
    random = np.random.default_rng(0)
    for axes in ((tokens, d_in), (d_in, d_out)):
        yield random.standard_normal(axes, np.float32)


def products(sizes: Sized, rounds: int, on: str | None) -> dict[str, Any]:
    """Seconds that a step's products take, in turn; `on` is PyTorch's device, if it is there."""
    makers: dict[str, Callable[[Shape], Callable[[], Any]]] = {XLA: in_xla}
    if on is not None:
        makers[TORCH] = lambda shape: in_torch(shape, on)
    seconds: dict[str, list[float]] = {name: [0.0] * rounds for name in makers}
    for shape, count in of_a_step(sizes).items():
        runs = {name: make(shape) for name, make in makers.items()}
        for i in range(rounds):
            for name, run in runs.items():
                time.sleep(SETTLE)
                run()
                start = time.perf_counter()
                for _ in range(count):
                    run()
                seconds[name][i] += time.perf_counter() - start
    found: dict[str, Any] = {name: {"seconds": statistics.median(all_), "all": all_} for name, all_ in seconds.items()}
    if on is not None:
        found["ratio"] = ratio(seconds[XLA], seconds[TORCH])
    return found
