"""A model as the page is told of it: modules in order of execution, what can be chosen, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jdelta.core import module_tree
from jdelta.core.module_tree import Leaf, Node
from jdelta.core.structure import Structure
from jdelta.display.interactive.cost import Costs
from jdelta.trees import surgery
from jdelta.trees.surgery import Path


def describe(
    structure: Structure, reasons: dict[str, str], costs: Costs | None, parameters: bool = False, **titles: str
) -> dict[str, Any]:
    """What the page shows, as JSON has it.

    Args:
      structure: the model.
      reasons: name of a module to why it cannot be chosen.
      costs: what modules cost with a method; `None` if there is none.
      parameters: whether parameters have rows of their own, below those of their modules.
      titles: `model`, `method` and `arguments`, for the heading.

    Returns:
      `noun`: what can be chosen. `modules`: for each `[key, parent, class, shapes, calls, parameters, run,
      reason, called, items]`, parents first: `run` is the same for repeated siblings, else -1; `reason` a
      number in `reasons`, -1 where it can be chosen, and -2 for a part that patterns do not mean. And `items`,
      `always`, `total`, `exact`, as `Costs` has them.
    """
    leaves = {
        path: Leaf(path[-1], leaf.shape, str(leaf.dtype), trainable=False, delta=False)
        for path, leaf in surgery.flatten(structure.params).items()
        if hasattr(leaf, "shape")
    }
    tree = module_tree.build(structure, leaves)
    below: dict[Path, int] = {}
    for path, leaf in leaves.items():
        size = 1
        for dim in leaf.shape:
            size *= dim
        for i in range(len(path) + 1):
            below[path[:i]] = below.get(path[:i], 0) + size

    numbers: dict[str, int] = {}
    modules: list[list[Any]] = []
    for path, node, parent, run in _rows(tree, module_tree.collapse(tree), parameters):
        name, known = surgery.name_of(path), path in leaves or surgery.name_of(path) in structure.modules
        reason = reasons.get(name) if known else structure.uncalled.get(name, "It is never called.")
        number = -1 if reason is None else numbers.setdefault(reason, len(numbers))
        items = list(costs.modules.get(name, ())) if costs is not None else []
        called = int(known and bool(name))
        modules.append(
            [node.name, parent, node.type, node.shapes, node.calls, below.get(path, 0), run, number, called, items]
        )
    return {
        "noun": "parameters" if parameters else "modules",
        **titles,
        "modules": modules,
        "reasons": list(numbers),
        "items": [list(item) for item in costs.items] if costs is not None else None,
        "always": costs.always if costs is not None else 0,
        "total": costs.total if costs is not None else below.get((), 0),
        "exact": costs.exact if costs is not None else True,
    }


def _rows(plain: Node, collapsed: Node, parameters: bool) -> Iterator[tuple[Path, Node, int, int]]:
    """Path, node, number of the parent, and number of the run of equal siblings, of every module, parents first; with
    `parameters`, of their parameters too."""
    count = runs = 0
    waiting: list[tuple[Path, Node, Node, int, int]] = [((), plain, collapsed, -1, -1)]
    while waiting:
        path, node, pattern, parent, run = waiting.pop()
        yield path, node, parent, run
        number, count = count, count + 1
        children = iter(node.children)
        found: list[tuple[Path, Node, Node, int, int]] = []
        for leaf in node.leaves if parameters else ():
            row = Node(leaf.name, leaf.dtype, str(list(leaf.shape)))
            found.append(((*path, leaf.name), row, row, number, -1))
        for kind in pattern.children:
            copies = max(len(kind.copies), 1)
            runs += copies > 1
            for _ in range(copies):
                child = next(children)
                found.append(((*path, child.name), child, kind, number, runs if copies > 1 else -1))
        waiting.extend(reversed(found))
