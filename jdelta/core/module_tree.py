"""A model as a tree of modules in which repeated layers are one node, and that tree as lines of text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from jdelta.core.structure import ModuleInfo, Structure
from jdelta.trees import surgery
from jdelta.trees.surgery import Path


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter: its name, shape, and whether it trains and belongs to a delta."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    delta: bool


@dataclasses.dataclass(frozen=True)
class Node:
    """One module: its name, class, shapes of input and output, parameters, and children in order of execution."""

    name: str
    type: str = ""
    shapes: str = ""
    calls: int = 1
    leaves: tuple[Leaf, ...] = ()
    children: tuple[Node, ...] = ()
    copies: tuple[str, ...] = ()  # names of the repeated modules that this one stands for

    def all_leaves(self) -> Iterator[Leaf]:
        """Its parameters and those of everything inside it, repeated ones as often as they are there."""
        yield from self.leaves
        for child in self.children:
            for _ in range(max(len(child.copies), 1)):
                yield from child.all_leaves()

    def label(self) -> list[tuple[str, str]]:
        """Its line, in parts: what each part says (`"name"`, `"collapsed"`, `"type"`, `"shape"`), and the text."""
        if self.copies:
            numbers = f"{self.copies[0]}-{_number(self.copies[-1])} ({len(self.copies)} layers)"
            parts = [("collapsed", numbers)]
        else:
            parts = [("name", self.name or "model")]
        if self.type:
            parts.append(("type", f" {self.type}"))
        if self.shapes:
            parts.append(("shape", f" {self.shapes}"))
        if self.calls > 1:
            parts.append(("name", f" called {self.calls} times"))
        return parts


def build(structure: Structure, leaves: dict[Path, Leaf]) -> Node:
    """The tree of modules with their parameters, in order of execution; parts that are never called come last."""
    paths = {path[:i] for path in leaves for i in range(len(path))}
    called = {info.path: info for info in structure}
    children: dict[Path, list[Path]] = {}
    for path in [*called, *sorted(paths - called.keys())]:
        for i in range(1, len(path) + 1):
            siblings = children.setdefault(path[: i - 1], [])
            if path[:i] not in siblings:
                siblings.append(path[:i])

    own: dict[Path, list[Leaf]] = {}
    for path, leaf in leaves.items():
        own.setdefault(path[:-1], []).append(leaf)

    def node(path: Path) -> Node:
        info = called.get(path)
        return Node(
            name=path[-1] if path else "",
            type=info.type.__name__ if info else "",
            shapes=_flow(info) if info else "",
            calls=info.calls if info else 1,
            leaves=tuple(own.get(path, ())),
            children=tuple(node(child) for child in children.get(path, ())),
        )

    return node(())


def collapse(node: Node) -> Node:
    """The same tree with runs of equal, numbered siblings collapsed into one node."""
    collapsed: list[Node] = []
    for child in map(collapse, node.children):
        last = collapsed[-1] if collapsed else None
        if last is not None and _numbered(child.name) and _alike(last, child):
            copies = (*(last.copies or (last.name,)), child.name)
            collapsed[-1] = dataclasses.replace(last, copies=copies)
        else:
            collapsed.append(child)
    return dataclasses.replace(node, children=tuple(collapsed))


def lines(structure: Structure, most: int = 40) -> list[str]:
    """The collapsed tree of the modules that hold parameters, as indented lines of names, classes and shapes.

    Args:
      structure: what to show.
      most: of more lines, the deepest are left out; a last line then counts them.
    """
    rows: list[tuple[int, str]] = []

    def grow(node: Node, depth: int) -> None:
        rows.append((depth, "  " * depth + "".join(text for _, text in node.label())))
        for child in node.children:
            if any(True for _ in child.all_leaves()):
                grow(child, depth + 1)

    leaves = {
        path: Leaf(path[-1], leaf.shape, str(leaf.dtype), trainable=True, delta=False)
        for path, leaf in surgery.flatten(structure.params).items()
    }
    grow(collapse(build(structure, leaves)), 0)
    depth = max(d for d, _ in rows)
    while depth > 1 and sum(d <= depth for d, _ in rows) > most:
        depth -= 1
    shown = [row for d, row in rows if d <= depth][:most]
    left = len(rows) - len(shown)
    return [*shown, f"… and {left} more"] if left else shown


def shape(dims: Sequence[int]) -> str:
    """Dimensions in words: `'2×16'`."""
    return "×".join(map(str, dims)) or "scalar"


def _alike(a: Node, b: Node) -> bool:
    plain = {"name": "", "copies": ()}
    prefix = [n.name.rstrip("0123456789") for n in (a, b)]
    return prefix[0] == prefix[1] and dataclasses.replace(a, **plain) == dataclasses.replace(b, **plain)  # type: ignore[arg-type]


def _numbered(name: str) -> bool:
    return name[-1:].isdigit()


def _number(name: str) -> str:
    return name[len(name.rstrip("0123456789")) :]


def _flow(info: ModuleInfo) -> str:
    try:
        return f"{shape(info.x.shape)} → {shape(info.y.shape)}"
    except TypeError:
        return ""
