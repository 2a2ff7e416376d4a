"""Tries on random numbers whether a module is linear in one of its leaves.

Nothing of the user's is touched: parameters and inputs are drawn here, in the shapes that a trace of the model saw.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jdelta.core.arguments import argument_names, arguments, is_array, main_input, main_output, with_main_input
from jdelta.core.standalone import Standalone
from jdelta.core.structure import ModuleInfo

Shape = tuple[int, ...]

_SMALL = 32  # sizes above are large
_ROWS = 256  # modules may compute in another way from some number of rows on
_LARGE = 2**16  # of leaves of more numbers, a module like it with smaller ones is tried, if there can be one
_LARGEST = 2**27  # leaves of more numbers are not tried
_MAGNITUDES = ((1.0, 1.0), (0.01, 1.0), (100.0, 1.0), (1.0, 30.0))  # of the input, and of the weights

Values = tuple[Any, Any, Any]


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
    if host.standalone is None:
        return "it cannot be tried by itself"
    weights = host.params[linear.weights]
    if math.prod(weights.shape) > _LARGE:
        host = _smaller(host, host.standalone) or host
    if math.prod(host.params[linear.weights].shape) > _LARGEST:
        return f"it is too large to try that: {linear.weights} has shape {weights.shape}"
    try:
        assert host.standalone is not None
        needs = host.standalone.shapes(host.args, host.kwargs)
        others = {**needs.own, **host.params}  # those that it shares with another module are not among the latter
        del others[linear.weights]
        shapes = others, needs.rest
        with jax.ensure_compile_time_eval(), jax.default_matmul_precision("highest"):
            return _problem(host, host.standalone, linear, shapes)
    except Exception as error:  # whatever the module's own code raises
        return f"it cannot be tried by itself: {_brief(error)}"


def runs_alone(host: ModuleInfo) -> bool:
    """Whether a module can be run on its own parameters and one array, keeps nothing else, and returns an array."""
    if host.standalone is None or len(host.args) + len(host.kwargs) != 1 or not is_array(host.output):
        return False
    try:
        return host.standalone.is_complete(host.params, host.args, host.kwargs)
    except Exception:
        return False


def _problem(host: ModuleInfo, module: Standalone, linear: Map, shapes: Any) -> str | None:
    draw, stored = np.random.default_rng(0), host.params[linear.weights]
    rest = jax.tree.map(lambda leaf: _random(draw, leaf), shapes)
    is_float, given = jnp.issubdtype(stored.dtype, jnp.inexact), main_input(host.type, host.args, host.kwargs)[1]
    takes_floats = jnp.issubdtype(given.dtype, jnp.inexact)
    d_in = math.prod(stored.shape) / math.prod(host.y.shape[-1:])
    w, change = (_random(draw, stored, min(1.0, 1 / math.sqrt(max(d_in, 1)))) for _ in range(2))
    product = jax.eval_shape(linear.product, given, jax.ShapeDtypeStruct(stored.shape, given.dtype))
    if product.shape != host.y.shape:
        return f"its output has shape {host.y.shape}, where x·{linear.weights} has {product.shape}"
    conclusive = False
    for mode in module.in_float32().modes(argument_names(host.type.__call__)):
        run = _runner(host, mode.module, mode.arguments, linear, draw, is_float)
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
                    return _difference(linear, is_float, off, largest, shape, {**mode.fields, **mode.arguments})
                conclusive |= allowed < largest / 10
    return None if conclusive or not (is_float or takes_floats) else "on random numbers its output hardly depends on it"


def _runner(
    host: ModuleInfo,
    module: Standalone,
    of_call: Mapping[str, bool],
    linear: Map,
    draw: np.random.Generator,
    is_float: bool,
) -> Callable[..., Values]:
    """From `(x, W, D, scale of both, all else)` to what the change should be, and the outputs around it."""
    main = main_input(host.type, host.args, host.kwargs)[0]
    args, kwargs = jax.tree.map(lambda a: _random(draw, a) if is_array(a) else a, (tuple(host.args), dict(host.kwargs)))

    @jax.jit
    def f(x: jax.Array, weights: jax.Array, rest: Any) -> jax.Array:
        call = arguments(host.type, *with_main_input(args, kwargs, main, x))
        call.arguments.update(of_call)
        others, inside = rest
        y: jax.Array = main_output(
            module.run({**others, linear.weights: weights}, inside, call.args[1:], call.kwargs, jax.random.key(0))
        )
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
    mode: Mapping[str, bool],
) -> str:
    where = f"for an input of shape {shape}{''.join(f', {key}={value}' for key, value in mode.items())}"
    if not is_float:
        return f"with whole numbers in {linear.weights} it is not linear in its input either, {where}"
    return (
        f"on random numbers a change D of it changed the output by something else than x·D: {off:.2g} off, where x·D "
        f"is up to {largest:.2g}, {where}"
    )


# --- what it is tried on


def _smaller(host: ModuleInfo, module: Standalone) -> ModuleInfo | None:
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

    try:
        parts = ("fields", "args", "kwargs", "output", "params")
        small = dataclasses.replace(host, **{part: mapped(_plain(getattr(host, part))) for part in parts})
        resized = module.resized(mapped)
        found = resized.shapes(small.args, small.kwargs)
    except Exception:  # it takes no such sizes
        return None
    own, wanted = ({key: leaf.shape for key, leaf in params.items()} for params in (found.own, small.params))
    fits = own == wanted and main_output(found.output).shape == small.y.shape
    return dataclasses.replace(small, standalone=resized) if fits else None


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


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


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'…' if len(text) > 200 else ''}"
