"""How far a trained delta moved the weights of its modules: a table of numbers, layer by layer."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from jdelta.core import merging, weights
from jdelta.core.edits import Attachment, CallEdit, Edit, WeightEdit
from jdelta.core.generators import with_generated
from jdelta.core.linear_maps import scanned_axes
from jdelta.core.state import DeltaState, require_whole
from jdelta.core.structure import ModuleInfo, Structure
from jdelta.trees import processes, surgery
from jdelta.trees.dtypes import takes_steps
from jdelta.trees.surgery import Path, Tree

NO_LAYER = "–"


@dataclasses.dataclass(frozen=True, eq=False)
class Movement:
    """How far a trained delta moved the weights of each module, as a table of layers.

        table = delta.movement()
        table.values[table.rows.index("attention.self.query"), table.columns.index("3")]

    Attributes:
      rows: the kinds of module in order of execution, such as `attention.self.query`.
      columns: the numbers of the layers, and last `"–"` if there are modules outside numbered layers.
      values: the movement, `(rows, columns)`, float64; NaN where the delta has no such module.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: np.ndarray


def measured(
    params: Tree, pretrained: Mapping[Path, Any], attachment: Attachment, structure: Structure
) -> dict[str, np.ndarray]:
    """The movement of each module of a delta: `‖change‖ / ‖weight‖`, in Frobenius norms.

    The change is that of all the module's parameters together; a bias that was added changed from 0. The weight is
    what the backbone has in the module without the biases, or these if it has nothing else. So the movement is how
    much the module's output changes, root mean square, on inputs of independent entries with mean 0 and variance 1,
    relative to the output without bias; and LoRA and BitFit can be compared. The sums are computed in float64 from
    weights in float32: movements below 1e-7 are rounding.

    Args:
      params: the parameters, without other collections.
      pretrained: path to earlier value of the backbone's own leaves that train with the delta.
      attachment: the delta.
      structure: the backbone's.

    Returns:
      Name to movement of each module, in order of execution: one number, `()`, or inside `nn.scan` one for each layer,
      `(layers,)`. NaN if the weight is 0.

    Raises:
      ValueError: the delta does something else than change weights, or they are no floats, or earlier values are
        unknown.
    """
    if not attachment.edits:
        raise ValueError(f"delta {attachment.name!r} changes nothing yet: put layers in first.")
    leaves = surgery.flatten(params)
    hosts: dict[Path, list[Edit]] = {}
    for edit in attachment.edits:
        if isinstance(edit, CallEdit) and edit.where != "train" and not merging.is_mergeable(edit):
            raise ValueError(
                f"delta {attachment.name!r} moves no weights at {surgery.name_of(edit.host) or 'the root'}: "
                f"{merging.NO_CHANGE.format(type(edit.layer).__name__)} "
                "delta.visualization() shows where a delta sits."
            )
        begin = (*edit.host, *edit.leaf)[:-1] if isinstance(edit, CallEdit) and edit.where == "train" else edit.host
        hosts.setdefault(begin, []).append(edit)
    modules = {info.path: info for info in structure}
    found = {path: _movement(info, hosts[path], leaves, pretrained) for path, info in modules.items() if path in hosts}
    for path in hosts.keys() - modules.keys():  # leaves whose owner is not called
        for edit in hosts[path]:
            if isinstance(edit, WeightEdit):
                found[edit.leaf] = _movement_of_leaf(edit, leaves)
    return {surgery.name_of(path): value for path, value in found.items()}


def movement(state: DeltaState, params: Tree | None = None) -> Movement:
    """Returns how far training moved the modules that the delta changes: `‖change‖ / ‖weight‖`, layer by layer.

        table = delta.movement(params)
        table.rows, table.columns, table.values

    For LoRA the change is the update of the weight, for BitFit that of the bias; the weight is the backbone's, without
    biases (`jdelta.display.movement.measured` says why). What else trained, such as a head in `unfrozen_modules`, is
    not in the table, since its earlier values are not kept.

    Args:
      params: the tree that holds the values; by default `model.params`.

    Raises:
      RuntimeError: the delta is detached or merged, or the tree was donated.
      ValueError: its layers do not change weights, as those of adapters, prefixes and prompts; or the model holds
        shapes only.
    """
    own, tree = state.active("measured"), surgery.parameters(state.values(params))
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree)):
        raise ValueError("the model holds shapes only. Pass the tree that holds the values: params=….")
    require_whole(state, tree, "movement")
    pretrained = surgery.flatten(surgery.parameters(surgery.unflatten(state.kept)))
    made = with_generated({"params": tree}, [own])["params"]
    return tabulated(measured(made, pretrained, own, state.structure))


def tabulated(movements: Mapping[str, np.ndarray]) -> Movement:
    """Modules that differ only in the number of their layer, in one row.

    The layer is the first number in a name, as in `encoder.layer.3.output.dense`; or if there is none the first that
    ends a word which has siblings, as in `Block_3.Dense_0`. What is inside `nn.scan` has a column for each of its
    layers. The name of the stack of layers is left out, up to what tells stacks apart, such as `encoder` and `decoder`.

    Args:
      movements: name to movement of each module, in order of execution, as `measured` gives them.
    """
    paths = {name: tuple(name.split(".")) for name in movements}
    cells: dict[tuple[Path, Path], dict[int | None, float]] = {}
    for name, values in movements.items():
        if values.ndim:
            cells[(), paths[name]] = dict(enumerate(values))
        else:
            stack, number, kind = _split(paths[name], paths.values())
            cells.setdefault((stack, kind), {})[number] = float(values)
    found = {number for row in cells.values() for number in row}
    columns: list[int | None] = [*sorted(number for number in found if number is not None)]
    columns += [None] * (None in found)
    return Movement(
        rows=tuple(_labels(list(cells))),
        columns=tuple(NO_LAYER if number is None else str(number) for number in columns),
        values=np.array([[row.get(number, np.nan) for number in columns] for row in cells.values()]),
    )


