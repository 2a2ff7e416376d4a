"""A linen module that runs deltas: a copy, of a subclass with the name, fields and signatures of the original."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from flax import linen as nn
from flax.core.scope import in_filter

from jdelta.core.edits import Attachment, Edit
from jdelta.core.generators import with_generated, without_generated
from jdelta.core.host import Trial
from jdelta.core.pickling import OF_EACH, packed, unpacked, with_class
from jdelta.hosts.linen import jit_cache, weight_calls
from jdelta.hosts.linen.running import is_running, running
from jdelta.trees import left_out, surgery
from jdelta.trees.surgery import Path


def instrument(module: nn.Module, attachments: Sequence[Attachment], trial: Trial | None = None) -> nn.Module:
    """A copy of a linen module that runs the active attachments' edits in `apply`, `init` and `init_with_output`.

    It is an instance of a subclass with the name, docstring, fields and signatures of the original. Its `apply`
    raises `ValueError` for a tree that lacks leaves of an active attachment or holds leaves of an inactive one, and
    `RuntimeError` for one that was donated. Deltas that a tree leaves out, see `trees.left_out`, count as inactive.
    Bound in any other way it raises `NotImplementedError`.
    `instrument(module, ())` is the original module. In `trial`, it is noted what was run.
    """
    module = bare(module)
    if not attachments:
        return module
    original = type(module)
    edits, number = _edits_of(attachments), jit_cache.unique()
    variants: dict[tuple[str, ...], nn.Module] = {}  # without deltas, by their names
    rewrites = any(a.active and any(not edit.in_call for edit in a.weight_edits) for a in attachments)

    def without(self: nn.Module, names: tuple[str, ...]) -> nn.Module:
        if bare(self) is module and names in variants:
            return variants[names]
        rest = [dataclasses.replace(a, active=a.active and a.name not in names) for a in attachments]
        variant = instrument(self, rest)
        if bare(self) is module:
            variants[names] = variant
        return variant

    @nn.nowrap
    @functools.wraps(original.apply)
    def apply(self: nn.Module, variables: Any, *args: Any, **kwargs: Any) -> Any:
        if names := left_out.names_in(variables):
            return without(self, names).apply(left_out.unmarked(variables), *args, **kwargs)
        creating = in_filter(kwargs.get("mutable", False), "params")
        _check_leaves(variables.get("params", {}), attachments, creating)
        surgery.require_alive(variables)
        with running(edits, type(self), number, trial):
            given, probes = variables, trial.probes if trial is not None else {}
            variables = weight_calls.rewritten(with_generated(variables, attachments), attachments, probes)
            found = original.apply(self, variables, *args, **kwargs)
        if trial is not None:
            trial.outputs.append(found)
        if creating and rewrites:
            output, changed = found
            changed = weight_calls.restored(changed, attachments, given)
            return output, weight_calls.with_own_leaves(changed, attachments, kwargs.get("rngs"))
        return found

    def initialised(self: nn.Module, rngs: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        with running(edits, type(self), number, trial):
            output, variables = original.init_with_output(self, rngs, *args, **kwargs)
        if trial is not None:
            trial.outputs.append(output)
        variables = weight_calls.with_own_leaves(variables, attachments, rngs)
        return output, without_generated(variables, attachments, rngs)

    @nn.nowrap
    @functools.wraps(original.init_with_output)
    def init_with_output(self: nn.Module, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        output, variables = initialised(self, rngs, args, kwargs)
        if rewrites:  # what is rewritten was made after the run
            changing = [name for name in variables if name != "params"]
            options = {key: value for key, value in kwargs.items() if key != "mutable"}
            output, _ = self.apply(variables, *args, rngs=_streams(rngs), mutable=changing, **options)
        return output, variables

    @nn.nowrap
    @functools.wraps(original.init)
    def init(self: nn.Module, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        if trial is None:
            return initialised(self, rngs, args, kwargs)[1]
        return init_with_output(self, rngs, *args, **kwargs)[1]

    def __post_init__(self: nn.Module) -> None:
        original.__post_init__(self)
        if isinstance(self.parent, nn.Module):
            raise ValueError(
                f"{original.__name__} carries deltas and cannot be a part of {type(self.parent).__name__}: they would "
                "not run there. Detach them, and attach to a jdelta.Backbone of the outer module."
            )
        if self.scope is not None and not is_running(number):
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
        "init": init,
        "init_with_output": init_with_output,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_jdelta": (module, tuple(attachments)),
    }
    return _copied(module, original, namespace)


def _streams(rngs: Any) -> Any:
    return rngs if isinstance(rngs, Mapping) else {"params": rngs}


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
        for edit in attachment.edits if attachment.active else attachment.after_merge:
            key = (edit.host, type(edit.layer))
            if attachment.active or key not in seen:
                edits.append(edit)
            seen |= set() if attachment.active else {key}
    return edits


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
