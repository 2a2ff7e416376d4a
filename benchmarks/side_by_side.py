"""What LoRA costs with jdelta, by hand, with qwix, and with PyTorch PEFT, side by side; and how the cost grows.

    python benchmarks/side_by_side.py --json side_by_side.json --picture side_by_side.png
    python benchmarks/side_by_side.py --model base --only contenders     # BERT base, 8 x 128 tokens
    python benchmarks/side_by_side.py --only llama                       # LoRA on tunix's Llama 3, in flax.nnx
    python benchmarks/side_by_side.py --quick                            # a tiny model: to see that it runs

The default model has the sizes of MiniLM, on 32 x 64 tokens: query and value get LoRA of rank 4, the classifier trains
too, dropout is off, the optimizer is AdamW. All contenders have the same weights and the same batch, and the losses of
their first two steps must agree. (Full fine-tuning has LoRA's products in its kernels, so that its first loss agrees.)

Times are those of whole steps, taken in turn in one process with as many threads for XLA as for PyTorch. Read the
ratios: seconds depend on the machine and on what else it does; processor seconds, of all cores together, less on the
latter. With --keep-memory the C library keeps what a step frees, for all contenders: without, a good part of XLA's
step on a CPU may go into fresh pages for its temporaries.

FLOPs and memory are what XLA says of the compiled step; PyTorch's counter knows matrix products only. Tracing is the
processor time that the loss with its gradient takes, as in handwritten.py; the yardstick there is the bare model
without LoRA, which is that of full fine-tuning.
"""

from __future__ import annotations

import os
import sys

# PyTorch's threads sleep between two products, as XLA's do. If they wait busily, they keep the cores from XLA's,
# and from their own that still work as soon as anything else runs: a tiny step of 3 ms took 200 ms.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
if "--quick" in sys.argv:  # before jax is imported: most of the time would go into optimising what runs once
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import argparse
import dataclasses
import datetime
import importlib.util
import json
import platform
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import growth
import jax
import llama_contenders
from contenders import HAND, JDELTA, MODELS, PEFT, Sized, in_jax, numbers, trainings
from peaks import peak_of
from products import TORCH, XLA, products
from rich.console import Console
from rich.table import Table
from steps import tracing_times
from transformers.utils import logging
from turns import FULL, Contender, keep_memory, ratio, require_same_losses, take_turns, version

PARTS = ("contenders", "llama", "products", "deltas", "devices", "tokens", "depth")
TOLERANCE = {"cpu": 1e-4}  # of losses; accelerators round their products to fewer bits
ON_ACCELERATORS = 1e-2
PACKAGES = ("jax", "jaxlib", "flax", "optax", "transformers", "google-tunix", "qwix", "torch", "peft")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int = 8
    traces: int = 6
    deltas: tuple[int, ...] = (1, 4, 16, 64)
    devices: tuple[int, ...] = (1, 2, 4, 8)
    tokens: tuple[int, ...] = (256, 1024, 4096, 16384)
    depth: tuple[int, ...] = (2, 4, 8, 12, 24, 48)
    runs: int = 5


QUICK = Plan(rounds=2, traces=1, deltas=(1, 4), devices=(1, 2), tokens=(16, 64), depth=(1, 2), runs=2)


def contenders(sizes: Sized, plan: Plan) -> dict[str, Any]:
    """All of them on one batch."""
    ways, missing = trainings()
    values = numbers(sizes)
    made = {name: way(sizes) for name, way in ways.items()}
    runners: list[Contender] = [in_jax(name, training, sizes, values) for name, training in made.items()]
    threads = None
    on, reason = torch_device()
    if on is None:
        missing[PEFT] = reason
    else:
        import torch_peft

        runners.append(torch_peft.in_torch(sizes, values, on))
        threads = torch_peft.threads()
    times = take_turns(runners, plan.rounds)
    difference = require_same_losses(runners, TOLERANCE.get(jax.default_backend(), ON_ACCELERATORS))
    tracing = tracing_times(made, sizes.inputs(), plan.traces)
    rows = []
    for runner in runners:
        row = {"contender": runner.name, "losses": runner.losses[:2], **runner.figures, **times[runner.name]}
        row["time"] = {
            other: ratio(times[runner.name]["all"], times[other]["all"])
            for other in (HAND, PEFT, FULL)
            if other in times
        }
        if runner.name in tracing:
            row["tracing_seconds"] = tracing[runner.name]
            row["tracing"] = {
                other: {kind: s / tracing[other][kind] for kind, s in tracing[runner.name].items()}
                for other in (FULL, HAND)
            }
        if jax.default_backend() != "cpu" and "flops" in row:
            row["tflops_per_second"] = row["flops"] / row["seconds"] / 1e12
            row["of_peak"] = row["tflops_per_second"] / peak if (peak := peak_of(jax.devices()[0])) else None
        rows.append(row)
    return {"rows": rows, "missing": missing, "torch_threads": threads, "largest_difference_of_losses": difference}


