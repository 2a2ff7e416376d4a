"""Runs edits around the calls of nnx modules, without touching the model's code: what a module's role does."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx
from flax.nnx import tracers

from jdelta.core import weights
from jdelta.core.arguments import main_input
from jdelta.core.edits import Attachment, CallEdit, Edit, WeightEdit
from jdelta.core.host import Trial
from jdelta.core.rules import dropout_of
from jdelta.hosts import attention_parts, call_edits, weight_forms
from jdelta.hosts.call_edits import Host, Watcher
from jdelta.hosts.nnx import graph
from jdelta.hosts.nnx.creating import is_creating, noted
from jdelta.hosts.nnx.frames import CALL, Frame
from jdelta.hosts.nnx.roles import Edits
from jdelta.hosts.nnx.swapping import class_of, one_at_a_time
from jdelta.hosts.nnx.weight_calls import ModuleCall, own_of
from jdelta.trees import surgery
from jdelta.trees.surgery import Path

_run: contextvars.ContextVar[_Run | None] = contextvars.ContextVar("run", default=None)
_trial: contextvars.ContextVar[Trial | None] = contextvars.ContextVar("trial", default=None)


@contextlib.contextmanager
def trying(trial: Trial) -> Iterator[None]:
    """While this lasts, what is run is noted."""
    token = _trial.set(trial)
    try:
        yield
    finally:
        _trial.reset(token)


def drops_out(edit: Edit) -> bool:
    """Whether an edit does something else in training, for which it may need random numbers."""
    if isinstance(edit, WeightEdit):
        return bool(dropout_of(edit.rule))
    return edit.layer is not None and call_edits.asks_for_mode(edit.layer)


class _Run:
    """One run of a model, or of a part of it."""

    def __init__(self, root: Edits | None):
        self.root = root
        self.frames: list[Frame] = []
        self.inputs: dict[Path, tuple[Any, tracers.TraceState]] = {}  # of each start's newest call
        self.watchers: list[Watcher] = []  # of the hosts in progress, outermost first
        self.left_out: set[str] = set()  # names of deltas that generate nothing in this run

    def leaves_out(self, module: nnx.Module, name: str) -> bool:
        """Whether the state that the module was made of says that a delta is left out."""
        return name in self.left_out or graph.is_left_out(module, name)


@dataclasses.dataclass(frozen=True)
class Edited:
    """The role of a module with edits, or around or inside ones that have some."""

    edits: Edits

    @property
    def reads(self) -> bool:
        """Whether a parameter of the module is read with changes."""
        return bool(self.edits.rewritten)

    def run(self, module: nnx.Module, name: str, call: Callable, args: tuple, kwargs: dict) -> Any:
        """Runs a function of the module with its edits."""
        run, attachments = _run.get(), self.edits.attachments
        if run is not None and (not attachments or run.root == self.edits):
            return self._run_in(run, module, name, call, args, kwargs)
        token = _run.set(run := _Run(self.edits if attachments else None))
        try:
            with contextlib.ExitStack() as stack:
                if any(a.active and a.generator is not None for a in attachments):
                    stack.enter_context(one_at_a_time)
                for attachment in (a for a in attachments if a.active):
                    if graph.is_left_out(module, attachment.name):
                        run.left_out.add(attachment.name)
                        continue
                    stack.enter_context(_generated(module, attachment))
                    for during_run in (getattr(edit.layer, "during_run", None) for edit in attachment.edits):
                        if during_run is not None:
                            stack.enter_context(during_run())
                return self._run_in(run, module, name, call, args, kwargs)
        finally:
            _run.reset(token)

    def read(self, module: nnx.Module, name: str, variable: nnx.Variable) -> nnx.Variable:
        """A parameter with its changes while the model runs; at any other time as it is stored."""
        edits, run = self.edits.rewritten.get(name), _run.get()
        if not edits or run is None:
            return variable
        self._require_leaves(run, module)
        edits = tuple(edit for edit in edits if not run.leaves_out(module, edit.name))
        if not edits:
            return variable
        stored = variable.get_value()
        # In a scan over layers, a module has one layer's.
        seen = [e if stored.ndim > len(e.shape) else dataclasses.replace(e, layers=()) for e in edits]
        value = weights.changed(seen, stored, [own_of(edit, module) for edit in edits])
        trial = _trial.get()
        if trial is not None:
            trial.ran.update(edits)
            if (probe := trial.probes.get(surgery.name_of(edits[0].leaf))) is not None:
                value = value + probe.astype(value.dtype)
        return variable.replace(value)

    def _run_in(self, run: _Run, module: nnx.Module, name: str, call: Callable, args: tuple, kwargs: dict) -> Any:
        outer = run.frames[-1] if run.frames else None
        if any(frame.module is module and frame.name == name for frame in run.frames):
            return call(*args, **kwargs)  # a call of itself in a call of the module
        frame = Frame(module, self.edits.path, name, args, kwargs, outer, tracers.TraceState())
        run.frames.append(frame)
        try:
            return self._edited(run, frame, call)(*args, **kwargs)
        finally:
            run.frames.pop()

    def _edited(self, run: _Run, frame: Frame, call: Callable) -> Callable:
        mine = self.edits.calls.get(frame.name, ())
        of_weights = self.edits.weights if frame.name == CALL else ()
        if mine or of_weights:
            self._require_leaves(run, frame.module)
        mine = tuple(edit for edit in mine if not edit.leaf or not run.leaves_out(frame.module, edit.leaf[0]))
        of_weights = tuple(edit for edit in of_weights if not run.leaves_out(frame.module, edit.name))

        def edited(*args: Any, **kwargs: Any) -> Any:
            if frame.name == CALL and self.edits.starts_span:
                run.inputs[frame.path] = main_input(frame.module_type, args, kwargs)[1], frame.trace
            made = call
            if self.edits.inside is not None and frame.name == CALL:
                made = functools.partial(self.edits.inside.run, frame.module, call, _trial.get())
            if of_weights:
                made = functools.partial(weight_forms.run, of_weights, made, ModuleCall(frame))
            for edit in mine:
                if edit.needs is not None and not graph.is_added(frame.module, edit.needs):
                    continue
                layer = _bound(run, edit, frame)
                if edit.where == "around":
                    made = functools.partial(layer, Host(made, frame, run.watchers))
                else:
                    made = functools.partial(call_edits.run, edit, made, frame, layer, _span_input(run, edit, frame))
            if (trial := _trial.get()) is not None:
                trial.ran.update((*mine, *of_weights))
            return made(*args, **kwargs)

        heard: Callable = edited
        for watch in run.watchers if frame.name == CALL else ():
            heard = watch(frame, heard)
        return heard

    def _require_leaves(self, run: _Run, module: nnx.Module) -> None:
        """Raises `ValueError` if the state that the module was made of lacks a leaf."""
        if is_creating():
            return
        for path in self.edits.leaves:
            if path[0] not in run.left_out and path[1:] not in graph.leaves_of(module, path[0]):
                raise ValueError(
                    f"delta {path[0]!r} is attached, but the model's state lacks "
                    f"{surgery.name_of((*self.edits.path, *path))!r}. Take both from the same model: graphdef, state = "
                    "nnx.split(model)."
                )


def _bound(in_progress: _Run, edit: CallEdit, frame: Frame) -> Callable:
    """The edit's layer with its leaves, told what it asks for of the call."""
    assert edit.layer is not None
    layer, name = edit.layer.clone(parent=None, name=None), edit.leaf[0] if edit.leaf else ""
    told = call_edits.told(layer, lambda: frame.is_deterministic(name), lambda: frame.context(name))
    n = len(edit.leaf)
    own = {path: v for path, v in _own(frame.module, name).items() if path[:n] == edit.leaf}
    leaves: Any = graph.nested({path[n:]: leaf for path, leaf in own.items()})
    if edit.needs is not None:
        leaves = {edit.needs: graph.own_leaves(frame.module)[edit.needs]}

    def initialised(args: tuple, kwargs: Mapping[str, Any], key: jax.Array) -> Any:
        with _alone(in_progress):
            if edit.where == "around":
                args = (_copied_host(frame, in_progress.watchers), *args[1:])
            return _initialised(layer, key, told, args, kwargs)

    def run(*args: Any, **kwargs: Any) -> Any:
        if is_creating() and not leaves and edit.leaf:
            given = noted((frame.path, edit.leaf), functools.partial(initialised, args, kwargs))
        else:
            given = leaves
        holder = frame.holder(name)
        key = holder.dropout_key() if holder is not None and not holder.is_deterministic else None
        bound: Any = layer.bind({"params": given}, rngs={} if key is None else {"dropout": key})
        return bound(*args, **told, **kwargs)

    return run


