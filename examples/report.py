"""What a run of the sentiment examples gives: its figures, and how they are printed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jdelta.display.visualization import size_of

if TYPE_CHECKING:
    import argparse

    from sentiment import Run, Sentence

Tree = Any


def size(tree: Tree) -> int:
    """Bytes of all leaves; shapes suffice."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def count(tree: Tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def results_of(
    args: argparse.Namespace,
    run: Run,
    frozen: Tree,
    params: Tree,
    stored: Tree,
    pretrained: dict[str, np.ndarray],
    held_out: Sequence[Sentence],
    probabilities: np.ndarray,
) -> dict[str, Any]:
    """What `show_results` prints, and more.

    Args:
      args: the command line.
      run: the training run.
      frozen: the frozen leaves, as they were before it.
      params: all parameters after it.
      stored: what of them is stored for this task.
      pretrained: name to value of what was loaded.
      held_out: the sentences by which it is judged.
      probabilities: that each of them is positive.
    """
    labels = np.array([sentence.label for sentence in held_out])
    changed = changed_leaves(frozen, params, pretrained)
    number = len(jax.tree.leaves(frozen))
    untouched = f"untouched: {number} frozen leaves ({size_of(size(frozen))}) are bit-equal to the pretrained ones"
    return {
        "method": args.method,
        "learning_rate": args.learning_rate,
        "batch_size": args.batch_size,
        "accuracy": float(np.mean((probabilities > 0.5) == labels)),
        "right": ((probabilities > 0.5) == labels).tolist(),
        "held_out_loss": float(-np.mean(np.log(np.where(labels, probabilities, 1 - probabilities)))),
        "trainable": count(run.trainable),
        "parameters": count(params),
        "trainable_share": count(run.trainable) / count(params),
        "steps": len(run.losses),
        "losses": run.losses,
        "first_loss": float(np.mean(run.losses[:20])),
        "last_loss": float(np.mean(run.losses[-20:])),
        "seconds_per_step": run.seconds_per_step,
        "temporary_bytes": run.temporary_bytes,
        "stored_bytes": size(stored),
        "full_stored_bytes": size(pretrained),
        "optimizer_bytes": run.optimizer_bytes,
        "full_optimizer_bytes": size(jax.eval_shape(optax.adamw(optax.constant_schedule(1.0)).init, pretrained)),
        "held_out": [sentence.text for sentence in held_out],
        "frozen_leaves": number,
        "changed_leaves": changed,
        "backbone_untouched": not changed if number else None,
        "backbone": f"[red]CHANGED: {', '.join(changed)}" if changed else untouched if number else "all of it trained",
    }


def changed_leaves(frozen: Tree, params: Tree, pretrained: dict[str, np.ndarray]) -> list[str]:
    """Names of the leaves that should be frozen and are not, bit for bit, what was loaded."""
    after = dict(named_leaves(params))
    names = [name for name, _ in named_leaves(frozen) if name in pretrained]
    return [name for name in names if after[name].tobytes() != pretrained[name].tobytes()]


def named_leaves(tree: Tree) -> Iterator[tuple[str, np.ndarray]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="."), np.array(leaf)  # a copy


def show_sentences(console: Console, sentences: Sequence[Sentence], probabilities: np.ndarray, rows: int = 8) -> None:
    table = Table(title="some held-out sentences", title_justify="left")
    for name in ("rating", "prediction", "probability", "text"):
        table.add_column(name, justify="left" if name == "text" else "right", overflow="fold")
    for sentence, p in list(zip(sentences, probabilities, strict=True))[:rows]:
        right = (p > 0.5) == sentence.label
        word = "positive" if p > 0.5 else "negative"
        colour = "green" if right else "red"
        chance = f"{max(p, 1 - p):.2f}"
        table.add_row(f"{sentence.rating:+.2f}", f"[{colour}]{word}", chance, escape(sentence.text))
    console.print(table)


def show_results(console: Console, r: dict[str, Any]) -> None:
    table = Table(
        title=f"{r['method']}, batches of {r['batch_size']}, learning rate {r['learning_rate']:g}",
        title_justify="left",
        show_header=False,
    )
    stored, optimizer = r["stored_bytes"], r["optimizer_bytes"]
    full, full_optimizer = r["full_stored_bytes"], r["full_optimizer_bytes"]
    table.add_row("held-out accuracy", f"[bold]{r['accuracy']:.4f}[/] of {len(r['held_out'])} sentences")
    table.add_row("trainable parameters", f"{r['trainable']:,} of {r['parameters']:,} ({r['trainable_share']:.3%})")
    table.add_row("training", f"{r['steps']} steps, loss {r['first_loss']:.3f} → {r['last_loss']:.3f}")
    table.add_row("seconds per step", f"{r['seconds_per_step']:.3f} (median, compilation left out)")
    table.add_row("seconds in total", f"{r['seconds']:.0f}")
    table.add_row("stored per task", against(stored, full))
    table.add_row("optimizer state", against(optimizer, full_optimizer))
    table.add_row("backbone", r["backbone"])
    console.print(table)


def against(have: int, full: int) -> str:
    saved = f", {size_of(full - have)} ({1 - have / full:.2%}) saved" if have < full else ""
    return f"{size_of(have)}; full fine-tuning {size_of(full)}{saved}"
