"""Where a module is linear: in which of its leaves, and along which axes. Whoever needs to know asks here.

A module is linear in its leaf `W` if for all inputs and all values of its leaves

    f(x, W + D) − f(x, W) = x · D

where `·` is a product over some axes, a convolution, or a choice of rows. Then, and only then, an update of the weights
can be added to the module's output, or to its weights, with the same result. That a module has a kernel of two axes
does not say it: it may apply a non-linearity, or normalise its weights.

Known are modules of exactly the types that are registered, if no field that can change the computation was set. All
others are tried on random numbers, see `probing`.
"""

from __future__ import annotations

import collections
import dataclasses
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from jdelta.core import probing
from jdelta.core.edits import WeightEdit
from jdelta.core.linear_maps import AnyMap, EinsumMap, LinearMap, MatrixMap, StoredMap, operands
from jdelta.core.linear_types import (
    by_equation,
    dense,
    equation_in,
    equation_of,
    is_equation,
    is_initializer,
    require_floats,
)
from jdelta.core.rules import FeatureRule
from jdelta.core.structural_key import structural_key
from jdelta.core.structure import ModuleInfo

# --- what is known


@dataclasses.dataclass(frozen=True)
class _Known:
    """What is known of a type.

    Attributes:
      describe: how a module of it is linear. Raises `TypeError` if it is not.
      plain: the fields of which the computation stays linear whatever they are; others have to have their defaults.
        `None`: all.
      defaults: those, by name.
      alone: whether its input and its own parameters are all that it needs. `None`: that is to be tried.
    """

    describe: Callable[[ModuleInfo], LinearMap]
    plain: Collection[str] | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    alone: bool | None = None

    def is_plain(self, host: ModuleInfo) -> bool:
        """Whether no field of a module was set that can make it compute something else."""
        if self.plain is None:
            return True
        others = {key: value for key, value in host.fields.items() if key not in self.plain}
        return _is_float(host.fields.get("dtype")) and all(
            key in self.defaults and _is_same(value, self.defaults[key]) for key, value in others.items()
        )


_known: dict[type, _Known] = {}
_known_by_name: dict[tuple[str, str], _Known] = {}  # of classes that may not be imported yet


def register_linear(module_type: type[Any], weights: str = "kernel", equation: str | None = "...i,io->...o") -> None:
    """Says that the modules of a type are linear in a leaf: `f(x, W + D) − f(x, W) = einsum(equation, x, D)`.

        jdelta.register_linear(MyDense)  # x @ kernel
        jdelta.register_linear(MyConv1D, equation="...i,oi->...o")  # stored as (d_out, d_in)
        jdelta.register_linear(MyEinsum, weights="w", equation=None)  # by its field, or by an argument of its call

    LoRA takes them then, and merges into them, without trying whether it is so. It has to hold for all inputs, in
    training too, and for all fields that the modules are made with. It holds for exactly this type: subclasses
    are tried, as are modules of types that nobody registered.

    Args:
      module_type: a class of linen or nnx modules.
      weights: name of the leaf.
      equation: of the product of the first array argument and the leaf. `None`: modules have it in their field
        `einsum_str`, or as an argument of their call.

    Raises:
      TypeError: it is no class of linen or nnx modules.
      ValueError: it is no equation of two operands, or an axis of the leaf is neither in the input nor in the output.
    """
    if not (isinstance(module_type, type) and any("__call__" in vars(base) for base in module_type.__mro__)):
        raise TypeError(f"register_linear takes a class of linen or nnx modules, got {module_type!r}.")
    if not isinstance(weights, str) or not weights:
        raise TypeError(f"register_linear: weights is the name of a leaf, got {weights!r}.")
    if equation is not None and not is_equation(equation):
        raise ValueError(
            f"register_linear: equation is that of an einsum of input and weights, such as '...i,io->...o', in which "
            f"each axis of the weights is one of the input or of the output; got {equation!r}."
        )

    def describe(host: ModuleInfo) -> LinearMap:
        return by_equation(host, equation_of(host, weights) if equation is None else equation, weights)

    _known[module_type] = _Known(describe)


