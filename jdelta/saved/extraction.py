"""A trained delta apart from its model: in memory, in a folder, on the Hub, and in PEFT's format."""

from __future__ import annotations

import os
from typing import Any

import jax
from flax.core import meta

from jdelta.core import training
from jdelta.core.config import as_path, as_type
from jdelta.core.merging import materialised
from jdelta.core.state import DeltaState, targets
from jdelta.core.warn import warn
from jdelta.saved import hub, peft
from jdelta.saved.finetuned import BackboneInfo, Finetuned
from jdelta.trees import fingerprint, processes, surgery
from jdelta.trees.surgery import Tree


def finetuned(state: DeltaState, params: Tree | None = None) -> Finetuned:
    """The trained delta apart from the model: to be saved, added to others, put on another copy of the backbone.

    Args:
      params: the tree to take the values from; by default `model.params`.

    Returns:
      Its own leaves and whatever else trains (but no leaves of other deltas), with the configuration and the
      backbone's fingerprint. A prefix comes without the network that makes it, as `materialise` leaves it.

    A delta of which nothing has moved since it was initialised is a `UserWarning`.

    Raises:
      RuntimeError: it is detached, or the tree was donated.
      ValueError: leaves are missing, or are shapes.
    """
    state.active("saved")
    if training.is_untrained(state, state.values(params)):
        warn(training.untrained_message(state, "finetuned", params))
    return _extracted(state, params)


def save_finetuned(
    state: DeltaState, path: str | os.PathLike[str], params: Tree | None = None, *, allow_untrained: bool = False
) -> None:
    """Writes what was trained to a folder: `delta_config.json`, `delta.safetensors` and a model card.

    `AutoDeltaModel.from_finetuned(path, backbone_model=…)` restores it bit for bit, in the dtype that it has now.
    The folder is replaced as a whole: whenever this is interrupted, it holds the old delta or the new one. In a
    program of several processes all have to call this, and the first one writes; if it fails, all raise.

    Args:
      path: the folder; it is made if need be, and other files in it stay.
      params: the tree to take the values from; by default `model.params`.
      allow_untrained: whether to write a delta of which nothing has moved since it was initialised, as
        `model.params` holds it while a tree of your own is trained.

    Raises:
      OSError: no permission, no space, or the path is a file. What was there before is there still.
      ValueError: nothing has moved. Nothing is written then.
      RuntimeError, ValueError: as `finetuned`.
    """
    path = as_path("save_finetuned", path)
    found = _trained_or_allowed(state, "save_finetuned", params, allow_untrained)
    processes.by_first(lambda: found.save(path))


def push_to_hub(
    state: DeltaState, repo_id: str, params: Tree | None = None, *, allow_untrained: bool = False, **options: Any
) -> str:
    """Saves what was trained and uploads it to the Hub.

    Args:
      repo_id: `"user/name"`; the repository is made if need be.
      params, allow_untrained: as in `save_finetuned`.
      **options: `token`, `private`, `revision`, `commit_message`, `create_pr`, as huggingface_hub has them.

    Returns:
      The address of the commit. In a program of several processes all have to call this, and the first uploads.

    Raises:
      PermissionError: the token does not allow it, or there is none.
      ConnectionError: the Hub cannot be reached, or fails.
      FileNotFoundError: no such revision to start from.
      TypeError: an unknown option.
      ValueError: the Hub refuses the name; or `private` of a repository that is public already.
      RuntimeError, ValueError: as `finetuned`.
    """
    found = _trained_or_allowed(state, "push_to_hub", params, allow_untrained)
    return processes.by_first(lambda: hub.push(found.files(), repo_id, **options))


def to_peft(
    state: DeltaState, path: str | os.PathLike[str], params: Tree | None = None, *, allow_untrained: bool = False
) -> None:
    """Writes what was trained in the format of PyTorch PEFT, which `PeftModel.from_pretrained` loads.

    Of LoRA, prefix tuning and prompt tuning. The folder gets `adapter_config.json` and `adapter_model.safetensors`,
    written beside it first; other files in it stay. Whole modules that trained with the delta become
    `modules_to_save`, single biases `bias`. In a program of several processes all have to call this.

    Args:
      path: the folder; it is made if need be.
      params, allow_untrained: as in `save_finetuned`.

    Raises:
      OSError: no permission, no space, or the path is a file. What was there before is there still.
      ValueError: PEFT has no such method, or cannot train what trained here; the message says what.
      RuntimeError, ValueError: as `finetuned`.
    """
    path = as_path("to_peft", path)
    found = _trained_or_allowed(state, "to_peft", params, allow_untrained)
    processes.by_first(lambda: peft.to_peft(found, state.structure, path))


def _trained_or_allowed(state: DeltaState, verb: str, params: Tree | None, allow_untrained: bool) -> Finetuned:
    """What is written. Raises `ValueError` if nothing has moved, unless that is allowed."""
    state.active("saved")
    allowed = as_type("allow_untrained", allow_untrained, bool)
    if not allowed and training.is_untrained(state, state.values(params)):
        message = training.untrained_message(state, verb, params)
        raise ValueError(f"{message} To write it as it is: allow_untrained=True.")
    return _extracted(state, params)


def _extracted(state: DeltaState, params: Tree | None) -> Finetuned:
    """The delta apart from the model, whether it has moved or not."""
    own, tree, method = state.active("saved"), state.values(params), state.method
    trains = surgery.flatten(surgery.parameters(training.trainable_mask(state, tree)))
    deltas = {path for a in state.host.attachments for path in a.leaves}
    backbone = [path for path, flag in trains.items() if path not in deltas and flag is not surgery.empty_node]
    if own.generator is not None and (simple := method.materialised()) is not None:
        tree, own = materialised(state, tree, simple)
        method = simple
    leaves = surgery.flatten(surgery.parameters(tree))
    mine = [path for path in own.leaves if not method.regenerated(path)]
    wanted = [*mine, *(path for path in backbone if trains[path])]
    for path in wanted:
        if path not in leaves or isinstance(meta.unbox(leaves[path]), jax.ShapeDtypeStruct):
            raise ValueError(f"the tree holds no value of {surgery.name_of(path)!r}. Pass one that does: params=….")
    frozen = {surgery.name_of(path): leaves[path] for path in backbone if not trains[path]}
    host = state.host
    return Finetuned(
        name=state.name,
        config=method,
        values={surgery.name_of(path): processes.to_host(leaves[path]) for path in wanted},
        targets=tuple(targets(state)),
        exclude=state.exclude,
        inserted=tuple(state.inserted),
        backbone=BackboneInfo(host.class_name, host.source_repo, fingerprint.fingerprint(frozen)),
        own=frozenset(map(surgery.name_of, mine)),
    )
