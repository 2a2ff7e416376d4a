"""Detaching, attaching and removing a delta."""

from __future__ import annotations

import dataclasses

from jdelta.core.state import DeltaState, carried, copied, unfrozen_backbone, without
from jdelta.trees import surgery


def detach(state: DeltaState) -> None:
    """Detaches the delta: the model then computes what it computed without it.

        delta.detach()
        delta.attach()

    The leaves that `model.params` held are kept, and `attach` restores them; leaves of the backbone that trained with
    the delta have their earlier values meanwhile. Deltas can be detached in any order. A tree that you hold yourself
    does not change; use `jdelta.prune(params, delta)`.

    Raises:
      RuntimeError: the delta is detached already, or `model.params` was donated.
      ValueError: `model.params` lacks leaves of this delta.
    """
    _switch(state, active=False)


def attach(state: DeltaState) -> None:
    """Attaches a detached delta again, with the values that it had when it was detached.

        delta.detach()
        delta.attach()

    Raises:
      RuntimeError: the delta is attached already, or `model.params` was donated.
    """
    _switch(state, active=True)


def remove(state: DeltaState) -> None:
    """Detaches the delta permanently: its leaves are deleted, and its name is free again.

        found = delta.finetuned()  # to attach it again later
        delta.remove()

    The object cannot be used afterwards. The update of a merged delta stays in the weights, which are then the model's
    own: `merge(); remove()` leaves a bare backbone. A detached delta that is no longer referenced (`del delta`) does
    not stay on the model either.

    Raises:
      RuntimeError: the delta was removed already.
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
    """Detaches the delta from the model, or attaches it."""
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
                        f"detach: the model lacks {surgery.name_of(path)!r}. Put a tree into it that holds the "
                        "delta's leaves."
                    )
            keep.update({path: flat[path] for path in leaves})
            flat = {path: leaf for path, leaf in flat.items() if path not in set(leaves)}
        flat.update(state.kept)
        keep = {path: copied(leaf) for path, leaf in keep.items()}
        host.params = surgery.unflatten(flat, like=params)
        state.kept = keep
    host.install(attachments)
