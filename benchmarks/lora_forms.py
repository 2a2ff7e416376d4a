"""What LoRA on one Dense costs, forward and backward, beside the frozen Dense: as in the textbook, and through jdelta.

    python benchmarks/lora_forms.py                       # about two minutes
    python benchmarks/lora_forms.py --rounds 100 --json figures.json

The programs run in turn in one process, and a ratio is the median of the ratios within a turn. FLOPs are XLA's count,
and exact. The gradients are those of the input and of LoRA's two leaves, in float32. jdelta chooses its form from the
shapes while the program is traced: see jdelta/core/products.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from rich.console import Console
from rich.table import Table

import jdelta
from jdelta.core.products import fusing_is_cheaper

SHAPES = [  # tokens, d_in, d_out, rank
    (256, 384, 384, 8),
    (2048, 384, 384, 4),
    (2048, 384, 1536, 4),
    (256, 768, 768, 8),
    (512, 768, 768, 8),
    (1024, 768, 768, 8),
    (2048, 768, 768, 8),
    (2048, 768, 768, 32),
    (8192, 768, 768, 8),
    (2048, 768, 3072, 8),
    (2048, 3072, 768, 8),
]


def compiled(tokens: int, d_in: int, d_out: int, rank: int) -> tuple[dict[str, Any], tuple]:
    """The steps, compiled, and their arguments."""
    x, g = (jax.random.normal(jax.random.key(i), (tokens, d)) for i, d in enumerate((d_in, d_out)))
    module = nn.Sequential([nn.Dense(d_out)])
    backbone = jdelta.Backbone(module, module.init(jax.random.key(2), x)["params"], dummy_inputs=(x,))
    scale = jdelta.LoraModel(backbone, modified_modules=["layers_0"], lora_r=rank).config.scale_of("layers_0")
    frozen = {key: leaf for key, leaf in backbone.params["layers_0"].items() if key != "lora"}
    own = jax.tree.map(lambda leaf: leaf + 0.01, backbone.params["layers_0"]["lora"])

    def dense(x: jax.Array, own: Any, frozen: Any) -> jax.Array:
        return x @ frozen["kernel"] + frozen["bias"]

    def textbook(x: jax.Array, own: Any, frozen: Any) -> jax.Array:
        return dense(x, own, frozen) + scale * (x @ own["a"]) @ own["b"]

    def attached(x: jax.Array, own: Any, frozen: Any) -> jax.Array:
        return backbone(x, params={"layers_0": {**frozen, "lora": own}})

    def step(forward: Callable, trains: int) -> Callable:
        def run(x: jax.Array, own: Any, frozen: Any, g: jax.Array) -> Any:
            inputs = (x, own)[:trains]
            y, pull = jax.vjp(lambda *inputs: forward(*(*inputs, own)[:2], frozen), *inputs)
            return y, pull(g)

        return run

    arguments = (x, own, frozen, g)
    steps = {"frozen": step(dense, 1), "textbook": step(textbook, 2), "jdelta": step(attached, 2)}
    return {name: jax.jit(run).lower(*arguments).compile() for name, run in steps.items()}, arguments


def measure(shape: tuple[int, int, int, int], rounds: int) -> dict[str, Any]:
    """The figures of one shape."""
    steps, arguments = compiled(*shape)
    outputs = {name: run(*arguments) for name, run in steps.items()}
    error = max(
        float(jnp.abs(one - other).max() / jnp.abs(other).max())
        for one, other in zip(*(jax.tree.leaves(outputs[name]) for name in ("jdelta", "textbook")), strict=True)
    )
    assert error < 1e-5, f"{shape}: differs from the textbook's by {error:.1e} of the largest entry"
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, run in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            seconds[name].append(time.perf_counter() - start)
    flops = {name: (run.cost_analysis() or {}).get("flops", float("nan")) for name, run in steps.items()}
    figures: dict[str, Any] = dict(zip(("tokens", "d_in", "d_out", "rank"), shape, strict=True))
    figures |= {"form": "fused" if fusing_is_cheaper(*shape[:3]) else "added", "error": error}
    figures["frozen, milliseconds"] = 1e3 * statistics.median(seconds["frozen"])
    for name in ("textbook", "jdelta"):
        ratios = [one / other for one, other in zip(seconds[name], seconds["frozen"], strict=True)]
        figures[f"{name}, time"] = statistics.median(ratios)
        figures[f"{name}, FLOPs"] = flops[name] / flops["frozen"]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="how often each program is timed")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    found = [measure(shape, args.rounds) for shape in SHAPES]
    table = Table(title=f"forward and backward, as a multiple of the frozen Dense's ({jax.devices()[0].device_kind})")
    for key in found[0]:
        table.add_column(key, justify="right")
    for figures in found:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in figures.values()))
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps({"jax": jax.__version__, "figures": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
