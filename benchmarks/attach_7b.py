"""What it takes to attach each method to a model of 7 billion parameters that is given as shapes.

    python benchmarks/attach_7b.py                       # transformers' Llama
    python benchmarks/attach_7b.py --model nnx           # a decoder in flax.nnx: the model of handwritten_nnx.py
    python benchmarks/attach_7b.py --model tunix         # tunix's Llama 3 of 8 billion; needs the extra `tunix`
    python benchmarks/attach_7b.py --json attach_7b.json

Each method has a process of its own, whose peak memory (resident set) is thus its own. Nothing of the model is
allocated. The time is that of constructing the delta and asking for its shapes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MODELS = ("transformers", "nnx", "tunix")
METHODS = ("LoraModel", "AdapterModel", "ParallelAdapterModel", "BitFitModel")
SECONDS, GIGABYTES = 30, 1  # the goals


def peak() -> float:
    """The most memory that this process has held so far, in GB."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024) / 1e9


def in_transformers(layers: int) -> tuple[Any, dict[str, Any]]:
    """The model, and arguments for a delta on it: at its default positions."""
    from transformers import FlaxLlamaForCausalLM, LlamaConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    return FlaxLlamaForCausalLM(LlamaConfig(num_hidden_layers=layers), _do_init=False), {}


def in_nnx(layers: int) -> tuple[Any, dict[str, Any]]:
    """Likewise; a delta goes to the outputs of attention and feed-forward layers."""
    from flax import nnx
    from handwritten_nnx import Decoder, Sizes

    sizes = Sizes(layers=layers, width=4096, vocab=32000, batch=1, length=8)
    model = nnx.eval_shape(lambda: Decoder(sizes, nnx.Rngs(0), scanned=False, remat=False))
    return model, {"modified_modules": ["out", "down"], "dummy_inputs": tuple(sizes.inputs().values())}


def in_tunix(layers: int) -> tuple[Any, dict[str, Any]]:
    """Likewise; at its default positions."""
    import jax
    import jax.numpy as jnp
    import llama_contenders
    from flax import nnx
    from tunix.models.llama3 import model as llama

    config = dataclasses.replace(llama.ModelConfig.llama3p1_8b(), num_layers=layers)
    dummy = jax.eval_shape(lambda: llama_contenders.arguments(jnp.zeros((1, 8), jnp.int32)))
    return nnx.eval_shape(lambda: llama.Llama3(config, rngs=nnx.Rngs(0))), {"dummy_inputs": dummy}


def measure(model_in: str, method: str, layers: int) -> dict[str, Any]:
    """Attaches one method; to be called once in a process."""
    import jax
    from flax import nnx

    import jdelta

    made = {"transformers": in_transformers, "nnx": in_nnx, "tunix": in_tunix}[model_in]
    start = time.perf_counter()
    model, options = made(layers)
    loaded, before = time.perf_counter(), peak()
    delta = getattr(jdelta, method)(model, **options)
    attached = time.perf_counter()
    own = delta.shapes()
    done = time.perf_counter()
    if model_in == "transformers":
        trainable, frozen = delta.partition(jdelta.graft(model.params_shape_tree, own))
    else:
        _, trainable, frozen = nnx.split(model, delta.filter, ...)
    sizes = {name: count(jax.tree.leaves(tree)) for name, tree in (("trains", trainable), ("frozen", frozen))}
    return {
        "method": method,
        "seconds": done - loaded,
        "seconds_constructor": attached - loaded,
        "seconds_model": loaded - start,
        "peak_before": before,
        "peak": peak(),
        "targets": len(delta.targets),
        "backbone_parameters": sizes["trains"] + sizes["frozen"] - count(jax.tree.leaves(own)),
        "delta_parameters": count(jax.tree.leaves(own)),
        "trainable_parameters": sizes["trains"],
        "frozen_parameters": sizes["frozen"],
    }


def count(leaves: Sequence[Any]) -> int:
    return sum(leaf.size for leaf in leaves)


def measure_apart(model_in: str, method: str, layers: int) -> dict[str, Any]:
    """`measure` in a fresh process. This one never loads jax: a child's peak begins at that of its parent."""
    command = [sys.executable, __file__, "--model", model_in, "--measure", method, "--layers", str(layers)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


def report(results: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table("method", "targets", "delta", "trainable", "attached in", "peak memory", "before", "reached")
    for column in table.columns[1:-1]:
        column.justify = "right"
    for result in results:
        table.add_row(
            result["method"],
            str(result["targets"]),
            f"{result['delta_parameters']:,}",
            f"{result['trainable_parameters']:,}",
            f"{result['seconds']:.2f} s",
            f"{result['peak']:.3f} GB",
            f"{result['peak_before']:.3f} GB",
            "[green]yes[/]" if result["reached"] else "[red]no[/]",
        )
    console.print(table)
    console.print(
        f"The backbone has {results[0]['backbone_parameters']:,} parameters. "
        f"Goals: attached in less than {SECONDS} s, peak memory below {GIGABYTES} GB."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="whose model (default: transformers)")
    parser.add_argument("--layers", type=int, default=32, help="number of layers (default: 32, as in the 7B model)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--measure", choices=METHODS, help=argparse.SUPPRESS)  # what a fresh process is started with
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measure(options.model, options.measure, options.layers)))
        return
    results = []
    for method in METHODS:
        result = measure_apart(options.model, method, options.layers)
        result["reached"] = result["seconds"] < SECONDS and result["peak"] < GIGABYTES
        results.append(result)
    report(results, Console(width=110))
    if options.json:
        content = {"goals": {"seconds": SECONDS, "gigabytes": GIGABYTES}, "results": results}
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