def torch_device() -> tuple[str | None, str]:
    """Where PyTorch computes, if PEFT and it are there; otherwise why not."""
    if absent := [name for name in ("torch", "peft") if importlib.util.find_spec(name) is None]:
        return None, f"{' and '.join(absent)}: not installed"
    import torch_peft

    return torch_peft.device(), f"PyTorch has no {jax.default_backend()} here"


# --- what is printed


def mega(count: float | None) -> str:
    return "n/a" if count is None else f"{count / 1e6:,.1f}"


def against(ratio: dict[str, float] | None) -> str:
    return "" if ratio is None else f"{ratio['median']:.3f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def table(title: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left", overflow="fold")
    return made


def show_contenders(found: dict[str, Any], console: Console) -> None:
    rows = {row["contender"]: row for row in found["rows"]}
    times = table(
        "time of a step, and its ratios turn by turn: medians (quartiles)", "", "s", "shortest", *rows[JDELTA]["time"]
    )
    work = table(
        "work of the processor in a step, all cores",
        "",
        "s",
        "in the kernel",
        "/ PEFT" if PEFT in rows else "/ by hand",
        "fresh pages MB",
    )
    costs = table("the compiled step", "", "GFLOP", "/ by hand", "temp. MB", "peak MB", "optimizer kB", "trained")
    making = table(
        "before the first step; processor time of tracing the loss, and it with its gradient",
        *("", "trace s", "lower s", "compile s", "loss / bare", "/ by hand", "gradient / bare", "/ by hand"),
    )
    for name, row in rows.items():
        ratios = [against(row["time"].get(other)) for other in rows[JDELTA]["time"]]
        times.add_row(name, f"{row['seconds']:.4f}", f"{row['shortest']:.4f}", *ratios)
        base = rows.get(PEFT, rows[HAND])
        fresh = row["page_faults"] * resource.getpagesize() / 1e6
        work.add_row(
            name,
            f"{row['processor_seconds']:.4f}",
            f"{row['system_seconds']:.4f}",
            f"{row['processor_seconds'] / base['processor_seconds']:.3f}" if base["processor_seconds"] else "",
            f"{fresh:,.0f}",
        )
        flops = row.get("flops")
        costs.add_row(
            name,
            f"{flops / 1e9:,.3f}" if flops else f"{row['matrix_flops'] / 1e9:,.3f} (products)",
            f"{flops / rows[HAND]['flops']:.4f}" if flops else "",
            mega(row.get("temporary_bytes")),
            mega(row.get("peak_bytes")),
            f"{row['optimizer_bytes'] / 1e3:,.1f}",
            f"{row['trained_parameters']:,}",
        )
        if "trace_seconds" in row:
            kinds = [(kind, other) for kind in ("forward", "gradient") for other in (FULL, HAND)]
            traced = [f"{row['tracing'][other][kind]:.3f}" for kind, other in kinds]
            making.add_row(name, *(f"{row[f'{what}_seconds']:.2f}" for what in ("trace", "lower", "compile")), *traced)
    for each in (times, work, costs, making):
        console.print(each)
    if "tflops_per_second" in rows[JDELTA]:
        speed = table(f"on {jax.devices()[0].device_kind}", "", "ms", "TFLOP/s", "of the peak")
        for name, row in rows.items():
            if "tflops_per_second" in row:
                share = f"{row['of_peak']:.1%}" if row["of_peak"] else "unknown device"
                speed.add_row(name, f"{1e3 * row['seconds']:.2f}", f"{row['tflops_per_second']:.1f}", share)
        console.print(speed)
    console.print(f"losses of the first two steps differ by at most {found['largest_difference_of_losses']:.1e}")
    for name, reason in found["missing"].items():
        console.print(f"[yellow]{name} is left out: {reason}.")


def show_products(found: dict[str, Any], console: Console) -> None:
    seconds = ", ".join(f"{name} {found[name]['seconds']:.4f} s" for name in (XLA, TORCH) if name in found)
    compared = f": {against(found['ratio'])}" if "ratio" in found else ""
    console.print(f"the dense products of the backbone in a step, alone: {seconds}{compared}", highlight=False)