@contextlib.contextmanager
def _alone(run: _Run) -> Iterator[None]:
    """While this lasts, what layers around the one in progress wait for is not heard: it belongs to another trace."""
    watchers, run.watchers = run.watchers, []
    try:
        with attention_parts.alone():
            yield
    finally:
        run.watchers = watchers


def _copied_host(frame: Frame, watchers: list[Watcher]) -> Host:
    """A copy of a host in its place, since its variables belong to another trace."""
    copy = nnx.merge(*nnx.split(frame.module), copy=True)
    return Host(getattr(class_of(copy), frame.name).__get__(copy), dataclasses.replace(frame, module=copy), watchers)


def _initialised(layer: Any, key: jax.Array, told: Mapping[str, Any], args: tuple, kwargs: Mapping[str, Any]) -> Any:
    of_params, of_dropout = jax.random.split(key)
    bound = layer.bind({"params": {}}, rngs={"params": of_params, "dropout": of_dropout}, mutable=["params"])
    bound(*args, **told, **kwargs)
    return bound.variables.get("params", {})


def _own(module: nnx.Module, name: str) -> dict[Path, Any]:
    """The values of a delta's leaves at a module, by path with the delta's name."""
    return {(name, *path): leaf.get_value() for path, leaf in graph.leaves_of(module, name).items()}


def _span_input(run: _Run, edit: CallEdit, frame: Frame) -> Callable[[], Any] | None:
    """What gives the input of the module where the span of an edit starts; `None`, if that is the host."""
    if edit.span_input is None or edit.span_input == edit.host:
        return None
    start = edit.span_input

    def found() -> Any:
        if start not in run.inputs:
            raise ValueError(call_edits.not_started(frame.describe(), surgery.name_of(start)))
        x, trace = run.inputs[start]
        if trace != frame.trace:
            raise ValueError(call_edits.leads_out(frame.describe(), surgery.name_of(start)))
        return x

    return found


@contextlib.contextmanager
def _generated(root: nnx.Module, attachment: Attachment) -> Iterator[None]:
    """While this lasts, what a delta generates is at the modules that use it."""
    own = _own(root, attachment.name)
    if attachment.generator is None or not own:
        yield
        return
    leaves = graph.nested({path[1:]: leaf for path, leaf in own.items()})
    made: Any = attachment.generator.apply({"params": leaves})
    modules, put = graph.modules(root), []
    try:
        for path, leaf in made.items():
            module = modules[path[: (at := path.index(attachment.name))]]
            graph.put(module, path[at:], leaf)
            put.append((module, path[at:]))
        yield
    finally:
        for module, path in put:
            if path in graph.variables(module):  # not if the run failed where nnx had taken it apart
                graph.take_out(module, path)
