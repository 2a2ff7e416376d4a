"""Tries on random numbers whether a module is linear in one of its leaves.

Nothing of the user's is touched: parameters and inputs are drawn here, in the shapes that a trace of the model saw.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from jdelta.core.arguments import arguments, is_array, main_input, main_output, with_main_input
from jdelta.core.structure import ModuleInfo

Shape = tuple[int, ...]

_SMALL = 32  # sizes above are large
_ROWS = 256  # modules may compute in another way from some number of rows on
_LARGE = 2**16  # of leaves of more numbers, a module like it with smaller ones is tried, if there can be one
_LARGEST = 2**27  # leaves of more numbers are not tried
_MAGNITUDES = ((1.0, 1.0), (0.01, 1.0), (100.0, 1.0), (1.0, 30.0))  # of the input, and of the weights
_MODES = ("deterministic", "train", "training", "is_training")

Values = tuple[Any, Any, Any]
Mode = tuple[Mapping[str, bool], Mapping[str, bool]]  # fields of the module, and arguments of its call


class Map(Protocol):
    """How a module is linear, if it is."""

    @property
    def weights(self) -> str:
        """Name of the leaf."""

    def product(self, x: jax.Array, change: jax.Array) -> jax.Array:
        """What a change of the leaf adds to the output."""

    def free(self, x: Shape) -> list[int]:
        """The axes of an input of this shape whose sizes do not depend on the leaf."""


def problem(host: ModuleInfo, linear: Map) -> str | None:
    """Why a module is not linear in a leaf, as `linear` has it; `None` if it is.

    In float32, where its fields allow it, for several numbers of rows, with other leaves at random, with inputs and
    weights of several magnitudes, in training and not, it has to be that `f(x, W + D) − f(x, W) = x · D`. Of weights
    that are no floats nothing can be added to: there `f` has to be linear in `x`, up to a constant. A large module is
    tried in a smaller copy, if its fields are the only thing that says how large it is.

    Args:
      host: the module.
      linear: the leaf, and the product.
    """
    weights = host.params[linear.weights]
    if math.prod(weights.shape) > _LARGE:
        host = _smaller(host) or host
    if math.prod(host.params[linear.weights].shape) > _LARGEST:
        return f"it is too large to try that: {linear.weights} has shape {weights.shape}"
    try:
        rest = _variables_of(host, linear.weights)
        with jax.ensure_compile_time_eval(), jax.default_matmul_precision("highest"):
            return _problem(host, linear, rest)
    except Exception as error:  # whatever the module's own code raises
        return f"it cannot be tried by itself: {_brief(error)}"


def runs_alone(host: ModuleInfo) -> bool:
    """Whether a module can be run on its own parameters and one array, keeps nothing else, and returns an array."""
    if len(host.args) + len(host.kwargs) != 1 or not is_array(host.output):
        return False
    try:
        module = host.type(**host.fields, parent=None)
        params = {"params": dict(host.params)}
        kept = _shapes_of(host, lambda params, *args, **kw: module.apply(params, *args, mutable=True, **kw)[1], params)
    except Exception:
        return False
    return not jax.tree.leaves({name: tree for name, tree in kept.items() if name != "params"})


def _problem(host: ModuleInfo, linear: Map, rest: Any) -> str | None:
    draw, stored = np.random.default_rng(0), host.params[linear.weights]
    rest = jax.tree.map(lambda leaf: _random(draw, leaf), rest)
    is_float, given = jnp.issubdtype(stored.dtype, jnp.inexact), main_input(host.type, host.args, host.kwargs)[1]
    takes_floats = jnp.issubdtype(given.dtype, jnp.inexact)
    d_in = math.prod(stored.shape) / math.prod(host.y.shape[-1:])
    w, change = (_random(draw, stored, min(1.0, 1 / math.sqrt(max(d_in, 1)))) for _ in range(2))
    product = jax.eval_shape(linear.product, given, jax.ShapeDtypeStruct(stored.shape, given.dtype))
    if product.shape != host.y.shape:
        return f"its output has shape {host.y.shape}, where x·{linear.weights} has {product.shape}"
    conclusive = False
    for mode in _modes(host):
        run = _runner(host, linear, mode, draw, is_float)
        for shape in dict.fromkeys((given.shape, *_other_rows(given.shape, linear))):
            for of_x, of_weights in _MAGNITUDES if is_float or takes_floats else ():
                x = _random(draw, jax.ShapeDtypeStruct(shape, given.dtype), of_x) if takes_floats else None
                ids = draw.integers(0, stored.shape[0], shape).astype(given.dtype)
                try:
                    values = run(ids if x is None else x, w, change, np.float32(of_weights), rest)
                except Exception:
                    if shape == given.shape:
                        raise
                    break  # the module is not for so many rows
                off, largest, allowed = _compared(*values)
                if not off <= allowed:
                    return _difference(linear, is_float, off, largest, shape, mode)
                conclusive |= allowed < largest / 10
    return None if conclusive or not (is_float or takes_floats) else "on random numbers its output hardly depends on it"


def _runner(
    host: ModuleInfo,
    linear: Map,
    mode: Mode,
    draw: np.random.Generator,
    is_float: bool,
) -> Callable[..., Values]:
    """From `(x, W, D, scale of both, other variables)` to what the change should be, and the outputs around it."""
    of_fields, of_call = mode
    module = host.type(**{**_in_float32(host.fields), **of_fields}, parent=None)
    main = main_input(host.type, host.args, host.kwargs)[0]
    args, kwargs = jax.tree.map(lambda a: _random(draw, a) if is_array(a) else a, (tuple(host.args), dict(host.kwargs)))

    @jax.jit
    def f(x: jax.Array, weights: jax.Array, rest: Any) -> jax.Array:
        call = arguments(host.type, *with_main_input(args, kwargs, main, x))
        call.arguments.update(of_call)
        variables = {**rest, "params": {**rest["params"], linear.weights: weights}}
        rngs = {"dropout": jax.random.key(0)}
        y: jax.Array = main_output(module.apply(variables, *call.args[1:], **call.kwargs, rngs=rngs))
        return y

    product = jax.jit(linear.product)

    # One after the other, so that of large weights few copies are alive; and in NumPy, which compiles nothing.
    def of_weights(x: np.ndarray, w: np.ndarray, change: np.ndarray, scale: np.float32, rest: Any) -> Values:
        return product(x, scale * change), f(x, scale * w, rest), f(x, scale * (w + change), rest)

    def of_input(x: np.ndarray, w: np.ndarray, change: np.ndarray, scale: np.float32, rest: Any) -> Values:
        more = np.flip(x, -1) / 2
        return np.asarray(f(more, w, rest)) - f(np.zeros_like(x), w, rest), f(x, w, rest), f(x + more, w, rest)

    return of_weights if is_float else of_input


def _compared(want: jax.Array, before: jax.Array, after: jax.Array) -> tuple[float, float, float]:
    """How far off the change is, how large it is, and how far off rounding may make it."""
    eps = float(jnp.finfo(before.dtype).eps)
    change, first, last = (np.asarray(value, np.float64) for value in (want, before, after))
    off, largest, size = (float(np.abs(v).max()) for v in (last - first - change, change, np.stack([first, last])))
    return off, largest, max(1e-3, 4 * eps) * largest + max(1e-5, 4 * eps) * size


def _difference(
    linear: Map,
    is_float: bool,
    off: float,
    largest: float,
    shape: Shape,
    mode: Mode,
) -> str:
    said = {**mode[0], **mode[1]}
    where = f"for an input of shape {shape}{''.join(f', {key}={value}' for key, value in said.items())}"
    if not is_float:
        return f"with whole numbers in {linear.weights} it is not linear in its input either, {where}"
    return (
        f"on random numbers a change D of it changed the output by something else than x·D: {off:.2g} off, where x·D "
        f"is up to {largest:.2g}, {where}"
    )


# --- what it is tried on


def _smaller(host: ModuleInfo) -> ModuleInfo | None:
    """The same module with smaller sizes in place of large ones, wherever these stand; `None` if it is none then."""
    shapes = jax.tree.map(
        lambda a: a.shape if is_array(a) else (), [host.args, host.kwargs, host.output, *host.params.values()]
    )
    large = sorted({n for n in jax.tree.leaves(shapes) if isinstance(n, int) and n > _SMALL})
    sizes = {n: _SMALL + 8 * i for i, n in enumerate(large)}

    def mapped(value: Any) -> Any:
        if is_array(value):
            return jax.ShapeDtypeStruct(mapped(value.shape), value.dtype)
        if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
            return type(value)(map(mapped, value))
        if isinstance(value, dict):
            return {key: mapped(item) for key, item in value.items()}
        return sizes.get(value, value) if type(value) is int else value

    parts = ("fields", "args", "kwargs", "output", "params")
    small = dataclasses.replace(host, **{part: mapped(_plain(getattr(host, part))) for part in parts})
    try:
        module = small.type(**small.fields, parent=None)
        key = jax.random.key(0)
        output, variables = _shapes_of(
            small, lambda key, *a, **k: module.init_with_output({"params": key, "dropout": key}, *a, **k), key
        )
    except Exception:  # it takes no such sizes
        return None
    own = {key: meta.unbox(leaf).shape for key, leaf in variables.get("params", {}).items() if key in small.params}
    fits = own == {key: leaf.shape for key, leaf in small.params.items()} and main_output(output).shape == small.y.shape
    return small if fits else None


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _variables_of(host: ModuleInfo, weights: str) -> dict[str, Any]:
    """Shapes of all that a module needs but for a leaf: other leaves, those of modules inside it, other collections."""
    module = host.type(**host.fields, parent=None)

    def init(key: jax.Array, *args: Any, **kwargs: Any) -> Any:
        return meta.unbox(module.init({"params": key, "dropout": key}, *args, **kwargs))

    variables = _shapes_of(host, init, jax.random.key(0))
    own = {**variables.get("params", {}), **host.params}
    return {**variables, "params": {key: leaf for key, leaf in own.items() if key != weights}}


def _shapes_of(host: ModuleInfo, call: Callable[..., Any], given: Any) -> Any:
    """What a function of `given` and the module's arguments returns, as shapes."""
    leaves, treedef = jax.tree.flatten((tuple(host.args), dict(host.kwargs)))
    arrays = {i: leaf for i, leaf in enumerate(leaves) if is_array(leaf)}

    def run(given: Any, arrays: dict[int, jax.Array]) -> Any:
        args, kwargs = jax.tree.unflatten(treedef, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
        return call(given, *args, **kwargs)

    return jax.eval_shape(run, given, arrays)


def _modes(host: ModuleInfo) -> list[tuple[dict[str, bool], dict[str, bool]]]:
    """What says whether this is training, both ways: fields of the module, or else arguments of its call."""
    fields = [name for name in _MODES if isinstance(host.fields.get(name), bool)]
    names = [name for name in _MODES if name in inspect.signature(host.type.__call__).parameters]
    if fields:
        return [(dict.fromkeys(fields, flag), {}) for flag in (False, True)]
    return [({}, dict.fromkeys(names, flag)) for flag in (False, True)[: len(names) + 1]]


def _other_rows(shape: Shape, linear: Map) -> list[Shape]:
    """The shape with many rows; and with one, unless it has few."""
    free = linear.free(shape)
    if not free:
        return []
    one = tuple(1 if i in free else size for i, size in enumerate(shape))
    few = math.prod(shape[i] for i in free) < _SMALL
    many = tuple(_ROWS if i == free[-1] else size for i, size in enumerate(one))
    return [many] if few else [one, many]


def _random(draw: np.random.Generator, leaf: Any, size: float = 1.0) -> np.ndarray:
    """Numbers in the shape of an array: floats in float32, others as they are. Large arrays repeat themselves."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return np.asarray(draw.integers(0, 2, leaf.shape), leaf.dtype)
    some = draw.standard_normal(min(math.prod(leaf.shape), 65_537 + 2 * int(draw.integers(500))), np.float32)
    return np.asarray(np.float32(size) * np.resize(some, leaf.shape))


def _in_float32(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, with a dtype of floats to compute in as float32."""
    dtype = fields.get("dtype")
    try:
        is_float = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    except TypeError:
        is_float = False
    return {**fields, **({"dtype": jnp.float32} if is_float else {})}


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'…' if len(text) > 200 else ''}"