def show_deltas(rows: list[dict[str, Any]], console: Console) -> None:
    made = table("many deltas at once, against one: forward pass of 64 rows", "deltas", "FLOPs", "temp. memory", "time")
    for row in rows:
        time = "" if row["time"] is None else f"{row['time']:.3f}"
        made.add_row(str(row["deltas"]), f"{row['flops']:.4f}", f"{row['memory']:.3f}", time)
    console.print(made)


def show_devices(rows: list[dict[str, Any]], console: Console) -> None:
    made = table(
        "on each of some virtual devices, the batch split over them",
        *("devices", "", "GFLOP", "arguments MB", "temp. MB", "collectives", "their MB"),
    )
    for row in rows:
        made.add_row(
            str(row["devices"]),
            row["contender"],
            f"{row['flops'] / 1e9:,.3f}",
            mega(row["argument_bytes"]),
            mega(row["temporary_bytes"]),
            str(row["collectives"]),
            f"{row['collective_bytes'] / 1e6:,.2f}",
        )
    console.print(made)


def show_growth(what: str, title: str, rows: list[dict[str, Any]], console: Console) -> None:
    made = table(title, what, "", "GFLOP", "temp. MB", "trace s", "compile s", "step s")
    for row in rows:
        seconds = f"{row['seconds']:.3f}" if row.get("seconds") else ""
        made.add_row(
            str(row[what]),
            row["contender"],
            f"{row['flops'] / 1e9:,.2f}",
            mega(row["temporary_bytes"]),
            f"{row['trace_seconds']:.2f}",
            f"{row['compile_seconds']:.2f}",
            seconds,
        )
    console.print(made)


# --- the command line


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--model", choices=[name for name in MODELS if name != "tiny"], default="minilm", help="sizes (default: minilm)"
    )
    add("--quick", action="store_true", help="a tiny model and few runs")
    add("--only", nargs="+", choices=PARTS, default=PARTS, help="leave the other parts out")
    add("--keep-memory", action="store_true", help="let the C library (glibc) keep memory that a step frees")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add("--picture", type=Path, metavar="FILE", help="draw the curves there (needs matplotlib)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures and prints; returns all figures."""
    args = parse(argv)
    logging.set_verbosity_error()
    name, plan = ("tiny", QUICK) if args.quick else (args.model, Plan())
    sizes, console = MODELS[name], Console(width=120)
    kept = args.keep_memory and keep_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": name,
        "sizes": dataclasses.asdict(sizes),
        "plan": dataclasses.asdict(plan),
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "machine": platform.processor() or platform.machine(),
        "xla_threads": cores,
        "versions": {package: version(package) for package in PACKAGES},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "memory_kept": kept,
        "load_before": os.getloadavg()[0],
    }
    console.print(
        f"{sizes}\njax {jax.__version__} on {found['device']}, {cores} threads{', memory kept' if kept else ''}",
        highlight=False,
    )
    if found["backend"] == "cpu":
        console.print("A CPU: no TFLOP/s against a peak. Run this on a GPU or TPU for absolute times.")
    if "contenders" in args.only:
        found["contenders"] = contenders(sizes, plan)
        show_contenders(found["contenders"], console)
    if "llama" in args.only:
        if absent := llama_contenders.missing():
            console.print(f"[yellow]tunix's Llama 3 is left out: {' and '.join(absent)}: not installed.")
        else:
            at = llama_contenders.TINY if args.quick else llama_contenders.Sizes()
            found["llama"] = llama_contenders.measure(at, plan.rounds)
            llama_contenders.show(found["llama"], console)
    if "products" in args.only:
        found["products"] = products(sizes, plan.rounds, torch_device()[0])
        show_products(found["products"], console)
    if "deltas" in args.only:
        found["deltas"] = growth.deltas(sizes, plan.deltas, plan.runs)
        show_deltas(found["deltas"], console)
    if "devices" in args.only:
        found["devices"] = list(growth.devices(name, plan.devices))
        show_devices(found["devices"], console)
    if "tokens" in args.only:
        found["tokens"] = list(growth.tokens(sizes, plan.tokens, plan.runs))
        show_growth("tokens", "one sequence of so many tokens", found["tokens"], console)
    if "depth" in args.only:
        found["depth"] = list(growth.depth(sizes, plan.depth))
        show_growth("layers", "so many layers", found["depth"], console)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.picture:
        from scaling_picture import draw

        draw(found, args.picture)
    return found


if __name__ == "__main__":
    main()