def _movement(
    module: ModuleInfo, edits: Sequence[Edit], leaves: Mapping[Path, Any], pretrained: Mapping[Path, Any]
) -> np.ndarray:
    """The movement of one module, `()`, or `(layers,)` if its leaves hold several."""
    after = {(*module.path, key): _in_float32(leaves[(*module.path, key)]) for key in module.params}
    before = dict(after)
    for edit in edits:
        if isinstance(edit, WeightEdit):
            merging.require_steps_of(edit.leaf, leaves[edit.leaf])
            own = weights.own_leaves(edit, leaves)
            after[edit.leaf] = after[edit.leaf] + weights.update(edit, before[edit.leaf], own)
        elif edit.where == "train":
            before[(*edit.host, *edit.leaf)] = _in_float32(_earlier((*edit.host, *edit.leaf), pretrained))
        else:
            merged = merging.merged_by_layer(edit, module, {**leaves, **after})
            merging.require_steps(module, merged, leaves)
            after |= {(*module.path, key): value for key, value in merged.items()}
    keys = list(module.params)
    stored = [before[(*module.path, key)].shape for key in keys]
    return _relative(after, before, scanned_axes(stored, [module.params[key].shape for key in keys]))


def _movement_of_leaf(edit: WeightEdit, leaves: Mapping[Path, Any]) -> np.ndarray:
    """The movement of one leaf that no module's call owns."""
    merging.require_steps_of(edit.leaf, leaves[edit.leaf])
    before = _in_float32(leaves[edit.leaf])
    after = before + weights.update(edit, before, weights.own_leaves(edit, leaves))
    return _relative({edit.leaf: after}, {edit.leaf: before}, edit.layers)


def _relative(after: Mapping[Path, Any], before: Mapping[Path, Any], axes: Sequence[int]) -> np.ndarray:
    """`‖change‖ / ‖weight‖`, for each layer if `axes` are those of layers."""

    def norm(values: Iterable[Any]) -> np.ndarray:
        return np.sqrt(np.sum([_squares(value, axes) for value in values], axis=0))

    change = norm(_in_float64(value) - _in_float64(before.get(path, 0.0)) for path, value in after.items())
    held = [value for path, value in before.items() if path[-1] != "bias"] or before.values()
    weight = norm(map(_in_float64, held))
    return np.divide(change, weight, out=np.full_like(change, np.nan), where=weight > 0)


def _earlier(path: Path, pretrained: Mapping[Path, Any]) -> Any:
    value = meta.unbox(pretrained.get(path))
    if value is None or isinstance(value, jax.ShapeDtypeStruct):
        raise ValueError(
            f"the pretrained value of {surgery.name_of(path)!r} is unknown, since the backbone held none when the "
            "delta was attached. Attach it to a backbone that holds its parameters."
        )
    return value


def _squares(value: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """The sum of squares, `()`; or with `axes`, those of `scanned_axes`, that of each layer, `(layers,)`."""
    for depth, axis in enumerate(reversed(axes)):
        value = np.moveaxis(value, depth + axis, depth)
    layers = (math.prod(value.shape[: len(axes)]),) if axes else ()
    return np.square(np.abs(value.reshape(*layers, -1))).sum(axis=-1)


def _in_float32(leaf: Any) -> jax.Array:
    value = jnp.asarray(meta.unbox(leaf))
    return value.astype(jnp.promote_types(value.dtype, jnp.float32) if takes_steps(value.dtype) else jnp.float32)


def _in_float64(value: Any) -> np.ndarray:
    on_host = processes.to_host(value)
    return on_host.astype(np.complex128 if np.iscomplexobj(on_host) else np.float64)


def _split(path: Path, others: Iterable[Path]) -> tuple[Path, int | None, Path]:
    """The stack of layers that a module is in, the number of its layer, and its path inside the layer."""
    for i, part in enumerate(path):
        if part.isdecimal():
            return path[:i], int(part), path[i + 1 :]
    for i, part in enumerate(path):
        word, _, number = part.rpartition("_")
        if number.isdecimal() and _has_siblings(path[:i], word, others):
            return (*path[:i], word), int(number), path[i + 1 :]
    return (), None, path


def _has_siblings(above: Path, word: str, paths: Iterable[Path]) -> bool:
    depth = len(above)
    starts = [path[depth].rpartition("_") for path in paths if path[:depth] == above and len(path) > depth]
    return len({number for stem, _, number in starts if stem == word and number.isdecimal()}) > 1


def _labels(rows: Sequence[tuple[Path, Path]]) -> Iterable[str]:
    stacks = list({stack: None for stack, _ in rows if stack})
    first = _shared(stacks)
    last = _shared([stack[first:][::-1] for stack in stacks])
    for stack, kind in rows:
        told_apart = stack[first : len(stack) - last]
        yield ".".join((*told_apart, *kind)) or (stack[-1] if stack else "the root module")


def _shared(paths: Sequence[Path]) -> int:
    """How many parts all the paths have in common at the beginning."""
    same: Callable = lambda parts: len(set(parts)) == 1  # noqa: E731
    return sum(1 for _ in itertools.takewhile(same, zip(*paths, strict=False)))
