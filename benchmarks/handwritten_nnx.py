"""What LoRA and adapters through jdelta cost on an nnx model beside the same written into its modules by hand.

    python benchmarks/handwritten_nnx.py                                        # 4 layers of 768, 8 x 128 tokens
    python benchmarks/handwritten_nnx.py --layers 2 --width 64 --vocab 100      # quick
    python benchmarks/handwritten_nnx.py --only time --dtype bfloat16 --turns 40
    python benchmarks/handwritten_nnx.py --json handwritten_nnx.json

The model is a decoder, its layers in an `nnx.List` or made by `nnx.vmap` and run by `nnx.scan`, with `nnx.remat`
around each or not. By hand, `nnx.LoRALinear` and a Linear with an adapter stand for `nnx.Linear`. Only what they add
trains.

For the costs the training steps are compiled for shapes alone: nothing is allocated and nothing is run. FLOPs and
temporary memory are what XLA says of the compiled step on this machine's default device. On a CPU, jdelta adds LoRA's
update to the weights where tokens are many: that takes fewer FLOPs. The backbone's matrices are in `--dtype`.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from steps import SAME_COST, TRACING, Figure, Training, Tree, cost, report, tracing_times, write
from turns import FULL, Contender, compiled, contender, ratio, require_same_losses, take_turns

import jdelta

SAME_MEMORY = 1.01  # of the hand-written step's temporary memory
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}
ON_ACCELERATORS = 1e-2  # they round products of float32 to fewer bits

QUERY_VALUE = ("query", "value")
EVERY = ("query", "key", "value", "out", "up", "down")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The model and the batch."""

    layers: int = 4
    width: int = 768
    vocab: int = 8000
    batch: int = 8
    length: int = 128
    rank: int = 8
    dtype: str = "float32"

    @property
    def heads(self) -> int:
        return max(self.width // 64, 2)

    def inputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of one batch."""
        return {"tokens": jax.ShapeDtypeStruct((self.batch, self.length), jnp.int32)}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is put where, in which kind of model.

    Attributes:
      method: "LoRA" or "adapter".
      at: the linear layers of a block that have it.
      scanned: whether the layers are a stack, run by `nnx.scan`.
      remat: whether each layer runs in `nnx.remat`.
    """

    method: str
    at: tuple[str, ...]
    scanned: bool = False
    remat: bool = False

    @property
    def name(self) -> str:
        where = "every Linear" if self.at == EVERY else " and ".join(self.at)
        return ", ".join([f"{self.method} on {where}", *["scan"] * self.scanned, *["remat"] * self.remat])


CASES = (
    Case("LoRA", QUERY_VALUE),
    Case("LoRA", EVERY),
    Case("LoRA", EVERY, remat=True),
    Case("LoRA", QUERY_VALUE, scanned=True),
    Case("LoRA", EVERY, scanned=True),
    Case("LoRA", EVERY, scanned=True, remat=True),
    Case("adapter", ("out", "down")),
    Case("adapter", ("out", "down"), scanned=True, remat=True),
)


# --- the model, with parts by hand or without


class Adapter(nnx.Module):
    """An adapter by hand."""

    def __init__(self, sizes: Sizes, features: int, rngs: nnx.Rngs):
        self.down = nnx.Linear(features, sizes.rank, dtype=sizes.dtype, rngs=rngs)
        self.up = nnx.Linear(sizes.rank, features, dtype=sizes.dtype, rngs=rngs)

    def __call__(self, y: jax.Array) -> jax.Array:
        return y + self.up(nnx.gelu(self.down(y)))


class AdaptedLinear(nnx.Linear):
    """`nnx.Linear` with an adapter after it."""

    def __init__(self, sizes: Sizes, d_in: int, d_out: int, **options: Any):
        super().__init__(d_in, d_out, **options)
        self.adapter = Adapter(sizes, d_out, options["rngs"])

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        return self.adapter(super().__call__(x, out_sharding))


class Block(nnx.Module):
    """Causal attention and a feed-forward network."""

    def __init__(self, sizes: Sizes, rngs: nnx.Rngs, by_hand: Case | None):
        def linear(name: str, d_in: int, d_out: int) -> nnx.Linear:
            options: dict[str, Any] = {"dtype": sizes.dtype, "param_dtype": sizes.dtype, "rngs": rngs}
            if by_hand is None or name not in by_hand.at:
                return nnx.Linear(d_in, d_out, **options)
            if by_hand.method == "LoRA":
                return nnx.LoRALinear(d_in, d_out, lora_rank=sizes.rank, lora_dtype=sizes.dtype, **options)
            return AdaptedLinear(sizes, d_in, d_out, **options)

        width = sizes.width
        self.heads = sizes.heads
        self.norm_attention = nnx.LayerNorm(width, dtype=sizes.dtype, rngs=rngs)
        self.query, self.key, self.value = (linear(name, width, width) for name in ("query", "key", "value"))
        self.out = linear("out", width, width)
        self.norm_mlp = nnx.LayerNorm(width, dtype=sizes.dtype, rngs=rngs)
        self.up, self.down = linear("up", width, 4 * width), linear("down", 4 * width, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        normed = self.norm_attention(x)
        q, k, v = (each(normed).reshape(*x.shape[:-1], self.heads, -1) for each in (self.query, self.key, self.value))
        x = x + self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm_mlp(x))))


