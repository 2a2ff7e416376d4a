"""Runs edits around the calls of named modules, without touching the model's code.

An `Edit` says which layer goes where; `instrument` gives a copy of a linen module that runs edits whenever it is
applied or initialised. The layers' parameters live in the host's own Flax scope, so lifted transforms (`nn.scan`,
`nn.remat`, `nn.vmap`) treat them like the host's own.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import lift
from flax.core.scope import Scope, in_filter

from jdelta.hosts.linen import jit_cache, patches
from jdelta.hosts.linen.pickling import OF_EACH, packed, unpacked, with_class
from jdelta.trees import surgery
from jdelta.trees.surgery import Path


@dataclasses.dataclass(frozen=True, eq=False)
class Edit:
    """One change at one host module.

    Attributes:
      host: path of the module that is changed; the layer's parameters live below it.
      where: `"after"`, `y -> layer(y)`; `"before"`, `x -> layer(x)`; `"parallel"`, `y + layer(x)`, or what the layer's
        `joined(host, x)` returns, if it has that and it is not `None`; `"replace"`, `layer(*args, **kwargs)` in place
        of the host; `"around"`, `layer(host, *args, **kwargs)`, where `host` is a
        `Host` and `__call__` is `nn.nowrap`, so that modules which a compact host makes stay its own; `"train"`, no
        computation: the host's own leaf `leaf` trains with the delta.
      layer: an unbound linen module. It is told `deterministic` (or `train`) if its `__call__` has such an argument. If
        it has a method `during_run`, the whole model runs inside the context that this gives.
      start: for `"parallel"`, path of the module whose input is the layer's `x`, if that is not the host itself.
      leaf: path below the host: of the layer's parameters, or of the leaf that trains.
      helps: whether it only helps another edit, and its host is none of the delta's targets.
      outermost: whether it goes around all other edits of its host, whenever those were attached.
      needs: a leaf of the host's own without which it does nothing.
    """

    host: Path
    where: Literal["after", "before", "parallel", "replace", "around", "train"]
    layer: nn.Module | None = None
    start: Path | None = None
    leaf: Path = ()
    helps: bool = False
    outermost: bool = False
    needs: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "layer": packed(self.layer)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, layer=unpacked(state["layer"]))


@dataclasses.dataclass(frozen=True)
class Attachment:
    """A delta as the model knows it.

    Attributes:
      name: its name in the tree.
      edits: what it does.
      leaves: paths of its leaves in the tree.
      active: whether the model runs it.
      fixed: those of its leaves that never train.
      source: a module whose parameters are the leaves below `(name,)`, and which makes from them, once a run, leaves
        of the hosts that are not in the tree: `source() -> {path: array}`.
      made: the paths of what the source makes.
      config: its method's arguments.
    """

    name: str
    edits: tuple[Edit, ...]
    leaves: tuple[Path, ...] = ()
    active: bool = True
    fixed: frozenset[Path] = frozenset()
    source: nn.Module | None = None
    made: tuple[Path, ...] = ()
    config: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "source": packed(self.source)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, source=unpacked(state["source"]))

    @property
    def borrowed(self) -> tuple[Path, ...]:
        """Paths of the backbone's own leaves that train with the delta."""
        return tuple((*edit.host, *edit.leaf) for edit in self.edits if edit.where == "train")

    @property
    def left_behind(self) -> tuple[Edit, ...]:
        """What runs while it is off, for leaves of the hosts that merging may have added: see `merging.folded`."""
        layers = [(edit, getattr(edit.layer, "left_behind", None)) for edit in self.edits]
        behind = [(edit, *make()) for edit, make in layers if make is not None]
        return tuple(Edit(edit.host, edit.where, layer, helps=True, needs=leaf) for edit, leaf, layer in behind)

    @property
    def trained(self) -> set[Path]:
        """Paths of everything that trains with the delta: its own leaves and the borrowed."""
        return {*self.leaves, *self.borrowed} - self.fixed


# --- following the calls of one run


