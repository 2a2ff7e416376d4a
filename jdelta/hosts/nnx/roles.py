"""Which role each module has: what the attachments of a model do there."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Hashable, Mapping, Sequence

from jdelta.core import weights
from jdelta.core.edits import Attachment, CallEdit, Edit, WeightEdit
from jdelta.core.structural_key import Same, structural_key
from jdelta.hosts import call_edits
from jdelta.hosts.nnx.bridge import Inside, inside
from jdelta.trees.surgery import Path


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Edits:
    """What happens at one module, as data. Equal ones do the same, wherever their modules are.

    Attributes:
      path: of the module, for messages.
      calls: name of a function of the module to the edits of its calls, in the order of attaching.
      weights: edits of its weights that run in its calls.
      rewritten: name of a parameter to the edits by which it is read with their changes.
      starts_span: whether the span of an edit starts from its input.
      leaves: paths of the leaves that it needs, below itself.
      inside: of an `nnx.bridge.ToNNX`, what happens in its linen module.
      attachments: at the root, all that the model carries.
      key: what makes it equal to others.
    """

    path: Path
    calls: Mapping[str, tuple[CallEdit, ...]]
    weights: tuple[WeightEdit, ...] = ()
    rewritten: Mapping[str, tuple[WeightEdit, ...]]
    starts_span: bool = False
    leaves: tuple[Path, ...] = ()
    inside: Inside | None = None
    attachments: tuple[Attachment, ...] = ()
    key: Hashable = None

    @property
    def all(self) -> list[Edit]:
        """Those that run in its calls."""
        return [*self.weights, *(edit for some in self.calls.values() for edit in some)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Edits) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return "<edits>"


def edits_by_module(
    attachments: Sequence[Attachment],
    paths: Collection[Path],
    owners: Mapping[Path, Collection[Path]],
    merged: Collection[Path],
    bridges: Mapping[Path, int],
    apart: bool = False,
) -> dict[Path, Edits]:
    """Path to what happens there, of the modules whose functions have to be heard.

    Args:
      attachments: in the order of attaching, active or not.
      paths: of all modules.
      owners: path of a parameter to those at which it is too, since modules share it.
      merged: of modules that were given parameters which they know nothing of.
      bridges: path of each `nnx.bridge.ToNNX` to how many axes of layers its leaves have that it does not see.
      apart: whether these edits are equal to no others, so that nothing that was traced before serves them.
    """
    run = object() if apart else None
    active = [a for a in attachments if a.active]
    behind = [edit for a in attachments if not a.active for edit in a.after_merge if edit.host in merged]
    found_inside = {path: inside(path, attachments, n) for path, n in bridges.items()}
    bridged = {path: one for path, one in found_inside.items() if one}
    if not active and not behind and not bridged:
        return {}
    everything = [*(edit for a in active for edit in a.edits), *behind]
    edits = [edit for edit in everything if not any(edit.host[: len(path)] == path for path in bridges)]
    calls = sorted((e for e in edits if isinstance(e, CallEdit) and e.layer is not None), key=lambda e: e.outermost)
    in_call = [e for e in edits if isinstance(e, WeightEdit) and e.in_call]
    rewriting = [e for e in edits if isinstance(e, WeightEdit) and not e.in_call]
    located = any(e.where == "around" or e.span_input is not None for e in calls)  # what asks where a call is
    everywhere = located or bool(rewriting) or any(map(call_edits.asks_for_context, edits))
    starts = {e.span_input for e in calls if e.span_input is not None}
    heard = {(), *(e.host for e in calls), *(e.host for e in in_call), *starts, *bridged}
    own = [leaf for a in active for leaf in (*a.leaves, *a.generated)]
    names = {a.name for a in active}
    found = {}
    for path in paths if everywhere else (path for path in paths if path in heard):
        rewritten: dict[str, tuple[WeightEdit, ...]] = {}
        for edit in rewriting:
            for place in (edit.leaf, *owners.get(edit.leaf, ())):
                if place[:-1] == path:
                    rewritten[place[-1]] = (*rewritten.get(place[-1], ()), edit)
        mine = [e for e in calls if e.host == path]
        n = len(path)
        made = Edits(
            path=path,
            calls={method: tuple(e for e in mine if e.method == method) for method in {e.method: 0 for e in mine}},
            weights=tuple(e for e in in_call if e.host == path),
            rewritten=rewritten,
            starts_span=path in starts,
            leaves=tuple(leaf[n:] for leaf in own if leaf[:n] == path and leaf[n : n + 1] and leaf[n] in names),
            inside=bridged.get(path),
            attachments=tuple(attachments) if not path else (),
        )
        found[path] = dataclasses.replace(made, key=(_key(made, path if located or apart else None), run))
    return found


def _key(edits: Edits, place: Path | None) -> Hashable:
    return (
        place,
        tuple((method, tuple(map(edit_key, some))) for method, some in edits.calls.items()),
        tuple(map(edit_key, edits.weights)),
        tuple((name, tuple(map(edit_key, some))) for name, some in edits.rewritten.items()),
        edits.leaves,
        tuple(map(_attachment_key, edits.inside.attachments)) if edits.inside is not None else (),
        tuple(map(_attachment_key, edits.attachments)),
    )


def edit_key(edit: Edit) -> Hashable:
    """What makes edits equal that do the same to modules that are alike."""
    if isinstance(edit, WeightEdit):
        kind = weights.kind_of(edit)
        rule: Hashable = kind if kind.is_hashable() else (Same(edit.rule), kind.leaf, kind.shape)
        return (rule, edit.layers, edit.name, edit.own, edit.in_call, edit.alone, edit.is_bias)
    span = None if edit.span_input is None else (edit.span_input, edit.host)
    return (edit.where, structural_key(edit.layer), edit.leaf, edit.outermost, edit.needs, edit.method, span)


def _attachment_key(attachment: Attachment) -> Hashable:
    edits = tuple((edit.host, edit_key(edit)) for edit in attachment.edits)
    a = attachment
    return (
        a.name,
        a.active,
        edits,
        a.leaves,
        a.frozen,
        a.generated,
        structural_key(a.generator),
        structural_key(a.config),
    )
