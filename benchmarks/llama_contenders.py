"""LoRA on tunix's Llama 3 (flax.nnx), in turn in one process: through jdelta, by qwix, and by hand.

    python benchmarks/llama_contenders.py                                # 4 layers of 512, 8 x 128 tokens
    python benchmarks/llama_contenders.py --layers 16 --width 2048 --dtype bfloat16 --batch 16 --length 1024
    python benchmarks/side_by_side.py --only llama                       # the same, as a part of all

Query and value get LoRA of rank 8. All have the same weights and the same batch, in the same dtype; the losses of their
first two steps must agree. (Full fine-tuning has LoRA's products in its weights, so that its first loss agrees.) Needs
the extra `tunix`: google-tunix and qwix.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from handwritten_nnx import noise, path_of
from rich.console import Console
from rich.table import Table
from steps import Training, Tree
from turns import FULL, compiled, contender, ratio, require_same_losses, take_turns

import jdelta

JDELTA, QWIX, HAND = "jdelta", "qwix", "by hand"
TARGETS = ("q_proj", "v_proj")
ALPHA = 16
NEEDS = ("tunix", "qwix")
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
ON_ACCELERATORS = 1e-2  # they round products of float32 to fewer bits


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The model and the batch."""

    layers: int = 4
    width: int = 512
    heads: int = 8
    key_value_heads: int = 4
    vocab: int = 4000
    batch: int = 8
    length: int = 128
    rank: int = 8
    dtype: str = "float32"

    def inputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of one batch."""
        return {"tokens": jax.ShapeDtypeStruct((self.batch, self.length), jnp.int32)}


TINY = Sizes(layers=2, width=32, heads=4, key_value_heads=2, vocab=100, batch=2, length=8, rank=2)


def missing() -> list[str]:
    """What is needed and not installed."""
    return [name for name in NEEDS if importlib.util.find_spec(name) is None]


# --- the contenders


def bare(sizes: Sizes) -> nnx.Module:
    """The model, to be called inside `nnx.eval_shape`."""
    from tunix.models.llama3 import model as llama

    config = llama.ModelConfig(
        num_layers=sizes.layers,
        vocab_size=sizes.vocab,
        embed_dim=sizes.width,
        hidden_dim=4 * sizes.width,
        num_heads=sizes.heads,
        num_kv_heads=sizes.key_value_heads,
        head_dim=sizes.width // sizes.heads,
        rope_theta=1_000_000,
        norm_eps=1e-6,
    )
    return llama.Llama3(config, rngs=nnx.Rngs(0))


def arguments(tokens: jax.Array) -> tuple[Any, ...]:
    """Tokens, positions, no cache, and a causal mask."""
    batch, length = tokens.shape
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length))
    return tokens, jnp.broadcast_to(jnp.arange(length), (batch, length)), None, mask


def training(model: nnx.Module, trains: Any, dtype: str) -> Training:
    """The loss of next tokens, as a function of a model's state, all of it in one dtype."""
    graphdef, *states = nnx.split(model, trains, nnx.Param, ...)
    shapes = [jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), state) for state in states]

    def loss(trainable: Tree, frozen: Tree, batch: Mapping[str, Any]) -> jax.Array:
        run = nnx.merge(graphdef, trainable, *frozen, copy=True)
        logits, _ = run(*arguments(batch["tokens"]))
        labels = batch["tokens"][:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1].astype(jnp.float32), labels).mean()

    return Training(loss, shapes[0], tuple(shapes[1:]))


def with_jdelta(sizes: Sizes) -> Training:
    """LoRA through jdelta."""
    model = nnx.eval_shape(lambda: bare(sizes))
    dummy = jax.eval_shape(lambda: arguments(jnp.zeros((1, 8), jnp.int32)))
    delta = jdelta.LoraModel(model, list(TARGETS), lora_r=sizes.rank, lora_alpha=ALPHA, dummy_inputs=dummy)
    return training(model, delta.filter, sizes.dtype)


def with_qwix(sizes: Sizes) -> Training:
    """LoRA by qwix."""
    import qwix

    provider = qwix.LoraProvider(module_path=f".*({'|'.join(TARGETS)})", rank=sizes.rank, alpha=ALPHA)

    def made() -> nnx.Module:
        tokens, positions, cache, mask = arguments(jnp.zeros((1, 8), jnp.int32))
        model: nnx.Module = qwix.apply_lora_to_model(
            bare(sizes), provider, input_tokens=tokens, positions=positions, cache=cache, attention_mask=mask
        )
        return model

    return training(nnx.eval_shape(made), nnx.LoRAParam, sizes.dtype)