@dataclasses.dataclass(eq=False)
class Frame:
    """One module call in progress."""

    module: nn.Module
    path: Path
    deterministic: bool | None  # as the nearest enclosing call said it; None if none did
    nested: bool  # inside a nested `apply` on a tree of its own: no part of the model's tree
    again: bool  # within a call of the same module: super().__call__, or a scope shared with a child

    @property
    def body(self) -> Scope | None:
        """The scope that it is in of those which lifted transformations make, one for each run of theirs."""
        return None if self.module.scope is None else self.module.scope.root


class Calls:
    """The stack of module calls in progress."""

    def __init__(self, root_type: type[nn.Module], hosts: Collection[Path] = ()):
        self.edited = 0  # how many calls of hosts there were
        self._hosts = hosts
        self._root_type = root_type
        self._stack: list[Frame] = []

    @contextlib.contextmanager
    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> Iterator[Frame]:
        """Puts a call on the stack for as long as it runs."""
        frame = self._frame(module, args, kwargs)
        self._stack.append(frame)
        self.edited += frame.path in self._hosts
        try:
            yield frame
        finally:
            self._stack.pop()

    @property
    def inside_host(self) -> bool:
        """Whether the call of a host is in progress."""
        return any(frame.path in self._hosts for frame in self._stack)

    @property
    def newest(self) -> Path | None:
        """The path of the newest call; `None` if there is none, or one of no part of the model's tree."""
        return self._stack[-1].path if self._stack and not self._stack[-1].nested else None

    def around(self) -> list[Frame]:
        """The calls around the newest one, innermost first."""
        return self._stack[-2::-1]

    def runs(self, path: Path) -> bool:
        """Whether a call of the module at this path is in progress, or one of no part of the model's tree."""
        return any(frame.nested or frame.path == path for frame in self._stack)

    def inside(self, body: Scope | None) -> bool:
        """Whether calls in this `Frame.body` are in progress."""
        return any(frame.body is body for frame in self._stack)

    @property
    def state(self) -> Hashable:
        """What the next call's frame depends on, besides the call."""
        return tuple((frame.path, frame.nested, frame.deterministic) for frame in self._stack)

    @property
    def outer(self) -> Frame | None:
        """The call around the newest one."""
        return self._stack[-2] if len(self._stack) > 1 else None

    def _frame(self, module: nn.Module, args: tuple, kwargs: dict) -> Frame:
        outer = self._stack[-1] if self._stack else None
        path = module.scope.path if module.scope is not None else ()
        # A tied head runs as `head.apply({'params': …}, x)`: a root of its own, and not this one.
        nested = (outer is not None and outer.nested) or (path == () and not issubclass(self._root_type, type(module)))
        again = not nested and any(frame.path == path and not frame.nested for frame in self._stack)
        deterministic = _deterministic(module, args, kwargs)
        if deterministic is None and outer is not None:
            deterministic = outer.deterministic
        return Frame(module, path, deterministic, nested, again)


def _deterministic(module: nn.Module, args: tuple, kwargs: dict) -> bool | None:
    """What this call says of dropout: its `deterministic` or `train` argument, else the module's field of that name."""
    for name, index, default in _mode_arguments(type(module).__call__):
        value = kwargs.get(name, args[index] if index < len(args) else default)
        if not isinstance(value, (bool, np.bool_)):
            value = getattr(module, name, None)
        if isinstance(value, (bool, np.bool_)):
            return bool(value) if name == "deterministic" else not value
    return None


@functools.cache
def _mode_arguments(call: Callable) -> tuple[tuple[str, int, Any], ...]:
    parameters = list(inspect.signature(call).parameters.values())[1:]  # without self
    return tuple(
        (p.name, i if p.kind is p.POSITIONAL_OR_KEYWORD else 1 << 30, p.default)
        for i, p in enumerate(parameters)
        if p.name in ("deterministic", "train")
    )


# --- what a module takes and returns


def is_array(value: Any) -> bool:
    """Whether a value is an array, a tracer or the shape of one."""
    return isinstance(value, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))


def main_input(module_type: type[nn.Module], args: tuple, kwargs: Mapping[str, Any]) -> tuple[int | str, Any]:
    """Key and value of a call's first array: among the positional arguments, else among the keywords as the
    signature orders them.

    Raises:
      TypeError: no argument is an array.
    """
    for i, value in enumerate(args):
        if is_array(value):
            return i, value
    order = [name for name in _argument_names(module_type.__call__) if name in kwargs]
    for name in [*order, *kwargs]:
        if is_array(kwargs[name]):
            return name, kwargs[name]
    raise TypeError(f"{module_type.__name__} was called without an array argument.")


