"""A change of how a model computes what it computes: opt-in, without parameters, and undoable."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
from flax import linen as nn

from jdelta.core.edits import Attachment, CallEdit
from jdelta.core.host import HostAdapter
from jdelta.core.structure import ModuleInfo, Structure
from jdelta.hosts.adapting import adapt


class Patch:
    """A change of how a model computes, with `undo`.

        fused = jdelta.fused_attention(model)
        fused.targets, fused.left
        fused.undo()

    Attributes:
      targets: the names of the modules that were changed, in the order of execution.
      left: name to reason of those that were not changed.
    """

    def __init__(
        self,
        adapter: HostAdapter,
        attachment: Attachment,
        what: str,
        targets: Sequence[str],
        left: Mapping[str, str],
    ):
        self._adapter = adapter
        self._attachment = attachment
        self._what = what
        self.targets = list(targets)
        self.left = dict(left)

    def undo(self) -> None:
        """Restores the model's own computation.

        Raises:
          RuntimeError: it was undone already.
        """
        carried = self._adapter.attachments
        rest = [attachment for attachment in carried if attachment is not self._attachment]
        if len(rest) == len(carried):
            raise RuntimeError("undo: this was undone already.")
        self._adapter.install(rest)

    def __repr__(self) -> str:
        left = f"; left: {reasons(self.left)}" if self.left else ""
        return f"{len(self.targets)} {self._what}: {', '.join(_collapsed(self.targets))}{left}"


def unpatched(model: object, name: str, message: str) -> HostAdapter:
    """Returns the model's adapter, if the model has no patch of this name.

    Args:
      model: a Flax model of transformers, or a `jdelta.Backbone`.
      name: of the attachment. It contains a dot, unlike that of a delta.
      message: of the error otherwise.

    Raises:
      RuntimeError: it has one.
      TypeError: the model is not a supported one.
    """
    adapter = adapt(model)
    if any(attachment.name == name for attachment in adapter.attachments):
        raise RuntimeError(message)
    return adapter


def trace_with(adapter: HostAdapter, structure: Structure, name: str, layer: Callable[[ModuleInfo], nn.Module]) -> None:
    """One abstract run of the bare model with such a layer around every module."""
    edits = tuple(CallEdit(info.path, "around", layer(info)) for info in structure)
    jax.eval_shape(lambda: adapter.init([Attachment(name, edits)], jax.random.key(0)))


def install_patch(
    adapter: HostAdapter,
    name: str,
    edits: Iterable[CallEdit],
    what: str,
    targets: Iterable[ModuleInfo],
    left: Mapping[str, str] | None = None,
) -> Patch:
    """Makes the model run these edits.

    Args:
      adapter: the model.
      name: of the attachment.
      edits: what it does.
      what: the kind of the modules, in the plural.
      targets: those that are changed.
      left: name to reason of those that are not.
    """
    attachment = Attachment(name, tuple(edits))
    adapter.install([*adapter.attachments, attachment])
    return Patch(adapter, attachment, what, [info.name for info in targets], left or {})


# --- names


def reasons(left: Mapping[str, str]) -> str:
    """The names by their reason."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in left.items():
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(_collapsed(names))} ({reason})" for reason, names in by_reason.items())


def _collapsed(names: Iterable[str]) -> list[str]:
    """Names that differ in one number, as one: `'layer.[0-11].attention'`."""
    runs: dict[tuple[str, str], list[int]] = {}
    for name in names:
        number = re.search(r"(?<![^.])\d+(?![^.])", name)
        key = (name[: number.start()], name[number.end() :]) if number else (name or "the root module", "")
        runs.setdefault(key, []).extend([int(number[0])] if number else [])
    return [start + _range(numbers) + end for (start, end), numbers in runs.items()]


def _range(numbers: list[int]) -> str:
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    whole = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"[{numbers[0]}-{numbers[-1]}]" if whole else f"[{','.join(map(str, numbers))}]"
