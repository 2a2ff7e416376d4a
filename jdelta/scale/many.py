"""Many deltas on one backbone: one for each row of a batch, or several trained in one program.

A stack is a tree of leaves `(deltas, …)`, so `jax.vmap` maps any function of one delta:

    trainable, frozen = delta.partition()
    stacked = jdelta.stack([trainable] * 8)

    def step(trainable, state, rate):  # one delta's step of training
        grads = jax.grad(lambda t: loss(jdelta.combine(t, frozen)))(trainable)
        updates, state = optax.adam(rate).update(grads, state)
        return optax.apply_updates(trainable, updates), state

    states = jax.vmap(optax.adam(1.0).init)(stacked)
    stacked, states = jax.jit(jax.vmap(step))(stacked, states, jnp.logspace(-5, -2, 8))

The backbone's leaves are closed over and not mapped, and XLA computes each of its products once for all rows of all
deltas.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np

from jdelta.core.config import shown
from jdelta.methods.lora import LoraConfig
from jdelta.saved.arithmetic.checks import Source, read_all, require_one_backbone, require_same_arguments
from jdelta.saved.arithmetic.lora_factors import SCALED, pairs_of, same_up_to_rank
from jdelta.saved.finetuned import Finetuned, HasFinetuned
from jdelta.scale import pure_calls
from jdelta.trees import states, surgery
from jdelta.trees.fingerprint import kind
from jdelta.trees.surgery import Tree


def stack(deltas: Sequence[Tree] | Sequence[Source], check_hash: bool | Literal["warn"] = "warn") -> Tree:
    """Stacks deltas of one method along a new leading axis.

        stacked = jdelta.stack(["movies/", "tweets/"])  # saved deltas
        stacked = jdelta.stack([delta.init(seed) for seed in range(8)])  # or trees, such as partition gives

    Saved or attached deltas are stacked as `finetuned` returns them, for a model that the first of them is attached to.
    LoRAs may then differ in rank, scale and dropout: leaves of a lower rank than the first one's are padded with zeros,
    which stay zero in training, and `b` is multiplied by the quotient of the scales.

    Args:
      deltas: trees of the same structure, shapes and dtypes; or `Finetuned` objects, attached deltas, saved folders or
        repositories of the Hub, all of the same method, arguments and modules.
      check_hash: what happens if they were trained on different backbones: a warning with `"warn"`, an error with
        `True`, nothing with `False`.

    Returns:
      A tree of the same structure, its leaves `(deltas, …)`.

    Raises:
      FileNotFoundError, ConnectionError: as `AutoDeltaModel.from_finetuned`.
      TypeError: `deltas` is not a list of deltas.
      ValueError: the list is empty, or two deltas differ in more than values; the message says in what.
    """
    if isinstance(deltas, (Mapping, str, os.PathLike, Finetuned, HasFinetuned)):
        raise TypeError("expected a list of deltas, got one. Write [delta].")
    if not isinstance(deltas, Iterable):
        raise TypeError(f"expected a list of deltas, got {shown(deltas)}.")
    trees = list(deltas)
    if not all(isinstance(tree, Mapping) for tree in trees):
        found = read_all(cast(Sequence[Source], trees))
        require_one_backbone(found, set(), check_hash)
        trees = [_tree_like(found[0], other, i) for i, other in enumerate(found, 1)]
    if not trees:
        raise ValueError("there are no deltas. Give at least one.")
    surgery.require_alive(trees)
    for i, tree in enumerate(trees[1:], 2):
        _require_same_leaves(trees[0], tree, i)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(stacked: Tree) -> list[Tree]:
    """Returns a tree for each delta of a stack: the inverse of `stack`, bit for bit.

        for tree, folder in zip(jdelta.unstack(stacked), folders):
            delta.save_finetuned(folder, params=jdelta.combine(tree, frozen))

    Args:
      stacked: a tree of leaves `(deltas, …)`, such as a stack or its optimizer states.

    Raises:
      ValueError: the leaves differ in the length of their first axis, or there are none.
    """
    return [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(_length(stacked))]


def select(stacked: Tree, indices: Any) -> Tree:
    """Selects a delta of a stack for each row of a batch. They may repeat.

        rows = jdelta.select(stacked, [0, 1, 1, 0])

    Under `jax.jit` an index out of range cannot raise an error; the outputs of that row are then NaN.

    Args:
      stacked: a tree of leaves `(deltas, …)`.
      indices: integers from 0, `(batch,)`; a single integer selects one delta, without the leading axis.

    Returns:
      A tree of leaves `(batch, …)`, for `rowwise`.

    Raises:
      TypeError: the indices are not integers.
      IndexError: an index is negative or out of range.
      ValueError: as `unstack`, or the indices have several axes.
    """
    length, numbers = _length(stacked), indices if isinstance(indices, jax.Array) else np.asarray(indices)
    if not jnp.issubdtype(numbers.dtype, jnp.integer):
        raise TypeError(f"indices are integers, got {numbers.dtype}.")
    if numbers.ndim > 1:
        raise ValueError(f"indices have one axis, the batch; got shape {numbers.shape}.")
    if not isinstance(numbers, jax.core.Tracer):
        wrong = [int(i) for i in np.ravel(numbers) if not 0 <= i < length]
        if wrong:
            raise IndexError(f"there are {length} deltas, 0 to {length - 1}; index {wrong[0]} is none of them.")
    rows = jnp.where(numbers < 0, length, numbers)  # jnp.take counts negative ones from the end
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0, mode="fill"), stacked)


def rowwise(call: Callable[..., Any], frozen: Tree) -> Callable[..., Any]:
    """Returns the same call with a delta for each row of the batch.

        trainable, frozen = delta.partition()
        rows = jdelta.select(stacked, indices)
        logits = jdelta.rowwise(model, frozen)(**batch, params=rows).logits
        tokens = jdelta.rowwise(model.generate, frozen)(input_ids, params=rows, max_length=20).sequences

    Every row is a batch of one, under `jax.vmap`; the backbone's leaves are not mapped, so XLA computes its products
    once for all rows. Statistics over a batch, as `nn.BatchNorm` takes them in training, are those of a single row.
    The result can be jitted and differentiated; in `jax.jit`, pass `frozen` as an argument, otherwise it becomes a
    constant. An nnx module itself is not changed: statistics and counts of random keys that a run changes are dropped.

    Args:
      call: a model, a method of one, or any function that takes `params=`.
      frozen: the leaves that all rows share, as `partition` gives them.

    Returns:
      A function of the arguments of `call`, whose `params` is a tree of leaves `(batch, …)`, as `select` returns it.
      Arrays among the arguments, also in lists and dicts, have the batch as their first axis; scalars are the same for
      all rows. A typed key, also of an nnx module, is split into one for each row, unless there is one for each.
      Outputs that are `(1, …)` for a row are `(batch, …)`; outputs without a batch axis get one.

    Raises:
      ValueError: raised by the returned function: the first axis of an array is not that of `params`, or `params` and
        `frozen` share leaves.
    """

    def each(*args: Any, params: Tree, **kwargs: Any) -> Any:
        batch = _length(params)
        if surgery.root(frozen) and not surgery.root(params):  # what is saved knows nothing of collections
            params = {"params": params}
        run = call
        if pure_calls.is_of_module(call):
            run, kwargs[pure_calls.KEYS] = pure_calls.pure(call, batch)
        named, treedef = jax.tree_util.tree_flatten_with_path((args, kwargs))
        leaves = [_prepared(path, leaf, batch) for path, leaf in named]
        axes = [0 if isinstance(leaf, jax.Array) and leaf.ndim else None for leaf in leaves]
        others = {i: leaf for i, leaf in enumerate(leaves) if axes[i] is None}

        def one(own: Tree, mapped: dict[int, jax.Array]) -> Any:
            given = {i: leaf if _is_key(leaf) else leaf[None] for i, leaf in mapped.items()}
            args, kwargs = jax.tree.unflatten(treedef, [(given | others)[i] for i in range(len(leaves))])
            output = run(*args, params=surgery.combine(own, frozen), **kwargs)
            return jax.tree.map(lambda a: a[0] if jnp.shape(a)[:1] == (1,) else a, output)

        return jax.vmap(one)(params, {i: leaf for i, leaf in enumerate(leaves) if axes[i] == 0})

    return each


# --- what is given


def _prepared(path: Any, leaf: Any, batch: int) -> Any:
    """An argument as it is mapped, if it is an array with axes: with the batch first. A key is split."""
    if not isinstance(leaf, (jax.Array, np.ndarray)):
        return leaf
    if _is_key(leaf) and leaf.ndim == 0:
        return jax.random.split(leaf, batch)
    if leaf.ndim and len(leaf) != batch:
        name = jax.tree_util.keystr(path[1:], simple=True, separator=".")
        raise ValueError(
            f"rowwise: argument {name!r} has shape {leaf.shape}, and params are those of {batch} rows. The first axis "
            "of each array is the batch."
        )
    return jnp.asarray(leaf) if leaf.ndim else leaf


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _length(stacked: Tree) -> int:
    """How many deltas there are in a stack."""
    surgery.require_alive(stacked)
    lengths = {name: jnp.shape(leaf)[:1] for name, leaf in states.named_leaves(stacked).items()}
    if not lengths:
        raise ValueError("the tree has no leaves.")
    first, length = next(iter(lengths.items()))
    for name, other in lengths.items():
        if other != length or not length:
            raise ValueError(f"this is no stack: {first!r} has a first axis of {length}, {name!r} of {other}.")
    return length[0]


def _require_same_leaves(first: Tree, other: Tree, i: int) -> None:
    """Raises `ValueError` unless two trees have the same names, shapes and dtypes."""
    mine, its = states.named_leaves(first), states.named_leaves(other)
    if odd := sorted(mine.keys() ^ its.keys()):
        without, has = (i, 1) if odd[0] in mine else (1, i)
        raise ValueError(f"delta {without} has no leaf {odd[0]!r}, which delta {has} has.")
    for name in mine:
        if (here := kind(mine[name])) != (there := kind(its[name])):
            raise ValueError(f"{name} is {here} in delta 1, {there} in delta {i}.")


# --- deltas apart from a model


def _tree_like(first: Finetuned, other: Finetuned, i: int) -> Tree:
    """The leaves of a delta as they fit a model on which the first one is attached."""
    pairs = pairs_of(first)
    require_same_arguments(first, other, i, SCALED if pairs else ())
    for what, here, there in (
        ("module", first.targets, other.targets),
        ("inserted layer at", first.inserted, other.inserted),
        ("leaf", first.values, other.values),
    ):
        if odd := sorted({*here} ^ {*there}):
            without, has = (i, 1) if odd[0] in here else (1, i)
            raise ValueError(f"delta {without} has no {what} {odd[0]}, which delta {has} has.")
    values = dict(other.values)
    for pair in pairs:
        values |= _pair_like(first, other, pair, i)
    return surgery.unflatten({tuple(name.split(".")): value for name, value in values.items()})


def _pair_like(first: Finetuned, other: Finetuned, pair: str, i: int) -> dict[str, np.ndarray]:
    """LoRA's two factors at one module, in the first delta's rank and scale."""
    names = [f"{pair}.a", f"{pair}.b"]
    (a, b), like = ([delta.values[name] for name in names] for delta in (other, first))
    if not same_up_to_rank(like[0].shape, like[1].shape, a.shape, b.shape):
        raise ValueError(f"{pair} is that of another module in delta {i} than in delta 1: its widths differ.")
    if a.shape[-1] > like[0].shape[-1]:
        raise ValueError(
            f"{pair} has rank {a.shape[-1]} in delta {i}, and {like[0].shape[-1]} in delta 1, to which the others are "
            "filled up. Put the delta of the highest rank first, and attach that one to the model."
        )
    target = pair.rpartition(".")[0]
    scale, wanted = (cast(LoraConfig, delta.config).scale_of(target) for delta in (other, first))
    if scale != wanted:
        b = (b * (scale / wanted)).astype(b.dtype)
    return {name: _filled_up(value, full.shape) for name, value, full in zip(names, (a, b), like, strict=True)}


def _filled_up(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The array with zeros at the end of each axis that is too short."""
    return np.pad(value, [(0, size - have) for have, size in zip(value.shape, shape, strict=True)])