def input_if_any(module_type: type[nn.Module], args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """The value of `main_input`; `None` if the call has none."""
    try:
        return main_input(module_type, args, kwargs)[1]
    except TypeError:
        return None


def with_main_input(args: tuple, kwargs: dict, key: int | str, value: Any) -> tuple[tuple, dict]:
    """The same arguments with another array at the place of `main_input`."""
    if isinstance(key, int):
        return (*args[:key], value, *args[key + 1 :]), kwargs
    return args, {**kwargs, key: value}


def main_output(output: Any, x: Any = None) -> Any:
    """The array a module returns: itself, or one of the elements of a tuple, list, dict or model output.

    That is the first one if it is an array, as in `(y, weights)`; otherwise, as in `(cache, y)`, the only array, or the
    only one that has the shape of the module's input.

    Args:
      output: what the module returned.
      x: its main input, if it has one.

    Raises:
      TypeError: there is no such array, or several.
    """
    key = _main_key(output, x)
    return output if key is None else _elements(output)[key]


def with_main_output(output: Any, value: Any, x: Any = None) -> Any:
    """The same return value with another array at the place of `main_output`."""
    key = _main_key(output, x)
    if key is None:
        return value
    if dataclasses.is_dataclass(output):
        return dataclasses.replace(output, **{key: value})  # type: ignore[type-var]
    elements = {**_elements(output), key: value}
    if isinstance(output, Mapping):
        return type(output)(elements)  # type: ignore[call-arg]
    return type(output)(*elements.values()) if hasattr(output, "_fields") else type(output)(elements.values())


def _main_key(output: Any, x: Any) -> Any:
    """Where the main output is; `None` if it is the output itself."""
    if is_array(output):
        return None
    elements = _elements(output)
    arrays = {key: value for key, value in elements.items() if is_array(value)}
    ordered = dataclasses.is_dataclass(output) or isinstance(output, (tuple, list))  # a dict's order says nothing
    if ordered and arrays and next(iter(elements)) in arrays:
        return next(iter(elements))
    shape = None if x is None else jnp.shape(x)
    fitting = [key for key, value in arrays.items() if value.shape == shape]
    if len(fitting) != 1 and len(jax.tree.leaves(output)) == len(arrays) == 1:
        fitting = list(arrays)
    if len(fitting) == 1:
        return fitting[0]
    parts = ", ".join(f"{key}: {_brief(value)}" for key, value in elements.items())
    shown = f"{type(output).__name__}({parts})" if elements else f"an object of type {type(output).__name__}"
    if not arrays:
        raise TypeError(f"expected an array, or a tuple, dict or model output that holds one, got {shown}.")
    wanted = f"the input's shape {tuple(shape)}" if shape is not None else "the shape of an input"
    raise TypeError(
        f"it returns {shown}, and which element is its output is not clear: the first one if that is an array, "
        f"otherwise the only array, or the only one of {wanted}, which {len(fitting)} have. Name a module inside it or "
        "around it that returns one array, or choose the element in a layer of your own, by a jdelta.Edit that goes "
        "'around' it."
    )


def _elements(output: Any) -> dict[Any, Any]:
    """The elements of a return value by key; of anything else, none."""
    if isinstance(output, type):
        return {}
    if dataclasses.is_dataclass(output):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    if isinstance(output, Mapping):
        return dict(output)
    return dict(enumerate(output)) if isinstance(output, (tuple, list)) else {}


def _brief(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if is_array(value) else type(value).__name__


def arguments(module_type: type[nn.Module], args: tuple, kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    """The arguments of a call by name; `args` begins with `None`, for `self`."""
    return _signature(module_type.__call__).bind(None, *args, **kwargs)


@functools.cache
def _signature(call: Callable) -> inspect.Signature:
    return inspect.signature(call)


@functools.cache
def _argument_names(call: Callable) -> tuple[str, ...]:
    return tuple(_signature(call).parameters)


def describe(module: nn.Module) -> str:
    """Name and class of a bound module, for messages."""
    path = module.scope.path if module.scope is not None else ()
    return f"{surgery.name_of(path) or 'the root module'} ({type(module).__name__})"


# --- the interceptor

Watcher = Callable[[Frame, Callable], Callable]

_runs: contextvars.ContextVar[tuple[tuple[Hashable, Calls], ...]] = contextvars.ContextVar("runs", default=())


class Host:
    """What an "around" layer is given: calling it runs the host."""

    def __init__(self, call: Callable, frame: Frame, watchers: list[Watcher]):
        self._call = call
        self.frame = frame
        self._watchers = watchers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the host."""
        return self._call(*args, **kwargs)

    @contextlib.contextmanager
    def watched(self, watch: Watcher) -> Iterator[None]:
        """While this lasts, every `call` inside the host is replaced by `watch(frame, call)`."""
        self._watchers.append(watch)
        try:
            yield
        finally:
            self._watchers.remove(watch)


@contextlib.contextmanager
def running(
    edits: Sequence[Edit], root_type: type[nn.Module], name: Hashable, ran: set[Edit] | None = None
) -> Iterator[None]:
    """Runs the edits around the calls of one run of a model, while this lasts.

    A run inside another, as of `module.clone().apply(…)` in a method of the module, has calls of its own.

    Args:
      edits: in the order of attaching. Each goes around the earlier ones of its host, and those that are `outermost`
        around all.
      root_type: the class of the module that is applied or initialised.
      name: of these edits, among all others: runs under the same name share what `nn.jit` traced.
      ran: where to note the edits that were run.
    """
    by_host: dict[Path, list[Edit]] = {}
    for edit in sorted(edits, key=lambda edit: edit.outermost):
        if edit.layer is not None:
            by_host.setdefault(edit.host, []).append(edit)
    calls = Calls(root_type, by_host)
    starts = {edit.start for edit in edits if edit.start is not None}
    inputs: dict[Path, _Input] = {}  # of each start's newest call
    watchers: list[Watcher] = []  # of the hosts in progress, outermost first

    def intercept(next_call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        if context.method_name != "__call__" or _runs.get()[-1][1] is not calls:
            return next_call(*args, **kwargs)
        with calls.enter(context.module, args, kwargs) as frame:
            if frame.nested or frame.again:
                return next_call(*args, **kwargs)

            def run(*args: Any, **kwargs: Any) -> Any:
                if frame.path in starts:
                    inputs[frame.path] = _Input(main_input(type(frame.module), args, kwargs)[1], frame.body)
                # Each edit wraps what the earlier ones made of the host.
                call = next_call
                for edit in by_host.get(frame.path, ()):
                    if edit.needs is not None and not frame.module.has_variable("params", edit.needs):
                        continue
                    if edit.where == "around":
                        call = functools.partial(_layer(edit, frame), Host(call, frame, watchers))
                    else:
                        call = functools.partial(_run, edit, call, frame, inputs, calls, call is next_call)
                    if ran is not None:
                        ran.add(edit)
                return call(*args, **kwargs)

            call: Callable = run
            for watch in watchers:
                call = watch(frame, call)
            return call(*args, **kwargs)

    def mark(module: nn.Module) -> Hashable:
        path = module.scope.path if module.scope is not None else ()
        within = (edit for edit in edits if edit.start in inputs and edit.host[: len(path)] == path)
        if watchers or any(within):
            return jit_cache.unique()  # arrays from outside would become constants of what is kept
        return name, path, calls.state

    token = _runs.set((*_runs.get(), (name, calls)))
    try:
        with contextlib.ExitStack() as stack:
            for during_run in (getattr(edit.layer, "during_run", None) for edit in edits):
                if during_run is not None:
                    stack.enter_context(during_run())
            stack.enter_context(patches.patched(vars(lift), "custom_vjp", _within_run))
            stack.enter_context(nn.intercept_methods(intercept))
            stack.enter_context(jit_cache.marked(mark))
            yield
    finally:
        _runs.reset(token)


def _within_run(custom_vjp: Callable) -> Callable:
    """Flax's `custom_vjp`, which says so if JAX traces its functions after the run, where no edit would be heard.

    Private API of flax: `nn.custom_vjp` looks the name up in `flax.core.lift` when it is called. A test notices if not.
    """

    @functools.wraps(custom_vjp)
    def checked(fn: Callable, forward_fn: Callable, *args: Any, **kwargs: Any) -> Any:
        if not _runs.get():
            return custom_vjp(fn, forward_fn, *args, **kwargs)
        calls = _runs.get()[-1][1]
        concerned = calls.inside_host

        def within(function: Callable) -> Callable:
            @functools.wraps(function)
            def run(*args: Any, **kwargs: Any) -> Any:
                nonlocal concerned
                if concerned and all(other is not calls for _, other in _runs.get()):
                    raise NotImplementedError(
                        "the forward pass of an nn.custom_vjp was traced after the model ran, where the deltas in it "
                        "are not heard. Take the gradient inside jax.jit: jax.jit(jax.grad(loss)) in place of "
                        "jax.grad(jax.jit(loss))."
                    )
                before = calls.edited
                output = function(*args, **kwargs)
                concerned |= calls.edited > before
                return output

            return run

        return custom_vjp(within(fn), within(forward_fn), *args, **kwargs)

    return checked


@dataclasses.dataclass(frozen=True)
class _Input:
    """What a span starts from, and where that was."""

    x: Any
    body: Scope | None

    def is_gone(self, frame: Frame, calls: Calls) -> bool:
        """Whether it was made inside a transformed module, such as one of `nn.remat`, that has ended."""
        levels = [body and body.trace_level for body in (self.body, frame.body)]
        return levels[0] != levels[1] and not calls.inside(self.body)


def _run(
    edit: Edit,
    call: Callable,
    frame: Frame,
    inputs: Mapping[Path, _Input],
    calls: Calls,
    first: bool,
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if edit.where == "replace":
        return _layer(edit, frame)(*args, **kwargs)
    if edit.where == "before":
        key, x = main_input(type(frame.module), args, kwargs)
        new = _same_dtype(_layer(edit, frame)(x), x)
        args, kwargs = with_main_input(args, kwargs, key, new)
        return call(*args, **kwargs)
    if edit.where == "after":
        output = call(*args, **kwargs)
        given = input_if_any(type(frame.module), args, kwargs)
        y = main_output(output, given)
        return with_main_output(output, _same_dtype(_layer(edit, frame)(y), y), given)
    # parallel
    if edit.start is None or edit.start == edit.host:
        x = main_input(type(frame.module), args, kwargs)[1]
    elif edit.start in inputs:
        if inputs[edit.start].is_gone(frame, calls):
            raise ValueError(
                f"the span from {surgery.name_of(edit.start)} to {describe(frame.module)} leads out of a module "
                "that is transformed as a whole (by nn.jit, nn.remat, nn.scan, …), and values cannot leave it that "
                "way. Name two modules inside it, or two outside."
            )
        x = inputs[edit.start].x
    else:
        raise ValueError(
            f"the span to {describe(frame.module)} starts at {surgery.name_of(edit.start)}, which was not called "
            "before it in this run of the model."
        )
    if first and edit.start in (None, edit.host) and len(args) + len(kwargs) == 1:
        layer, mode = _bound(edit, frame)
        joined = getattr(layer, "joined", None)
        if joined is not None and (y := joined(frame.module, x, **mode)) is not None:
            return y
    output, given = call(*args, **kwargs), input_if_any(type(frame.module), args, kwargs)
    y = main_output(output, given)
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = _same_dtype(x, y)  # T5's norms give float32 to a Dense that computes in bfloat16
    change = _layer(edit, frame)(x)
    if jnp.shape(change) != y.shape:
        raise ValueError(
            f"the parallel layer {type(edit.layer).__name__} at {describe(frame.module)} returned shape "
            f"{jnp.shape(change)}, but the module's output has shape {y.shape}."
        )
    return with_main_output(output, y + _same_dtype(change, y), given)


def _layer(edit: Edit, frame: Frame) -> Callable:
    """The edit's layer, bound into the host's scope and told whether dropout is on."""
    layer, mode = _bound(edit, frame)
    return functools.partial(layer, **mode) if mode else layer


def _bound(edit: Edit, frame: Frame) -> tuple[Any, dict[str, bool]]:
    """The edit's layer, bound into the host's scope, and its argument that says whether dropout is on, if it has it."""
    assert edit.layer is not None
    scope = frame.module.scope
    for key in edit.leaf:
        scope = scope.push(key, reuse=True)  # reuse: a module called several times shares one delta
    layer = edit.layer.clone(parent=scope, name=None)
    names = _argument_names(type(layer).__call__)
    if "deterministic" not in names and "train" not in names:
        return layer, {}
    deterministic = frame.deterministic
    if deterministic is None:
        deterministic = not scope.has_rng("dropout")
    return layer, {"deterministic": deterministic} if "deterministic" in names else {"train": not deterministic}


def _same_dtype(new: Any, old: Any) -> Any:
    """A delta never changes the precision that the backbone computes in.

    Raises:
      TypeError: what the layer computes would be cut off: whole numbers, or real ones, are in its place.
    """
    for a in jax.tree.leaves(new):
        is_complex = jnp.issubdtype(a.dtype, jnp.complexfloating)
        if not jnp.issubdtype(old.dtype, jnp.complexfloating if is_complex else jnp.inexact):
            raise TypeError(f"a layer gives {a.dtype} where the model has {old.dtype}, which would be cut off.")
    return jax.tree.map(lambda a: a.astype(old.dtype), new)


# --- a module that runs edits


def instrument(module: nn.Module, attachments: Sequence[Attachment], ran: set[Edit] | None = None) -> nn.Module:
    """A copy of a linen module that runs the active attachments' edits in `apply`, `init` and `init_with_output`.

    It is an instance of a subclass with the name, docstring, fields and signatures of the original. Its `apply`
    raises `ValueError` for a tree that lacks leaves of an active attachment or holds leaves of an inactive one, and
    `RuntimeError` for one that was donated. Bound in any other way it raises `NotImplementedError`.
    `instrument(module, ())` is the original module. In `ran`, the edits that were run are noted.
    """
    module = bare(module)
    if not attachments:
        return module
    original = type(module)
    edits, number = _edits_of(attachments), jit_cache.unique()

    @nn.nowrap
    @functools.wraps(original.apply)
    def apply(self: nn.Module, variables: Any, *args: Any, **kwargs: Any) -> Any:
        creating = in_filter(kwargs.get("mutable", False), "params")
        _check_leaves(variables.get("params", {}), attachments, creating)
        surgery.require_alive(variables)
        with running(edits, type(self), number, ran):
            return original.apply(self, with_made(variables, attachments), *args, **kwargs)

    @nn.nowrap
    @functools.wraps(original.init_with_output)
    def init_with_output(self: nn.Module, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        with running(edits, type(self), number, ran):
            output, variables = original.init_with_output(self, rngs, *args, **kwargs)
        return output, _without_made(variables, attachments, rngs)

    def __post_init__(self: nn.Module) -> None:
        original.__post_init__(self)
        if isinstance(self.parent, nn.Module):
            raise ValueError(
                f"{original.__name__} carries deltas and cannot be a part of {type(self.parent).__name__}: they would "
                "not run there. Detach them, and attach to a jdelta.Backbone of the outer module."
            )
        if self.scope is not None and number not in [name for name, _ in _runs.get()]:
            raise NotImplementedError(
                f"{original.__name__} carries deltas, which run inside its own apply and init alone; bound in another "
                "way, as nn.apply(fn, module), nn.init(fn, module) and module.bind do, it would run without them. Use "
                "module.apply({'params': params}, …, method=fn) or module.init(rng, …, method=fn): fn is any function "
                "of the module, and returns what is computed with it."
            )

    @nn.nowrap
    def __reduce__(self: nn.Module) -> tuple[Any, ...]:
        return _unpickled, (packed(bare(self)), attachments_of(self))

    @nn.nowrap
    def __copy__(self: nn.Module) -> nn.Module:
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    @nn.nowrap
    def __deepcopy__(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        memo[id(self)] = copied = object.__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    namespace = {
        "apply": apply,
        "__post_init__": __post_init__,
        "__reduce__": __reduce__,
        "__copy__": __copy__,
        "__deepcopy__": __deepcopy__,
        "init_with_output": init_with_output,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_jdelta": (module, tuple(attachments)),
    }
    return _copied(module, original, namespace)


def _copied(module: nn.Module, original: type[nn.Module], namespace: dict[str, Any]) -> nn.Module:
    """A copy of an unbound module, of a subclass with this namespace. It is not constructed: no `__init__` runs."""
    metaclass: Any = type(original)
    # The base is given afterwards: flax then makes no dataclass of the subclass, with an `__init__`, `__eq__` and
    # `__hash__` in place of those that the original may define, and no `__init_subclass__` hears of it.
    subclass = metaclass(original.__name__, (_NoBase,), namespace)
    subclass.__bases__ = (original,)
    return _unbound(subclass, module)


def _unbound(cls: type[nn.Module], module: nn.Module) -> nn.Module:
    """An unbound instance of a class, with what is set on the module."""
    return with_class(cls, vars(module if module.scope is None else module.clone()))


def _unpickled(module: Any, attachments: Sequence[Attachment]) -> nn.Module:
    return instrument(unpacked(module), attachments)


class _NoBase:
    """Where the bases of a subclass are still to come."""


def _edits_of(attachments: Sequence[Attachment]) -> list[Edit]:
    """The edits of those that are active, and what the others left behind: at each host once."""
    edits: list[Edit] = []
    seen: set[tuple[Path, type]] = set()
    for attachment in attachments:
        for edit in attachment.edits if attachment.active else attachment.left_behind:
            key = (edit.host, type(edit.layer))
            if attachment.active or key not in seen:
                edits.append(edit)
            seen |= set() if attachment.active else {key}
    return edits


def with_made(variables: Any, attachments: Sequence[Attachment]) -> Any:
    """The variables with the leaves that the sources make."""
    for attachment in attachments:
        if attachment.active and attachment.source is not None and attachment.name in variables.get("params", {}):
            made = attachment.source.apply({"params": variables["params"][attachment.name]})
            params = surgery.unflatten({**surgery.flatten(variables["params"]), **made})
            variables = {**variables, "params": params}
    return variables


def _without_made(variables: Any, attachments: Sequence[Attachment], rngs: Any) -> Any:
    """Fresh variables with the sources' parameters in place of what they make."""
    rng = rngs["params"] if isinstance(rngs, Mapping) else rngs
    for attachment in attachments:
        if attachment.active and attachment.source is not None and "params" in variables:
            own = attachment.source.init(rng)["params"]
            leaves = surgery.flatten(variables["params"])
            kept = {path: leaf for path, leaf in leaves.items() if path not in attachment.made}
            params = surgery.graft(surgery.unflatten(kept), {attachment.name: own})
            variables = {**variables, "params": params}
    return variables


def bare(module: nn.Module) -> nn.Module:
    """The original of an instrumented module; any other module as it is.

    A clone with other fields, or one on which something was set, has an original of its own.
    """
    original = vars(type(module)).get("_jdelta", (module,))[0]
    mine, its = ({k: v for k, v in vars(m).items() if k not in OF_EACH} for m in (module, original))
    if mine.keys() == its.keys() and all(mine[key] is its[key] for key in mine):
        return original
    return _unbound(type(original), module)


def attachments_of(module: nn.Module) -> tuple[Attachment, ...]:
    """What an instrumented module carries, in the order of attaching; `()` for any other module."""
    return vars(type(module)).get("_jdelta", (module, ()))[1]


def _check_leaves(params: Any, attachments: Sequence[Attachment], creating: bool) -> None:
    for attachment in attachments:
        if attachment.active and not creating:
            for path in attachment.leaves:
                if not _holds(params, path):
                    raise ValueError(
                        f"delta {attachment.name!r} is attached, but the parameters lack "
                        f"{surgery.name_of(path)!r}. Pass model.params, put the leaves in with "
                        "jdelta.graft(params, delta.init(rng)), or call delta.detach()."
                    )
        elif not attachment.active:
            for path in attachment.leaves:
                if _holds(params, path):
                    raise ValueError(
                        f"delta {attachment.name!r} is detached, but the parameters hold "
                        f"{surgery.name_of(path)!r}. Take the leaves out with jdelta.prune(params, delta), or call "
                        "delta.attach()."
                    )


def _holds(tree: Any, path: Path) -> bool:
    for key in path:
        try:
            tree = tree[key]
        except (KeyError, TypeError, IndexError):
            return False
    return True
