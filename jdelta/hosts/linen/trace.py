"""Records one abstract run of a linen model: its modules as the tensors flow through them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from jdelta.core.arguments import is_array
from jdelta.core.structure import ModuleInfo, ModuleType, Structure
from jdelta.hosts.linen import jit_cache
from jdelta.hosts.linen.calls import Calls, Frame
from jdelta.hosts.linen.standalone import LinenStandalone
from jdelta.trees import surgery
from jdelta.trees.surgery import Path, Tree

_NOT_CALLED = (
    "no call of it was seen. It only holds parameters or other modules, or it is run by other methods than __call__."
)

_NNX = (
    "it is an nnx module in flax.nnx.bridge.ToLinen, which takes all that lies below its path for the nnx module's "
    "state, leaves of deltas too. Name a linen module around it, or make what is around it an nnx module: deltas run "
    "in nnx modules of nnx models"
)


def trace(run: Callable[[], Tree], root_type: type[nn.Module]) -> Structure:
    """Records one abstract run of a model: nothing is computed, no array is allocated.

    Args:
      run: initialises the model on its pseudo input and returns the parameters.
      root_type: the class of the model's root module.
    """
    with recorded(root_type) as structure_of:
        params = surgery.parameters(jax.eval_shape(run))
    return structure_of(params)


@contextlib.contextmanager
def recorded(root_type: type[nn.Module]) -> Iterator[Callable[[Tree], Structure]]:
    """Records the one run of a model that is made while this lasts.

    Args:
      root_type: the class of the model's root module.

    Yields:
      What gives the structure afterwards, from the shapes of the parameters.
    """
    recorder = _Recorder(root_type)
    with nn.intercept_methods(recorder), jit_cache.marked(lambda _: jit_cache.unique()):
        yield lambda params: _structure(recorder, params)


def _structure(recorder: _Recorder, params: Tree) -> Structure:
    modules = {info.name: info for info in recorder.modules(params)}
    uncalled = {name: reason for name, reason in recorder.reasons(modules).items() if name not in modules}
    for path in surgery.flatten(params):
        for above in (path[:i] for i in range(1, len(path))):
            name = surgery.name_of(above)
            if name not in modules and name not in uncalled:
                around = (modules.get(surgery.name_of(above[:i])) for i in range(1, len(above)))
                inside = next((info.name for info in around if info is not None and info.closed), None)
                uncalled[name] = (
                    _NOT_CALLED if inside is None else f"it is a part of {inside or 'the root'!r}, and {_NNX}."
                )
    tied = frozenset(name for name, info in modules.items() if recorder.is_tied(info))
    by_method = {(surgery.name_of(path), method): info for (path, method), info in recorder.by_method.items()}
    return Structure(modules, uncalled, params, tied, by_method)


@dataclasses.dataclass(frozen=True)
class _Methods:
    """A module that was run by methods of other names than `__call__`."""

    type: ModuleType
    caller: Path | None
    names: dict[str, None] = dataclasses.field(default_factory=dict)  # in order

    def reason(self, path: Path, modules: Mapping[str, ModuleInfo]) -> str:
        """Why it cannot be a target, and what to do."""
        name = surgery.name_of(path)
        inside = [info.name for info in modules.values() if info.path[: len(path)] == path]
        ways = [f"Its parameters can train, with unfrozen_modules=[{name!r}]."]
        if inside:
            ways.append(f"Inside it, {inside[0]!r} can be named.")
        if self.caller:
            ways.append(f"So can {surgery.name_of(self.caller)!r}, which runs it.")
        return (
            f"{self.type.__name__} is run by its methods {', '.join(self.names)}, and what a delta adds is run around "
            f"calls, by __call__, unless its edit names the method: jdelta.CallEdit(…, method=…). {' '.join(ways)}"
        )


class _Recorder:
    """An interceptor that notes every call."""

    def __init__(self, root_type: type[nn.Module]):
        self.nested: dict[str, str] = {}
        self.by_method: dict[tuple[Path, str], ModuleInfo] = {}
        self._handed: set[tuple[int, ...]] = set()  # shapes of the weights that nested applies were handed
        self._methods: dict[Path, _Methods] = {}  # what was run by other methods than __call__
        self._open: list[Path] = []  # where such methods are in progress
        self._sharing: dict[Path, dict[str, type[nn.Module]]] = {}  # modules that run in the scope of another
        self._rivals: dict[Path, str] = {}  # classes of modules that share a scope and run one after the other
        self._seen: dict[Path, ModuleInfo | None] = {}
        self._bodies: dict[Path, list[Frame | None]] = {}  # lifted module -> the call around each run of its body
        self._calls = Calls(root_type)

    def __call__(self, next_call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        if context.method_name != "__call__":
            return self._by_method(next_call, args, kwargs, context)
        with self._calls.enter(context.module, args, kwargs) as frame:
            if frame.nested:
                self._note_nested(frame)
            if frame.again:
                self._note_shared(frame)
            if frame.nested or frame.again:
                return next_call(*args, **kwargs)
            self._seen.setdefault(frame.path, None)  # the order is that of entering
            if frame.path and frame.scope.parent is None:
                self._bodies.setdefault(frame.path, []).append(self._calls.outer)
            output = next_call(*args, **kwargs)
            self._note(frame, args, kwargs, output)
            return output

    def _by_method(self, next_call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        module, method = context.module, context.method_name
        path = module.scope.path if module.scope is not None else ()
        if method == "setup" or not path or path in self._open or self._calls.runs(path):
            return next_call(*args, **kwargs)
        self._methods.setdefault(path, _Methods(type(module), self._calls.newest)).names[method] = None
        self._open.append(path)
        try:
            output = next_call(*args, **kwargs)
        finally:
            self._open.pop()
        frame = self._calls.frame_of(module, args, kwargs)
        if not frame.nested:
            self.by_method[path, method] = _info(frame, args, kwargs, output, None, self._calls.newest)
        return output

    def reasons(self, modules: Mapping[str, ModuleInfo]) -> dict[str, str]:
        """Name to the reason why it is none of the modules, of what was seen to run in another way."""
        found = dict(self.nested)
        for path, methods in self._methods.items():
            found[surgery.name_of(path)] = methods.reason(path, modules)
        for info in modules.values():
            for name, cls in info.sharing.items():
                found[surgery.name_of((*info.path, name))] = (
                    f"{cls.__name__} is in the scope of {info.name or 'the root'!r} (nn.share_scope), so that its "
                    f"parameters are among that one's: {', '.join(info.params)}. Name {info.name or 'the root'!r}, or "
                    "train these parameters, with unfrozen_modules."
                )
        return found

    def modules(self, params: Tree) -> Iterator[ModuleInfo]:
        """What was seen. A scan traces its body twice and runs it once a layer: calls are counted accordingly."""
        leaves = surgery.flatten(meta.unbox(params))
        found = [info for info in self._seen.values() if info is not None]
        factor: dict[Path, tuple[int, float]] = {}  # body -> copies of its leaves, runs for each time it was traced
        for body, around in sorted(self._bodies.items(), key=lambda item: len(item[0])):
            inside = [info for info in found if info.path[: len(body)] == body and info.params]
            copied = (
                leaves[(*info.path, key)].size // max(leaf.size, 1)
                for info in inside
                for key, leaf in info.params.items()
            )
            outer = math.prod(n for above, (n, _) in factor.items() if body[: len(above)] == above)
            copies = min(copied, default=1) // outer
            if copies > 1:
                factor[body] = copies, copies * len(set(map(id, around))) / len(around)
        for info in found:
            calls = float(info.calls)
            for body, (_, ratio) in factor.items():
                if info.path[: len(body)] == body:
                    calls *= ratio
            sharing = {name: cls for name, cls in self._sharing.get(info.path, {}).items() if cls is not info.type}
            closed = _NNX if any(map(_is_nnx, (info.type, *sharing.values()))) else ""
            if info.path in self._rivals:
                closed = f"two modules of other classes run in its scope (nn.share_scope), {self._rivals[info.path]}"
            yield dataclasses.replace(info, calls=round(calls), sharing=sharing, closed=closed)

    def is_tied(self, info: ModuleInfo) -> bool:
        """Whether something computes with this module's weights besides its calls: a head, or another method."""
        shape = info.params["embedding"].shape if "embedding" in info.params else ()
        return bool(info.params and info.path in self._methods) or bool({shape, shape[::-1]} & self._handed)

    def _note(self, frame: Frame, args: tuple, kwargs: dict, output: Any) -> None:
        module, known, outer = frame.module, self._seen[frame.path], self._calls.outer
        if known is not None and not _related(known.type, type(module)):
            self._rivals[frame.path] = f"{known.type.__name__} and {type(module).__name__}"
        caller = None if outer is None else outer.path
        self._seen[frame.path] = _info(frame, args, kwargs, output, known, caller)

    def _note_shared(self, frame: Frame) -> None:
        around = next(f for f in self._calls.around() if f.path == frame.path and not f.nested)
        one, other = type(frame.module), type(around.module)
        if not _related(one, other):  # otherwise it may be a call of super()
            self._sharing.setdefault(frame.path, {})[frame.module.name or one.__name__] = one

    def _note_nested(self, frame: Frame) -> None:
        outer, handed = self._calls.outer, frame.scope.variables().get("params", {})
        self._handed.update(jnp.shape(leaf) for leaf in jax.tree.leaves(handed) if jnp.ndim(leaf) == 2)
        if outer is not None and not outer.nested and frame.module.name and not _is_nnx(type(outer.module)):
            self.nested[surgery.name_of((*outer.path, frame.module.name))] = (
                f"{type(frame.module).__name__} runs in a nested apply with weights handed to it (a tied head), "
                "so it has no parameters of its own in the tree. Name the module that feeds it, or untie the weights."
            )


