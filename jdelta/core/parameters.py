"""Parameters by name: which leaves of a backbone the patterns mean, and which of them a model's run reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from flax.core import meta
from jax.interpreters import partial_eval

from jdelta.core.structure import Structure, require_open
from jdelta.trees import addressing, dtypes, surgery
from jdelta.trees.surgery import Path, Tree


def find_parameters(structure: Structure, patterns: Sequence[str], exclude: Sequence[str] = ()) -> list[Path]:
    """The leaves of the backbone that the patterns mean, module by module in the order of execution.

        find_parameters(structure, ["experts.wi"])  # [("layer_0", "experts", "wi"), ("layer_1", "experts", "wi")]

    A leaf's name is its dot-joined path, and patterns are those of `jdelta.match`.

    Args:
      structure: of the backbone.
      patterns: of leaves.
      exclude: patterns of modules, with everything in them, and of leaves to leave out.

    Raises:
      TypeError: a leaf is of a dtype to which nothing can be added.
      ValueError: a pattern is invalid or means modules alone or nothing; a leaf is in a module that is `closed`;
        nothing is left.
    """
    leaves = {surgery.name_of(path): (path, meta.unbox(leaf)) for path, leaf in _in_order(structure).items()}
    modules = [name for name in {**structure.modules, **structure.uncalled} if name]
    for pattern in addressing.checked(patterns):
        if not any(addressing.matches(name, pattern) for name in leaves):
            _require_no_module(pattern, modules, leaves)
            raise ValueError(addressing.nothing_matches(pattern, list(leaves), "parameter"))
    for pattern in addressing.checked(exclude):
        if not any(addressing.matches_at_or_above(name, pattern) for name in [*modules, *leaves]):
            raise ValueError(f"exclude_modules: {addressing.nothing_matches(pattern, modules)}")

    def is_excluded(name: str) -> bool:
        return any(addressing.matches_at_or_above(name, pattern) for pattern in exclude)

    found = [name for name in leaves if any(addressing.matches(name, pattern) for pattern in patterns)]
    left = [name for name in found if not is_excluded(name)]
    if found and not left:
        raise ValueError(f"of the parameters that {list(patterns)} mean, exclude_modules={list(exclude)} leaves none.")
    for name in left:
        path, leaf = leaves[name]
        if dtypes.is_fixed(leaf):
            raise TypeError(
                f"the parameter {name!r} holds {leaf.dtype}, and an update is added only to floats of 16 bits and "
                f"more. Leave it out: exclude_modules=[{name!r}]."
            )
        for around in (surgery.name_of(path[:i]) for i in range(len(path))):
            if around in structure.modules:
                require_open(structure.modules[around])
    return [leaves[name][0] for name in left]


def unread(run: Callable[[Tree], Any], params: Tree) -> list[Path]:
    """The leaves on whose values nothing that a run returns depends, in the order of the tree. Nothing is computed.

        unread(lambda params: module.apply({"params": params}, x), params)  # []

    A leaf counts as read only if what is made of it reaches the output: a model may hold heads that a run does not
    use. Updates of such a leaf would train nothing.

    Args:
      run: a function of the tree of parameters, which can be traced.
      params: the tree, or its shapes.
    """
    leaves = {path: leaf for path, leaf in surgery.flatten(params).items() if leaf is not surgery.empty_node}

    def of_leaves(*values: Any) -> Any:
        return run(surgery.unflatten(dict(zip(leaves, values, strict=True)), like=params))

    shapes = [jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), leaf) for leaf in leaves.values()]
    jaxpr = jax.make_jaxpr(of_leaves)(*shapes).jaxpr
    # jax has no public name for this. It removes from a program what no output needs, also inside scan, cond, while,
    # remat and calls; without it, a leaf that is passed into a scan and left there would count as read.
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    counts = [len(jax.tree.leaves(leaf)) for leaf in leaves.values()]  # a box of flax may hold one array
    flags = iter(used)
    return [path for path, n in zip(leaves, counts, strict=True) if not any([next(flags) for _ in range(n)])]


def _in_order(structure: Structure) -> dict[Path, Any]:
    """Path to shape of each leaf of the backbone, ordered by the first call of the innermost module around it."""
    order = {info.path: i for i, info in enumerate(structure)}

    def place(path: Path) -> int:
        return next((order[path[:i]] for i in reversed(range(len(path))) if path[:i] in order), len(order))

    leaves = surgery.flatten(structure.params)
    return {path: leaves[path] for path in sorted(leaves, key=place) if leaves[path] is not surgery.empty_node}


def _require_no_module(pattern: str, modules: Iterable[str], leaves: Iterable[str]) -> None:
    """Raises `ValueError` if a pattern, which means no leaf, means a module."""
    for module in modules:
        if addressing.matches(module, pattern):
            inside = [name for name in leaves if name.startswith(f"{module}.")]
            named = f": {', '.join(inside[:3])}{', …' if len(inside) > 3 else ''}" if inside else ", and it has none"
            raise ValueError(
                f"{pattern!r} means the module {module!r}. modified_parameters names leaves{named}; modules are named "
                "by modified_modules."
            )