def register_known(
    module_type: type,
    describe: Callable[[ModuleInfo], LinearMap],
    plain: Collection[str] | None,
    defaults: Mapping[str, Any],
) -> None:
    """Registers a class of a library, whose modules need nothing but their own parameters.

    Args:
      module_type: the class. Subclasses are tried.
      describe: how a module of it is linear. Raises `TypeError` if it is not.
      plain: the fields which do not change that it is linear. `None`: all.
      defaults: what the other fields have to be, by name.
    """
    _known[module_type] = _Known(describe, plain, defaults, alone=True)


def register_by_name(module: str, name: str, transposed: bool, plain: Collection[str]) -> None:
    """Registers a class like `nn.Dense` of a library, which is not imported for this.

    Args:
      module, name: of the class.
      transposed: whether its kernel is `(d_out, d_in)`.
      plain: its fields which do not change that it is linear.
    """
    _known_by_name[module, name] = _Known(lambda host: dense(host, transposed), plain, alone=True)


def linear_map(host: ModuleInfo) -> LinearMap:
    """How a module is linear in one of its leaves.

    Args:
      host: the module, as a trace of its model saw it. Shapes suffice.

    Raises:
      TypeError: it is not, or nothing says that it is. The message says what was found, and what to do.
    """
    known = _of(host.type)
    if known is not None and known.is_plain(host):
        return known.describe(host)
    return _found(host).linear


def runs_alone(host: ModuleInfo) -> bool:
    """Whether `apply` on a linear module's own parameters and one array gives what the module computes in its model."""
    known = _of(host.type)
    if known is not None and known.is_plain(host) and known.alone is not None:
        given = [value for value in (*host.args, *host.kwargs.values()) if value is not None]
        return known.alone and len(given) == 1
    return _found(host, registered=known is not None and known.is_plain(host)).alone


def known_map(host: ModuleInfo) -> LinearMap | None:
    """Which axes of its weights a module's features meet, also if it is not linear; `None` if that is not known."""
    try:
        if (known := _of(host.type)) is not None:
            return known.describe(host)
        maps = _candidates(host)
        return maps[0] if len(maps) == 1 else linear_map(host)
    except TypeError:
        return None


def weight_edits(host: ModuleInfo, rule: Any) -> Iterator[WeightEdit]:
    """The edits of the weight in which a module is linear; of a `FeatureRule` on the output side, of its bias too.

        def edits(self, host, structure):
            yield from jdelta.weight_edits(host, MyRule())

    Args:
      host: the module.
      rule: what happens to its weight.

    Raises:
      TypeError: the module is not linear. The message says what was found, and what to do.
    """
    linear = linear_map(host)
    leaf = host.params[linear.weights]
    if isinstance(rule, FeatureRule):
        require_features(rule, linear, leaf.shape)
        _require_known_bias(rule, host, linear.weights)
    edit = WeightEdit((*host.path, linear.weights), rule, linear=linear, shape=leaf.shape)
    yield dataclasses.replace(edit, by_module=True, in_call=True, alone=runs_alone(host))
    if isinstance(rule, FeatureRule) and rule.side == "out" and "bias" in host.params:
        shape = host.params["bias"].shape
        yield WeightEdit(
            (*host.path, "bias"),
            rule,
            auxiliary=True,
            is_bias=True,
            linear=MatrixMap("bias", ()),
            shape=shape,
            by_module=True,
            in_call=True,
        )


def _require_known_bias(rule: FeatureRule, host: ModuleInfo, weights: str) -> None:
    """Raises `TypeError` if what comes out of a module may have a bias of which that is not known."""
    if rule.side == "out" and (others := host.params.keys() - {weights, "bias"}):
        raise TypeError(
            f"{type(rule).__name__} changes all that comes out, and a bias is known by its name, 'bias'. This one has "
            f"{min(others)!r} besides {weights!r}, so that merging would miss a part. Rename it, or take LoRA."
        )


def require_features(rule: FeatureRule, linear: AnyMap, shape: tuple[int, ...]) -> None:
    """Raises `TypeError` unless a module's features of the rule's side are in its last axes alone."""
    side, layout = rule.side, linear.layout(shape)
    if isinstance(linear, MatrixMap):
        last = side == "out" or sorted(linear.axis) == list(range(-len(linear.axis), 0))
    elif isinstance(linear, EinsumMap):
        x_axes, w_axes, y_axes = operands(linear.equation)
        letters = "".join(w_axes[i] for i in layout.numbers(side))
        last = not layout.shared and (x_axes if side == "in" else y_axes).endswith(letters)
    else:
        last = side == "out" and not isinstance(linear, StoredMap)
    if not last:
        raise TypeError(
            f"{type(rule).__name__} changes features that go {side}, which have to be in the last axes; those of this "
            "module are not."
        )