def _info(
    frame: Frame, args: tuple, kwargs: dict, output: Any, known: ModuleInfo | None, caller: Path | None
) -> ModuleInfo:
    """What a call showed of a module; `known` is what an earlier one did."""
    module = frame.module
    held = meta.unbox(module.scope.variables().get("params", {})) if module.scope is not None else {}
    own = {key: _abstract(leaf) for key, leaf in held.items() if is_array(leaf)}
    fields = {
        f.name: getattr(module, f.name)
        for f in dataclasses.fields(module)
        if f.init and f.name not in ("parent", "name")
    }
    return ModuleInfo(
        path=frame.path,
        type=type(module),
        fields=fields,
        args=_abstract(args),
        kwargs=_abstract(kwargs),
        output=_abstract(output),
        params=own,
        calls=known.calls + 1 if known is not None else 1,
        caller=known.caller if known is not None else caller,
        standalone=LinenStandalone(type(module), fields, tuple(own)),
    )


def _related(one: type, other: type) -> bool:
    return issubclass(one, other) or issubclass(other, one)


def _is_nnx(module_type: type[nn.Module]) -> bool:
    """Without importing flax.nnx: a class of a module that was never imported has no subclasses."""
    wrapper = getattr(sys.modules.get("flax.nnx.bridge.wrappers"), "ToLinen", None)
    return wrapper is not None and issubclass(module_type, wrapper)


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_array(leaf) else leaf, tree)