def by_hand(sizes: Sizes) -> Training:
    """LoRA in a subclass of tunix's Einsum."""
    from tunix.models.llama3 import model as llama

    class LoraEinsum(llama.Einsum):
        def __init__(self, einsum: Any, rngs: nnx.Rngs):
            self.einsum_str, self.shape, self.w = einsum.einsum_str, einsum.shape, einsum.w
            d, *out = einsum.shape
            self.lora_a = nnx.LoRAParam(nnx.initializers.he_uniform()(rngs.params(), (d, sizes.rank)))
            self.lora_b = nnx.LoRAParam(jnp.zeros((sizes.rank, *out)))

        def __call__(self, x: jax.Array) -> jax.Array:
            change = jnp.einsum("btr,rnh->btnh", x @ self.lora_a[...], self.lora_b[...])
            return super().__call__(x) + change * (ALPHA / sizes.rank)

    def made() -> nnx.Module:
        model: Any = bare(sizes)
        for layer in model.layers:
            for name in TARGETS:
                setattr(layer.attn, name, LoraEinsum(getattr(layer.attn, name), nnx.Rngs(0)))
        return model

    return training(nnx.eval_shape(made), nnx.LoRAParam, sizes.dtype)


def full(sizes: Sizes) -> Training:
    """The whole bare model."""
    return training(nnx.eval_shape(lambda: bare(sizes)), nnx.Param, sizes.dtype)


WAYS: dict[str, Callable[[Sizes], Training]] = {JDELTA: with_jdelta, QWIX: with_qwix, HAND: by_hand, FULL: full}


# --- figures


def filled(tree: Tree) -> Tree:
    """A tree of shapes with random numbers in it, the same for all."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: noise(path_of(path), leaf), tree)


def merged(tree: Tree, numbers: Mapping[tuple[str, ...], jax.Array], rank: int) -> Tree:
    """A tree of weights with LoRA's products in them."""

    def one(key_path: Any, leaf: jax.Array) -> jax.Array:
        host = path_of(key_path)[:-1]
        a, b = (numbers.get((*host, "lora", factor)) for factor in "ab")
        if a is None or b is None:
            return leaf
        change = jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), 1) * (ALPHA / rank)
        return (leaf.astype(jnp.float32) + change).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, tree)


def measure(sizes: Sizes, rounds: int) -> dict[str, Any]:
    """All contenders on one batch."""
    tokens = {"tokens": jax.random.randint(jax.random.key(1), (sizes.batch, sizes.length), 0, sizes.vocab, jnp.int32)}
    runners, numbers = [], {}
    for name, way in WAYS.items():
        made = way(sizes)
        trainable, frozen = filled(made.trainable), filled(made.frozen)
        if name == JDELTA:
            numbers = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(trainable)}
        if name == FULL:
            trainable = merged(trainable, numbers, sizes.rank)
        runners.append(contender(name, compiled(made, sizes.inputs()), trainable, frozen, tokens))
    times = take_turns(runners, rounds)
    near = TOLERANCE[sizes.dtype] if jax.default_backend() == "cpu" else max(ON_ACCELERATORS, TOLERANCE[sizes.dtype])
    difference = require_same_losses(runners, near)
    rows = []
    for runner in runners:
        against = {other: ratio(times[runner.name]["all"], times[other]["all"]) for other in (QWIX, HAND, FULL)}
        row = {"contender": runner.name, "losses": runner.losses[:2], **runner.figures, **times[runner.name]}
        rows.append(row | {"time": against})
    return {"sizes": dataclasses.asdict(sizes), "rows": rows, "largest_difference_of_losses": difference}


def show(found: Mapping[str, Any], console: Console) -> None:
    """Prints them."""
    rows = {row["contender"]: row for row in found["rows"]}
    made = Table(title="LoRA on tunix's Llama 3: times are medians of the ratios turn by turn (quartiles)")
    for i, column in enumerate(
        ("", "ms", "/ qwix", "/ by hand", "/ full", "FLOPs / by hand", "temp. / by hand", "trained", "trace s")
    ):
        made.add_column(column, justify="right" if i else "left", overflow="fold")
    for name, row in rows.items():
        made.add_row(
            name,
            f"{1e3 * row['seconds']:.1f}",
            *(f"{r['median']:.3f} ({r['low']:.2f}–{r['high']:.2f})" for r in row["time"].values()),
            f"{row['flops'] / rows[HAND]['flops']:.4f}",
            f"{row['temporary_bytes'] / rows[HAND]['temporary_bytes']:.4f}",
            f"{row['trained_parameters']:,}",
            f"{row['trace_seconds']:.2f}",
        )
    console.print(made)
    console.print(f"losses of the first two steps differ by at most {found['largest_difference_of_losses']:.1e}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Sizes):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    parser.add_argument("--rounds", type=int, default=8, help="how many steps each takes (default 8)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args(arguments)
    if absent := missing():
        raise SystemExit(f"{' and '.join(absent)}: not installed. pip install 'jdelta[tunix]'")
    sizes = Sizes(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Sizes)})
    console = Console(width=120)
    console.print(f"{sizes}, jax {jax.__version__} on {jax.devices()[0].device_kind}")
    found = measure(sizes, options.rounds)
    show(found, console)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
