"""What it takes to attach each method to a Llama of 7 billion parameters that is given as shapes.

    python benchmarks/attach_7b.py
    python benchmarks/attach_7b.py --json attach_7b.json

Each method has a process of its own, whose peak memory (resident set) is thus its own. Nothing of the model is
allocated. The time is that of constructing the delta and asking for its shapes.
"""

from __future__ import annotations

import argparse
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

METHODS = ("LoraModel", "AdapterModel", "ParallelAdapterModel", "BitFitModel")
SECONDS, GIGABYTES = 30, 1  # the goals


def peak() -> float:
    """The most memory that this process has held so far, in GB."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024) / 1e9


def measure(method: str, layers: int | None) -> dict[str, Any]:
    """Attaches one method at its default positions; to be called once in a process."""
    import jax
    from transformers import FlaxLlamaForCausalLM, LlamaConfig
    from transformers.utils import logging

    import jdelta

    logging.set_verbosity_error()
    config = LlamaConfig() if layers is None else LlamaConfig(num_hidden_layers=layers)
    start = time.perf_counter()
    model = FlaxLlamaForCausalLM(config, _do_init=False)
    loaded, before = time.perf_counter(), peak()
    delta = getattr(jdelta, method)(model)
    attached = time.perf_counter()
    own = delta.shapes()
    done = time.perf_counter()
    trainable, frozen = delta.partition(jdelta.graft(model.params_shape_tree, own))
    return {
        "method": method,
        "seconds": done - loaded,
        "seconds_constructor": attached - loaded,
        "seconds_model": loaded - start,
        "peak_before": before,
        "peak": peak(),
        "targets": len(delta.targets),
        "backbone_parameters": count(jax.tree.leaves(model.params_shape_tree)),
        "delta_parameters": count(jax.tree.leaves(own)),
        "trainable_parameters": count(jax.tree.leaves(trainable)),
        "frozen_parameters": count(jax.tree.leaves(frozen)),
    }


def count(leaves: Sequence[Any]) -> int:
    return sum(leaf.size for leaf in leaves)


def measure_apart(method: str, layers: int | None) -> dict[str, Any]:
    """`measure` in a fresh process. This one never loads jax: a child's peak begins at that of its parent."""
    command = [sys.executable, __file__, "--measure", method]
    if layers is not None:
        command += ["--layers", str(layers)]
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
    parser.add_argument("--layers", type=int, help="number of layers (default: 32, as in the 7B model)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--measure", choices=METHODS, help=argparse.SUPPRESS)  # what a fresh process is started with
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measure(options.measure, options.layers)))
        return
    results = []
    for method in METHODS:
        result = measure_apart(method, options.layers)
        result["reached"] = result["seconds"] < SECONDS and result["peak"] < GIGABYTES
        results.append(result)
    report(results, Console(width=110))
    if options.json:
        content = {"goals": {"seconds": SECONDS, "gigabytes": GIGABYTES}, "results": results}
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