class Decoder(nnx.Module):
    """A language model whose head is its embedding."""

    def __init__(self, sizes: Sizes, rngs: nnx.Rngs, *, scanned: bool, remat: bool, by_hand: Case | None = None):
        options: dict[str, Any] = {"dtype": sizes.dtype, "param_dtype": sizes.dtype, "rngs": rngs}
        self.scanned, self.remat = scanned, remat
        self.embed = nnx.Embed(sizes.vocab, sizes.width, **options)
        if scanned:
            made = nnx.vmap(lambda rngs: Block(sizes, rngs, by_hand), in_axes=0, out_axes=0)
            self.layers = nnx.split_rngs(splits=sizes.layers)(made)(rngs)
        else:
            self.layers = nnx.List([Block(sizes, rngs, by_hand) for _ in range(sizes.layers)])
        self.norm = nnx.LayerNorm(sizes.width, dtype=sizes.dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        def run(x: jax.Array, layer: Block) -> jax.Array:
            return layer(x)

        run = nnx.remat(run) if self.remat else run
        x = self.embed(tokens)
        if self.scanned:
            x = nnx.scan(run, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
        else:
            for layer in self.layers:
                x = run(x, layer)
        return self.embed.attend(self.norm(x)).astype(jnp.float32)


# --- ways to train it


def training(model: nnx.Module, trains: Any) -> Training:
    """The loss of next tokens, as a function of a model's state."""
    graphdef, trainable, frozen = nnx.split(model, trains, ...)

    def loss(trainable: Tree, frozen: Tree, batch: Mapping[str, Any]) -> jax.Array:
        logits = nnx.merge(graphdef, trainable, frozen, copy=True)(batch["tokens"])[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:]).mean()

    return Training(loss, trainable, frozen)


def bare(sizes: Sizes, case: Case) -> nnx.Module:
    """The model as shapes, without what the case puts in it."""
    return nnx.eval_shape(lambda: Decoder(sizes, nnx.Rngs(0), scanned=case.scanned, remat=case.remat))


def with_jdelta(sizes: Sizes, case: Case) -> Training:
    """The model with a delta."""
    model, dummy = bare(sizes, case), tuple(sizes.inputs().values())
    if case.method == "LoRA":
        delta = jdelta.LoraModel(model, list(case.at), lora_r=sizes.rank, lora_alpha=sizes.rank, dummy_inputs=dummy)
    else:
        delta = jdelta.AdapterModel(model, list(case.at), bottleneck_dim=sizes.rank, dummy_inputs=dummy)
    return training(model, delta.filter)


def by_hand(sizes: Sizes, case: Case) -> Training:
    """The model with LoRA or adapters in its code."""
    model = nnx.eval_shape(lambda: Decoder(sizes, nnx.Rngs(0), scanned=case.scanned, remat=case.remat, by_hand=case))
    return training(model, nnx.LoRAParam if case.method == "LoRA" else nnx.PathContains("adapter"))


def full(sizes: Sizes, case: Case) -> Training:
    """The whole bare model."""
    return training(bare(sizes, case), nnx.Param)


# --- the same numbers for all


def path_of(key_path: Sequence[Any]) -> tuple[str, ...]:
    """Where jdelta keeps the leaf that the code by hand keeps there."""
    path = tuple(str(key.key) for key in key_path if isinstance(key, jax.tree_util.DictKey))
    _, found, factor = path[-1].rpartition("lora_")  # nnx.LoRA says lora/lora_a, qwix kernel_lora_a
    return (*(key for key in path[:-1] if key != "lora"), "lora", factor) if found else path


def noise(path: tuple[str, ...], leaf: Any) -> jax.Array:
    """Random numbers for a leaf, which depend on its path alone."""
    random = np.random.default_rng(list("/".join(path).encode()))
    one = path[-1] in ("scale", "w") and "norm" in path[-2]
    return jnp.asarray(0.04 * random.standard_normal(leaf.shape, np.float32) + np.float32(one), leaf.dtype)


def filled(tree: Tree) -> Tree:
    """A tree of shapes with random numbers in it."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: noise(path_of(path), leaf), tree)


def tokens(sizes: Sizes) -> dict[str, jax.Array]:
    """A batch of random tokens."""
    shape = (sizes.batch, sizes.length)
    return {"tokens": jnp.asarray(np.random.default_rng(1).integers(0, sizes.vocab, shape), jnp.int32)}


def agreement(sizes: Sizes, case: Case) -> dict[str, float]:
    """Largest relative difference of loss and gradients, jdelta's from the hand-written, on random weights."""
    found = []
    for each in (with_jdelta(sizes, case), by_hand(sizes, case)):
        run = jax.jit(jax.value_and_grad(each.loss))
        loss, grads = run(filled(each.trainable), filled(each.frozen), tokens(sizes))
        leaves = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(grads)}
        found.append((loss, leaves))
    (loss, grads), (hand_loss, hand_grads) = found
    assert grads.keys() == hand_grads.keys()
    differences = [float(jnp.abs(g - hand_grads[k]).max() / jnp.abs(hand_grads[k]).max()) for k, g in grads.items()]
    return {"loss": float(abs(loss - hand_loss) / abs(hand_loss)), "gradients": max(differences)}