# --- what is tried


@dataclasses.dataclass(frozen=True)
class _Found:
    """What trying a module gave: how it is linear, or why it is not."""

    maps: tuple[LinearMap, ...]
    error: str
    alone: bool

    @property
    def linear(self) -> LinearMap:
        if not self.maps:
            raise TypeError(self.error)
        return self.maps[0]


_tried: collections.OrderedDict[Any, _Found] = collections.OrderedDict()
_MOST_TRIED = 256


def _found(host: ModuleInfo, registered: bool = False) -> _Found:
    """What trying a module gives; modules that differ in their initialisers alone are tried once."""
    fields = {key: value for key, value in host.fields.items() if not is_initializer(key, value)}
    shapes = tuple((key, leaf.shape, leaf.dtype) for key, leaf in host.params.items())
    key = (registered, shapes, structural_key(dataclasses.replace(host, fields=fields)))
    if key not in _tried:
        _tried[key] = _try(host, registered)
        while len(_tried) > _MOST_TRIED:
            _tried.popitem(last=False)
    return _tried[key]


def _try(host: ModuleInfo, registered: bool) -> _Found:
    if registered:
        return _Found((), "", probing.runs_alone(host))
    try:
        maps = _candidates(host)
    except TypeError as error:
        return _Found((), str(error), False)
    problems = []
    for linear in maps:
        if (problem := probing.problem(host, linear)) is None:
            return _Found((linear,), "", probing.runs_alone(host))
        problems.append(problem)
    message = (
        f"it is not known to be linear in {maps[0].weights!r}, and {problems[0]}. Name a linear module inside it, or "
        f"take an adapter, which goes after any module. If it is linear, jdelta.register_linear({host.type.__name__}) "
        "says so."
    )
    return _Found((), message, False)


def _candidates(host: ModuleInfo) -> list[LinearMap]:
    """How a module is linear, if it is. Raises `TypeError` if it cannot be."""
    maps: list[LinearMap] = []
    problem = None
    base = next((known for base in host.type.__mro__ if (known := _of(base)) is not None), None)
    try:
        maps += [base.describe(host)] if base is not None else []
    except TypeError as error:
        problem = error
    for weights in host.params:
        if (equation := equation_in(host, weights)) is not None:
            maps.append(by_equation(host, equation, weights))
    maps += _by_shape(host) if problem is None else []
    if maps:
        return list(dict.fromkeys(maps))
    if problem is not None:
        raise problem
    if "kernel" not in host.params:
        raise TypeError("this one has no kernel of its own.")
    require_floats(host)
    shape = host.params["kernel"].shape
    raise TypeError(f"how this one uses its kernel of shape {shape} is unknown. An adapter goes after any module.")


def _by_shape(host: ModuleInfo) -> list[LinearMap]:
    """A product with a kernel whose axes are as wide as the last ones of input and output."""
    kernel = host.params.get("kernel")
    if kernel is None or not jnp.issubdtype(host.x.dtype, jnp.inexact):
        return []
    x, y, ndim = host.x.shape, host.y.shape, len(kernel.shape)
    maps: list[LinearMap] = [
        MatrixMap(axis=tuple(range(-n, 0)))
        for n in range(1, ndim)
        if kernel.shape == (*x[-n:], *y[n - ndim :]) and x[:-n] == y[: n - ndim]
    ]
    return [*maps, MatrixMap(transposed=True)] if kernel.shape == (*y[-1:], *x[-1:]) else maps


def _of(module_type: type) -> _Known | None:
    """What is known of exactly this type."""
    if (known := _known.get(module_type)) is not None:
        return known
    module, name = module_type.__module__, module_type.__qualname__
    known = _known_by_name.get((module, name))
    return known if getattr(sys.modules.get(module), name, None) is module_type else None


# --- checks


def _is_float(dtype: Any) -> bool:
    return dtype is None or jnp.issubdtype(dtype, jnp.inexact)


def _is_same(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, (int, str, type(None))) and value == default)
