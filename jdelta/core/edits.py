"""What a delta does to a backbone, as data: edits of calls, and all of them that go by one name."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from flax import linen as nn

from jdelta.core.pickling import packed, unpacked
from jdelta.trees.surgery import Path


@dataclasses.dataclass(frozen=True, eq=False)
class CallEdit:
    """One change of the calls of one module, the host.

        yield jdelta.CallEdit(host.path, "after", nn.Dense(768))  # y -> layer(y), in `Method.edits`

    Attributes:
      host: path of the module that is changed; the layer's parameters live below it.
      where: `"after"`, `y -> layer(y)`; `"before"`, `x -> layer(x)`; `"parallel"`, `y + layer(x)`;
        `"replace"`, `layer(*args, **kwargs)` in place of the host; `"around"`, `layer(host, *args, **kwargs)`,
        where `host` is a `Host` and `__call__` is `nn.nowrap`, so that modules which a compact host makes stay its own;
        `"train"`, no computation: the host's own leaf `leaf` trains with the delta.
      layer: an unbound linen module. It is told `deterministic` (or `train`) and `context`, a `jdelta.Context`, if its
        `__call__` has such arguments. If it has a method `during_run`, the whole model runs inside what this gives.
      span_input: for `"parallel"`, path of the module whose input is the layer's `x`, if that is not the host itself.
      leaf: path below the host: of the layer's parameters, or of the leaf that trains.
      auxiliary: whether it only supports another edit, so that its host is not one of the delta's targets.
      outermost: whether it goes around all other edits of its host, whenever those were attached.
      needs: a leaf of the host's own without which it does nothing.
      method: name of the host's method that it goes around, if the host is run by another one than `__call__`.
    """

    host: Path
    where: Literal["after", "before", "parallel", "replace", "around", "train"]
    layer: nn.Module | None = None
    span_input: Path | None = None
    leaf: Path = ()
    auxiliary: bool = False
    outermost: bool = False
    needs: str | None = None
    method: str = "__call__"

    def __post_init__(self) -> None:
        if self.layer is not None and not isinstance(self.layer, nn.Module):
            raise TypeError(
                f"the layer of a CallEdit is a flax.linen module, on nnx modules too, got {type(self.layer).__name__}."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "layer": packed(self.layer)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, layer=unpacked(state["layer"]))


@dataclasses.dataclass(frozen=True, eq=False)
class WeightEdit:
    """One change of one leaf of the backbone.

        yield jdelta.WeightEdit(("moe", "wi"), MyRule())
        yield from jdelta.weight_edits(host, MyRule())  # of the weight in which a module is linear

    Attributes:
      leaf: path of the leaf, owned by a module that is called or not.
      rule: a `core.rules.WeightRule`; a `FeatureRule` for a change of features.
      own: path of the delta's own leaves, below its name at the owner of the leaf.
      auxiliary: whether it only helps another edit.
      is_bias: of a `FeatureRule`, whether the leaf is the bias that goes with the weight of another edit.
      linear: which axes of the leaf are which. Attaching finds it out, as it does all that follows.
      shape: of the leaf as its module sees it: inside `nn.scan` without the layers' axes.
      layers: those axes of the stored leaf, outermost last.
      by_module: whether its module was named, and not the leaf.
      alone: whether that module can be run on its own parameters and one array.
      in_call: whether it runs in the calls of the leaf's owner, which is known to be linear; else the leaf is
        rewritten in the tree before the model runs.
      name: the delta's.
    """

    leaf: Path
    rule: Any
    own: Path = ()
    auxiliary: bool = False
    is_bias: bool = False
    linear: Any = None
    shape: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()
    by_module: bool = False
    alone: bool = False
    in_call: bool = False
    name: str = ""

    where: ClassVar[Literal["weight"]] = "weight"
    layer: ClassVar[None] = None
    span_input: ClassVar[None] = None

    @property
    def host(self) -> Path:
        """Path of the owner of the leaf."""
        return self.leaf[:-1]

    @property
    def own_path(self) -> Path:
        """Path of the delta's own leaves."""
        return (*self.host, self.name, *self.own)


Edit = CallEdit | WeightEdit


@dataclasses.dataclass(frozen=True)
class Attachment:
    """A delta as the model knows it.

    Attributes:
      name: its name in the tree.
      edits: what it does.
      leaves: paths of its leaves in the tree.
      active: whether the model runs it.
      frozen: those of its leaves that never train.
      generator: a module whose parameters are the leaves below `(name,)`, and which makes from them, once a run, leaves
        of the hosts that are not in the tree: `generator() -> {path: array}`.
      generated: the paths of what the generator makes.
      config: its method's arguments.
    """

    name: str
    edits: tuple[Edit, ...]
    leaves: tuple[Path, ...] = ()
    active: bool = True
    frozen: frozenset[Path] = frozenset()
    generator: nn.Module | None = None
    generated: tuple[Path, ...] = ()
    config: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "generator": packed(self.generator)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, generator=unpacked(state["generator"]))

    @property
    def unfrozen_backbone(self) -> tuple[Path, ...]:
        """Paths of the backbone's own leaves that train with the delta."""
        return tuple((*edit.host, *edit.leaf) for edit in self.call_edits if edit.where == "train")

    @property
    def call_edits(self) -> tuple[CallEdit, ...]:
        """Those of its edits that are edits of calls."""
        return tuple(edit for edit in self.edits if isinstance(edit, CallEdit))

    @property
    def weight_edits(self) -> tuple[WeightEdit, ...]:
        """Those of its edits that are edits of weights."""
        return tuple(edit for edit in self.edits if isinstance(edit, WeightEdit))

    @property
    def after_merge(self) -> tuple[CallEdit, ...]:
        """What runs while it is off, for leaves of the hosts that merging may have added: see `merging.merged`."""
        layers = [(edit, getattr(edit.layer, "after_merge", None)) for edit in self.call_edits]
        behind = [(edit, *make()) for edit, make in layers if make is not None]
        return tuple(CallEdit(edit.host, edit.where, layer, auxiliary=True, needs=leaf) for edit, leaf, layer in behind)

    @property
    def trained(self) -> set[Path]:
        """Paths of everything that trains with the delta: its own leaves, and leaves of the backbone."""
        return {*self.leaves, *self.unfrozen_backbone} - self.frozen