# --- the report


def costs(sizes: Sizes, cases: Sequence[Case]) -> list[Figure]:
    inputs, figures = sizes.inputs(), []
    for case in cases:
        mine, hand = cost(with_jdelta(sizes, case), inputs), cost(by_hand(sizes, case), inputs)
        figures += [
            Figure(f"{case.name}: FLOPs, by hand", hand["flops"] / 1e9, "G"),
            Figure(f"{case.name}: FLOPs, jdelta / by hand", mine["flops"] / hand["flops"], goal=SAME_COST),
            Figure(f"{case.name}: temporary memory, by hand", hand["temp"] / 1e6, "MB"),
            Figure(f"{case.name}: temporary memory, jdelta / by hand", mine["temp"] / hand["temp"], goal=SAME_MEMORY),
        ]
    return figures


def tracings(sizes: Sizes, cases: Sequence[Case], runs: int) -> list[Figure]:
    figures = []
    for case in cases:
        ways = {"bare": full(sizes, case), "by hand": by_hand(sizes, case), "jdelta": with_jdelta(sizes, case)}
        times = tracing_times(ways, sizes.inputs(), runs)
        for what in ("forward", "gradient"):
            at = {name: kinds[what] for name, kinds in times.items()}
            figures += [
                Figure(f"{what} traced, {case.name}, bare", at["bare"], "s"),
                Figure(f"{what} traced, {case.name}, by hand / bare", at["by hand"] / at["bare"]),
                Figure(f"{what} traced, {case.name}, jdelta / bare", at["jdelta"] / at["bare"]),
                Figure(f"{what} traced, {case.name}, jdelta / by hand", at["jdelta"] / at["by hand"], goal=TRACING),
            ]
    return figures


def times(sizes: Sizes, cases: Sequence[Case], turns: int) -> list[Figure]:
    figures = []
    for case in cases:
        ways: dict[str, Callable[[Sizes, Case], Training]] = {"jdelta": with_jdelta, "by hand": by_hand, FULL: full}
        runners: list[Contender] = []
        for name, way in ways.items():
            made = way(sizes, case)
            arrays = filled(made.trainable), filled(made.frozen), tokens(sizes)
            runners.append(contender(name, compiled(made, sizes.inputs()), *arrays))
        taken = take_turns(runners, turns)
        near = TOLERANCE[sizes.dtype] if jax.default_backend() == "cpu" else ON_ACCELERATORS
        require_same_losses(runners[:2], max(near, TOLERANCE[sizes.dtype]))
        of_hand = ratio(taken["jdelta"]["all"], taken["by hand"]["all"])
        of_full = ratio(taken["jdelta"]["all"], taken[FULL]["all"])
        figures += [
            Figure(f"{case.name}: a step, by hand", 1e3 * taken["by hand"]["seconds"], "ms"),
            Figure(f"{case.name}: a step, jdelta / by hand", of_hand["median"]),
            Figure(f"{case.name}: … lower quartile of the turns", of_hand["low"]),
            Figure(f"{case.name}: … upper quartile of the turns", of_hand["high"]),
            Figure(f"{case.name}: a step, jdelta / full fine-tuning", of_full["median"]),
        ]
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Sizes):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    parser.add_argument("--runs", type=int, default=8, help="how often each variant is traced (default 8)")
    parser.add_argument("--turns", type=int, default=8, help="how many steps each variant takes (default 8)")
    parts = ["agreement", "cost", "tracing", "time"]
    parser.add_argument(
        "--only", nargs="+", choices=parts, default=parts[:-1], help="what is measured (default: not time)"
    )
    parser.add_argument("--cases", nargs="+", type=int, choices=range(len(CASES)), help="leave the others out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args(arguments)
    sizes = Sizes(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Sizes)})
    small = Sizes(layers=2, width=64, vocab=100, batch=2, length=16)
    cases = CASES if options.cases is None else [CASES[i] for i in options.cases]

    figures = []
    for case in cases if "agreement" in options.only else ():
        for what, difference in agreement(small, case).items():
            goal = 1e-5 if jax.default_backend() == "cpu" else ON_ACCELERATORS
            figures.append(Figure(f"{case.name}: {what}, relative difference to by hand", difference, goal=goal))
    if "cost" in options.only:
        figures += costs(sizes, cases)
    if "tracing" in options.only:
        figures += tracings(sizes, cases, options.runs)
    if "time" in options.only:
        figures += times(sizes, cases, options.turns)

    console = Console(width=110)
    console.print(f"{sizes}, jax {jax.__version__} on {jax.devices()[0].device_kind}")
    report(figures, console)
    if options.json:
        write(options.json, sizes, figures)


if __name__ == "__main__":
    main()
