"""Off the model and back onto it."""

from __future__ import annotations

import dataclasses

from jdelta.core.state import DeltaState, carried, copied, unfrozen_backbone, without
from jdelta.trees import surgery


def detach(state: DeltaState) -> None:
    """Takes the delta off: the model then computes what it computed without it.

    The leaves that `model.params` held are kept, and `attach` puts them back; leaves of the backbone's own that
    trained with the delta get their earlier values meanwhile. Deltas come off in any order. A tree that you hold
    yourself is yours to change: `jdelta.prune(params, delta)`.

    Raises:
      RuntimeError: it is detached already, or `model.params` was donated.
      ValueError: `model.params` lacks leaves of this delta.
    """
    _switch(state, active=False)


def attach(state: DeltaState) -> None:
    """Puts the delta back in its place, with the values it had when it was detached.

    Raises:
      RuntimeError: it is attached already, or `model.params` was donated.
    """
    _switch(state, active=True)


def remove(state: DeltaState) -> None:
    """Takes the delta off for good: its leaves go, and its name is free again.

    Nothing can be done with this object afterwards; what `finetuned` gave before can be attached anew. A delta that
    is merged stays in the weights, which are then the model's own: `merge(); remove()` leaves a bare backbone. To
    forget a detached delta, `del` will do: one that nobody holds does not stay on the model.

    Raises:
      RuntimeError: it was removed already.
      RuntimeError, ValueError: as `detach`.
    """
    if state.attachment.active:
        detach(state)
    own, others = state.attachment, carried(state)
    state.host.install(without(others, [own]) if state.was_merged else [a for a in others if a.name != state.name])
    state.removed = own
    state.kept = {}
    state.unmerged = {}


def _switch(state: DeltaState, active: bool) -> None:
    """Takes the delta off the model, or puts it back."""
    own, host = state.attachment, state.host
    if state.merged:
        raise RuntimeError(f"delta {state.name!r} is merged into the weights. Call unmerge() first.")
    if own.active == active:
        raise RuntimeError(f"delta {state.name!r} is {'attached' if active else 'detached'} already.")
    attachments = [dataclasses.replace(a, active=active) if a.name == state.name else a for a in carried(state)]
    params = host.params
    if params is not None:
        surgery.require_alive(params)
        flat, start = surgery.flatten(params), surgery.root(params)
        leaves = [(*start, *path) for path in own.leaves]
        keep = unfrozen_backbone(state, params)
        if not active:
            for path in leaves:
                if path not in flat:
                    raise ValueError(
                        f"detach: model.params lacks {surgery.name_of(path)!r}. Set model.params to a tree "
                        "that holds the delta's leaves."
                    )
            keep.update({path: flat[path] for path in leaves})
            flat = {path: leaf for path, leaf in flat.items() if path not in set(leaves)}
        flat.update(state.kept)
        keep = {path: copied(leaf) for path, leaf in keep.items()}
        host.params = surgery.unflatten(flat, like=params)
        state.kept = keep
    host.install(attachments)
