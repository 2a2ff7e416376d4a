"""What is attached to a backbone: a table, and a dict."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from flax.core import meta
from jax.sharding import NamedSharding
from rich.console import Console
from rich.table import Table

from jdelta.core import training
from jdelta.core.edits import Attachment
from jdelta.core.state import DeltaState, carried, held_on, kept_value, targets_of
from jdelta.trees import surgery
from jdelta.trees.surgery import Path, Tree


@dataclasses.dataclass(frozen=True)
class DeltaStatus:
    """One delta of a backbone.

    Attributes:
      name: its name in the tree.
      method: the `delta_type` of its method.
      state: whether the model runs it, or its weights hold it.
      targets: how many modules and leaves it is attached at.
      parameters: how many numbers its own leaves have, frozen ones among them.
      trains: how many numbers train now, by this delta's own choice: its leaves and what else it unfreezes; `None` if
        nobody holds the delta.
      dtypes: number of leaves of each dtype: of its own, and of those of the backbone that train as part of it.
      devices: where the values of these leaves are, such as `cpu:0`; `()` if the model holds shapes only.
      shardings: number of these leaves of each sharding over a mesh, such as `(None, 'model')` or `replicated`.
    """

    name: str
    method: str
    state: Literal["attached", "detached", "merged"]
    targets: int
    parameters: int
    trains: int | None
    dtypes: Mapping[str, int]
    devices: tuple[str, ...]
    shardings: Mapping[str, int]


@dataclasses.dataclass(frozen=True, repr=False)
class Status:
    """The deltas of a backbone, in the order of attaching. It prints as a table.

        print(delta.status())
        assert delta.status().to_dict()["deltas"][0]["state"] == "attached"

    Attributes:
      backbone: the class of the model.
      parameters: how many numbers its own leaves have.
      deltas: one entry for each delta.
    """

    backbone: str
    parameters: int
    deltas: tuple[DeltaStatus, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as a dict that JSON can hold."""
        entries = [{**dataclasses.asdict(delta), "devices": list(delta.devices)} for delta in self.deltas]
        return {"backbone": self.backbone, "parameters": self.parameters, "deltas": entries}

    def __rich__(self) -> Table:
        table = Table(title=f"{self.backbone}: {self.parameters:,} parameters", title_justify="left")
        for heading in ("delta", "method", "state", "targets", "parameters", "trains", "dtype", "device", "sharding"):
            table.add_column(heading, justify="right" if heading in ("targets", "parameters", "trains") else "left")
        for delta in self.deltas:
            table.add_row(
                delta.name,
                delta.method,
                delta.state,
                f"{delta.targets:,}",
                f"{delta.parameters:,}",
                "?" if delta.trains is None else f"{delta.trains:,}",
                _counted(delta.dtypes),
                _ranges(delta.devices) or ("shapes only" if delta.dtypes else ""),
                _counted(delta.shardings),
            )
        return table

    def __str__(self) -> str:
        return self._written(Console(file=io.StringIO(), width=160, color_system=None, legacy_windows=False))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f'<pre style="line-height: 1.2">{_escaped(str(self))}</pre>'

    def _written(self, console: Console) -> str:
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


def status(state: DeltaState, params: Tree | None = None) -> Status:
    """What is attached to this delta's backbone: each delta, what it does now, its size, and where its values are.

        print(delta.status())
        delta.status().to_dict()

    Args:
      params: the tree to take the values from; by default `model.params`. The values of deltas that are not attached
        are those that `attach` puts back.

    Returns:
      A `Status`, which prints as a table, also in a notebook.

    Raises:
      RuntimeError: the delta was removed.
    """
    _ = state.attachment  # raises if there is none
    leaves = surgery.parameters_of(state.tree(params))
    states = {other.name: other for other in held_on(state)} | {state.name: state}
    own = surgery.flatten(surgery.parameters(state.structure.params))
    entries = [
        _entry(attachment, states.get(attachment.name), state, leaves)
        for attachment in carried(state)
        if "." not in attachment.name  # which is no delta's
    ]
    return Status(state.host.class_name, sum(map(_size, own.values())), tuple(entries))


def _entry(
    attachment: Attachment, mine: DeltaState | None, state: DeltaState, leaves: Mapping[Path, Any]
) -> DeltaStatus:
    merged = mine is not None and mine.merged
    shapes = surgery.flatten(surgery.parameters(mine.shapes)) if mine is not None and mine.shapes is not None else {}
    kept = mine.kept if mine is not None else {}
    back = {path: value for path in attachment.leaves if (value := kept_value(kept, path)) is not None}
    known = {**shapes, **back, **leaves}
    own, backbone = (
        [meta.unbox(known[path]) for path in paths if path in known]
        for paths in (attachment.leaves, attachment.unfrozen_backbone)
    )
    found = [*own, *backbone]
    trains = None if mine is None else sum(_size(leaves[path]) for path in training.trained(mine, leaves))
    arrays = [leaf for leaf in found if isinstance(leaf, (jax.Array, np.ndarray))]
    return DeltaStatus(
        name=attachment.name,
        method=getattr(attachment.config, "delta_type", "delta"),
        state="merged" if merged else "attached" if attachment.active else "detached",
        targets=len(targets_of(attachment, state.structure)),
        parameters=sum(map(_size, own)),
        trains=trains,
        dtypes=dict(Counter(str(leaf.dtype) for leaf in found)),
        devices=tuple(sorted({device for leaf in arrays for device in _devices(leaf)}, key=_order)),
        shardings=dict(Counter(where for leaf in arrays if (where := _sharding(leaf)))),
    )


def _size(leaf: Any) -> int:
    return 0 if leaf is surgery.empty_node else int(np.prod(meta.unbox(leaf).shape))


def _devices(leaf: Any) -> Iterable[str]:
    if isinstance(leaf, np.ndarray):
        return ["host"]
    if isinstance(leaf, jax.core.Tracer):
        return []
    return [f"{device.platform}:{device.id}" for device in leaf.sharding.device_set]


def _sharding(leaf: Any) -> str:
    sharding = None if isinstance(leaf, (np.ndarray, jax.core.Tracer)) else leaf.sharding
    if not isinstance(sharding, NamedSharding):
        return ""
    return "replicated" if sharding.is_fully_replicated else repr(tuple(sharding.spec))


def _order(device: str) -> tuple[str, int]:
    platform, _, number = device.partition(":")
    return platform, int(number or 0)


def _ranges(devices: Iterable[str]) -> str:
    """`cpu:0-7` for eight devices."""
    ranges: dict[str, list[list[int]]] = {}
    for platform, number in map(_order, devices):
        runs = ranges.setdefault(platform, [])
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    names = [(name, ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in runs)) for name, runs in ranges.items()]
    return " ".join(name if name == "host" else f"{name}:{numbers}" for name, numbers in names)


def _counted(counts: Mapping[str, int]) -> str:
    """The one kind that there is, or each with its number."""
    return "".join(counts) if len(counts) < 2 else ", ".join(f"{n} {kind}" for kind, n in counts.items())


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
