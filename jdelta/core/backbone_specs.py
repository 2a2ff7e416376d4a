"""The mesh axes over which the leaves of deltas are sharded: those of the backbone's leaves that they follow.

A layer declares which axes of the backbone's weights its own axes follow, in a method

    def sharding_axes(self, host: ModuleInfo, x: Axes, y: Axes) -> dict[str, Axes]:
        return {"a": (*x, None), "b": (None, *y)}

where `x` and `y` are the axes of weights that the features of its input and output have, one for `nn.Dense`. It
returns an entry for each axis of each leaf, named below the layer (`"down.kernel"`); `None` is an axis of the layer's
own. A leaf that is not named is replicated, and so is an axis whose length the mesh does not divide.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import PartitionSpec as P

from jdelta.core import axes, weights
from jdelta.core.axes import Axes, Axis
from jdelta.core.edits import CallEdit, Edit, WeightEdit
from jdelta.core.linear_maps import scanned_axes
from jdelta.core.rules import axes_of
from jdelta.core.structure import Structure
from jdelta.trees import surgery
from jdelta.trees.surgery import Path

Entry = str | tuple[str, ...] | None  # the mesh axes over which one axis of a leaf is sharded


def names_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes of an entry."""
    return (entry,) if isinstance(entry, str) else tuple(entry) if isinstance(entry, tuple) else ()


def parts_of(entry: Entry, sizes: Mapping[str, int]) -> int:
    """The number of devices over which an entry shards an axis."""
    return math.prod(sizes[name] for name in names_of(entry))


@dataclasses.dataclass(frozen=True)
class BackboneSpecs:
    """How the backbone's leaves are sharded, and how a delta's leaves follow.

    Attributes:
      entries: path to the entries of the spec, one for each axis.
      shapes: path to shape of each leaf, those of the deltas too.
      structure: the backbone's.
      sizes: of the mesh's axes, if there is a mesh.
    """

    entries: Mapping[Path, tuple[Entry, ...]]
    shapes: Mapping[Path, tuple[int, ...]]
    structure: Structure
    sizes: Mapping[str, int] | None

    def specs_of(self, edit: Edit) -> dict[Path, P]:
        """The specs of the leaves of one edit, as far as it says what they follow."""
        return self._of_rule(edit) if isinstance(edit, WeightEdit) else self._of_layer(edit)

    def _of_rule(self, edit: WeightEdit) -> dict[Path, P]:
        """The specs of a rule's own leaves: axes of the weight, and before them those that input and output share."""
        layout, found = weights.layout_of(edit), {}
        for name, follows in axes_of(edit.rule).items():
            path = (*edit.own_path, name)
            if path not in self.shapes:  # it is generated, or of an edit of the same leaves
                continue
            kinds = [(None,) if kind is None else layout.numbers(kind) for kind in follows]
            numbers = (*layout.shared, *itertools.chain.from_iterable(kinds))
            axes = tuple(None if i is None else Axis(edit.leaf, i) for i in numbers)
            found[path] = self._allowed(self.shapes[path], self._with_layers(axes, path, edit.leaf, edit.layers))
        return found

    def _of_layer(self, edit: CallEdit) -> dict[Path, P]:
        """The specs of the leaves of a layer."""
        found: dict[Path, P] = {}
        followed = self._followed(edit)
        leaf = next((axis.leaf for own in followed.values() for axis in own if axis), self._leaf_in(edit.host))
        for name, own in followed.items():
            path = (*edit.host, *edit.leaf, *name.split("."))
            if path in self.shapes:  # not, if it is generated
                found[path] = self._allowed(self.shapes[path], self._with_layers(own, path, leaf))
        return found

    def _followed(self, edit: CallEdit) -> Mapping[str, Axes]:
        if not hasattr(edit.layer, "sharding_axes"):
            return {}
        host = start = self.structure.run_by(surgery.name_of(edit.host), edit.method)
        if edit.span_input is not None:
            start = self.structure[surgery.name_of(edit.span_input)]
        x = axes.of_output(host, self.structure) if edit.where == "after" else axes.of_input(start, self.structure)
        y = axes.of_input(host, self.structure) if edit.where == "before" else axes.of_output(host, self.structure)
        layer: Any = edit.layer
        followed: Mapping[str, Axes] = layer.sharding_axes(host, x, y)
        return followed

    def _with_layers(
        self, followed: Axes, path: Path, leaf: Path | None, inside: tuple[int, ...] | None = None
    ) -> list[_Followed]:
        """What each axis of a delta's leaf follows; those of the layers in `nn.scan` are as in `leaf`."""
        found = [self._at(axis, inside) for axis in followed]
        more = len(self.shapes[path]) - len(found)
        if more and leaf is not None:
            _, inserted, layers = self._stored(leaf, inside)
            if more == len(inserted):
                for place, layer in zip(inserted, layers, strict=True):
                    found.insert(place, (self.entries[leaf][layer], self.shapes[leaf][layer]))
        return found

    def _at(self, axis: Axis | None, inside: tuple[int, ...] | None = None) -> _Followed:
        if axis is None:
            return None, 1
        place = self._stored(axis.leaf, inside)[0][axis.number]
        return self.entries[axis.leaf][place], self.shapes[axis.leaf][place]

    def _stored(self, leaf: Path, inside: tuple[int, ...] | None) -> tuple[list[int], list[int], list[int]]:
        """How a leaf inside `nn.scan` is stored: where the axes are that its module sees; where to insert those of the
        layers, one after the other; and where these then are."""
        if inside is None:
            info = self.structure[surgery.name_of(leaf[:-1])]
            keys = list(info.params)
            stored = [self.shapes[(*info.path, key)] for key in keys]
            inserted = scanned_axes(stored, [info.params[key].shape for key in keys])
        else:
            inserted = list(inside)
        places = list(range(len(self.shapes[leaf])))
        layers: list[int] = []
        for axis in reversed(inserted):
            layers.insert(0, places.pop(axis))
        return places, inserted, layers

    def _leaf_in(self, host: Path) -> Path | None:
        """A leaf of a module, or of the first in it that has one."""
        return next(((*info.path, key) for info in self.structure.below(host) for key in info.params), None)

    def _allowed(self, shape: Sequence[int], followed: Sequence[_Followed]) -> P:
        """The spec, with what fits: where sizes agree or are known to be divided, and no mesh axis twice."""
        used: set[str] = set()
        kept: list[Entry] = []
        for size, (entry, of) in zip(shape, followed, strict=True) if len(shape) == len(followed) else ():
            divided = size == of if self.sizes is None else size % parts_of(entry, self.sizes) == 0
            kept.append(entry if divided and names_of(entry) and used.isdisjoint(names_of(entry)) else None)
            used.update(names_of(kept[-1]))
        return P(*kept) if any(kept) else P()


_Followed = tuple[Entry, int]  # the mesh axes of an axis that is followed, and its size
