"""Runs edits around the calls of named modules, without touching the model's code.

The layers' parameters live in the host's own Flax scope, so lifted transforms (`nn.scan`, `nn.remat`, `nn.vmap`) treat
them like the host's own.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

from flax import linen as nn
from flax.core import lift
from flax.core.scope import Scope

from jdelta.core.arguments import main_input
from jdelta.core.context import current_step
from jdelta.core.edits import CallEdit, Edit, WeightEdit
from jdelta.core.host import Trial
from jdelta.hosts import call_edits, patches
from jdelta.hosts.call_edits import Host, Watcher
from jdelta.hosts.linen import jit_cache, weight_calls
from jdelta.hosts.linen.calls import Calls, Frame
from jdelta.trees import surgery
from jdelta.trees.surgery import Path

_CALL = "__call__"

_runs: contextvars.ContextVar[tuple[tuple[Hashable, Calls], ...]] = contextvars.ContextVar("runs", default=())


def is_running(name: Hashable) -> bool:
    """Whether a run of the edits of this name is in progress, in this thread."""
    return name in [other for other, _ in _runs.get()]


@contextlib.contextmanager
def running(
    edits: Sequence[Edit], root_type: type[nn.Module], name: Hashable, trial: Trial | None = None
) -> Iterator[None]:
    """Runs the edits around the calls of one run of a model, while this lasts.

    A run inside another, as of `module.clone().apply(…)` in a method of the module, has calls of its own.

    Args:
      edits: in the order of attaching. Each goes around the earlier ones of its host, and those that are `outermost`
        around all.
      root_type: the class of the module that is applied or initialised.
      name: of these edits, among all others: runs under the same name share what `nn.jit` traced.
      trial: where to note the edits that were run.
    """
    of_calls = [edit for edit in edits if isinstance(edit, CallEdit)]
    by_host: dict[tuple[Path, str], list[CallEdit]] = {}  # and by the method of the host
    for edit in sorted(of_calls, key=lambda edit: edit.outermost):
        if edit.layer is not None:
            by_host.setdefault((edit.host, edit.method), []).append(edit)
    of_weights: dict[Path, list[WeightEdit]] = {}
    for each in edits:
        if isinstance(each, WeightEdit) and each.in_call:
            of_weights.setdefault(each.host, []).append(each)
    calls = Calls(root_type, {*of_weights, *(path for path, method in by_host if method == _CALL)})
    by_step = any(map(call_edits.asks_for_context, edits))
    starts = {edit.span_input for edit in of_calls if edit.span_input is not None}
    inputs: dict[Path, _Input] = {}  # of each start's newest call
    watchers: list[Watcher] = []  # of the hosts in progress, outermost first

    def edited(call: Callable, frame: Frame, method: str) -> Callable:
        for edit in by_host.get((frame.path, method), ()):
            if edit.needs is not None and not frame.module.has_variable("params", edit.needs):
                continue
            if edit.where == "around":
                call = functools.partial(_layer(edit, frame), Host(call, frame, watchers))
            else:
                layer = functools.partial(_run_layer, edit, frame)
                span_input = _span_input(edit, frame, inputs, calls)
                call = functools.partial(call_edits.run, edit, call, frame, layer, span_input)
            if trial is not None:
                trial.ran.add(edit)
        return call

    def by_method(next_call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        module, method = context.module, context.method_name
        path = module.scope.path if module.scope is not None else ()
        if (path, method) not in by_host:
            return next_call(*args, **kwargs)
        frame = calls.frame_of(module, args, kwargs)
        if frame.nested or frame.again:
            return next_call(*args, **kwargs)
        return edited(next_call, frame, method)(*args, **kwargs)

    def intercept(next_call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        if _runs.get()[-1][1] is not calls:
            return next_call(*args, **kwargs)
        if context.method_name != _CALL:
            return by_method(next_call, args, kwargs, context)
        with calls.enter(context.module, args, kwargs) as frame:
            if frame.nested or frame.again:
                return next_call(*args, **kwargs)

            def run(*args: Any, **kwargs: Any) -> Any:
                if frame.path in starts:
                    inputs[frame.path] = _Input(main_input(type(frame.module), args, kwargs)[1], frame.body)
                # Each edit wraps what the earlier ones made of the host.
                call: Callable = next_call
                if frame.path in of_weights:
                    call = functools.partial(weight_calls.run, of_weights[frame.path], next_call, frame)
                    if trial is not None:
                        trial.ran.update(of_weights[frame.path])
                return edited(call, frame, _CALL)(*args, **kwargs)

            call: Callable = run
            for watch in watchers:
                call = watch(frame, call)
            return call(*args, **kwargs)

    def mark(module: nn.Module) -> Hashable:
        path = module.scope.path if module.scope is not None else ()
        within = (edit for edit in of_calls if edit.span_input in inputs and edit.host[: len(path)] == path)
        if watchers or any(within) or (by_step and current_step() is not None):
            return jit_cache.unique()  # what comes from outside would become a constant of what is kept
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


def _span_input(edit: CallEdit, frame: Frame, inputs: Mapping[Path, _Input], calls: Calls) -> Callable[[], Any] | None:
    """What gives the input of the module where the span of an edit starts; `None`, if that is the host."""
    if edit.span_input is None or edit.span_input == edit.host:
        return None
    path, start = edit.span_input, surgery.name_of(edit.span_input)

    def found() -> Any:
        if path not in inputs:
            raise ValueError(call_edits.not_started(frame.describe(), start))
        if inputs[path].is_gone(frame, calls):
            raise ValueError(call_edits.leads_out(frame.describe(), start))
        return inputs[path].x

    return found


def _run_layer(edit: CallEdit, frame: Frame, /, *args: Any, **kwargs: Any) -> Any:
    return _layer(edit, frame)(*args, **kwargs)


def _layer(edit: CallEdit, frame: Frame) -> Callable:
    """The edit's layer, bound into the host's scope and told what it asks for of the call."""
    assert edit.layer is not None
    layer = edit.layer.clone(parent=frame.scope_below(edit.leaf), name=None)
    told = call_edits.told(layer, lambda: frame.is_deterministic, frame.context)
    return functools.partial(layer, **told) if told else layer
