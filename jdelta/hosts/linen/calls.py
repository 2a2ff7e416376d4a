"""The module calls that are in progress in one run of a model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from typing import Any

import numpy as np
from flax import linen as nn
from flax.core.scope import Scope

from jdelta.core.arguments import arguments, is_array
from jdelta.core.context import Context, current_step
from jdelta.hosts import call_edits
from jdelta.trees import surgery
from jdelta.trees.surgery import Path


@dataclasses.dataclass(eq=False)
class Frame:
    """One module call in progress."""

    module: nn.Module
    path: Path
    deterministic: bool | None  # as the nearest enclosing call said it; None if none did
    nested: bool  # inside a nested `apply` on a tree of its own: no part of the model's tree
    again: bool  # within a call of the same module: super().__call__, or a scope shared with a child
    args: tuple = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    outer: Frame | None = None

    @property
    def module_type(self) -> type:
        """The module's class."""
        return type(self.module)

    @property
    def scope(self) -> Scope:
        """The scope of the module, which is bound while it is called."""
        assert self.module.scope is not None
        return self.module.scope

    @property
    def body(self) -> Scope | None:
        """The scope that it is in of those which lifted transformations make, one for each run of theirs."""
        return None if self.module.scope is None else self.module.scope.root

    @property
    def is_deterministic(self) -> bool:
        """Whether dropout is off: as the nearest enclosing call said it; if none did, unless there is a key for it."""
        return not self.scope.has_rng("dropout") if self.deterministic is None else self.deterministic

    def scope_below(self, path: Path) -> Scope:
        """A scope of a delta below that of the module."""
        scope = self.scope
        for key in path:
            scope = scope.push(key, reuse=True)  # reuse: a module called several times shares one delta
        return scope

    def describe(self) -> str:
        """Name and class of the module, for messages."""
        return f"{surgery.name_of(self.path) or 'the root module'} ({type(self.module).__name__})"

    def has_cache(self) -> bool:
        """Whether the module holds a cache of earlier tokens that this call continues."""
        return self.scope.is_mutable_collection("cache") and bool(self.scope.variables().get("cache"))

    def context(self) -> Context:
        """What layers and rules are told of this call."""
        mask, positions = (self._nearest(names) for names in (call_edits.MASKS, call_edits.POSITIONS))
        return Context(self.is_deterministic, mask, positions, current_step())

    def _nearest(self, names: Collection[str]) -> Any:
        """The array, `(batch, seq)`, that the nearest call in the same body was given by one of these names."""
        frame: Frame | None = self
        while frame is not None and frame.body is self.body:
            given = arguments(type(frame.module), frame.args, frame.kwargs).arguments
            for name in names:
                if is_array(given.get(name)) and given[name].ndim == 2:
                    return given[name]
            frame = frame.outer
        return None


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
        frame = self.frame_of(module, args, kwargs)
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

    def frame_of(self, module: nn.Module, args: tuple, kwargs: dict) -> Frame:
        """The frame of a call that begins now."""
        outer = self._stack[-1] if self._stack else None
        path = module.scope.path if module.scope is not None else ()
        # A tied head runs as `head.apply({'params': …}, x)`: a root of its own, and not this one.
        nested = (outer is not None and outer.nested) or (path == () and not issubclass(self._root_type, type(module)))
        again = not nested and any(frame.path == path and not frame.nested for frame in self._stack)
        deterministic = _deterministic(module, args, kwargs)
        if deterministic is None and outer is not None:
            deterministic = outer.deterministic
        return Frame(module, path, deterministic, nested, again, args, kwargs, outer)


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
