"""A trained delta without its model: in memory, in a folder, on the Hub, and in PEFT's format."""

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
    """Returns the trained delta without its model: to be saved, combined with others, or attached to another model.

        found = delta.finetuned(params)
        other = jdelta.AutoDeltaModel.from_finetuned(found, backbone_model=other_model)

    A delta whose values have not changed since it was initialised is a `UserWarning`.

    Args:
      params: the tree that holds the values; by default `model.params`.

    Returns:
      Its own leaves and what else trains (but no leaves of other deltas), with the configuration and the backbone's
      fingerprint. A prefix is returned as `materialise` leaves it, without the network that generates it.

    Raises:
      RuntimeError: the delta is detached, or the tree was donated.
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

        delta.save_finetuned("movies/", params)
        restored = jdelta.AutoDeltaModel.from_finetuned("movies/", backbone_model=model)

    Loading restores the same bits and dtypes. The folder is replaced as a whole: if this is interrupted, it holds the
    old delta or the new one. In a program of several processes all must call this, and the first one writes; if it
    fails, all raise.

    Args:
      path: the folder; it is created if necessary, and other files in it stay.
      params: the tree that holds the values; by default `model.params`.
      allow_untrained: whether to write a delta whose values have not changed since it was initialised. While a tree of
        your own is trained, those in `model.params` have not.

    Raises:
      OSError: no permission, no space, or the path is a file. The folder is then as it was.
      ValueError: no value has changed. Nothing is written then.
      RuntimeError, ValueError: as `finetuned`.
    """
    path = as_path("save_finetuned", path)
    found = _trained_or_allowed(state, "save_finetuned", params, allow_untrained)
    processes.by_first(lambda: found.save(path))


def push_to_hub(
    state: DeltaState, repo_id: str, params: Tree | None = None, *, allow_untrained: bool = False, **options: Any
) -> str:
    """Uploads what was trained to the Hub.

        address = delta.push_to_hub("user/movies", params, private=True)

    In a program of several processes all must call this, and the first one uploads.

    Args:
      repo_id: `"user/name"`; the repository is created if necessary.
      params, allow_untrained: as in `save_finetuned`.
      **options: `token`, `private`, `revision`, `commit_message`, `create_pr`, as in huggingface_hub.

    Returns:
      The address of the commit.

    Raises:
      PermissionError: there is no token, or it does not allow this.
      ConnectionError: the Hub cannot be reached, or fails.
      FileNotFoundError: the revision does not exist.
      TypeError: an option is unknown.
      ValueError: the Hub refuses the name, or `private` is asked of a repository that is public.
      RuntimeError, ValueError: as `finetuned`.
    """
    found = _trained_or_allowed(state, "push_to_hub", params, allow_untrained)
    return processes.by_first(lambda: hub.push(found.files(), repo_id, **options))


def to_peft(
    state: DeltaState, path: str | os.PathLike[str], params: Tree | None = None, *, allow_untrained: bool = False
) -> None:
    """Writes what was trained in the format of PyTorch PEFT, for LoRA, prefix tuning and prompt tuning.

        delta.to_peft("adapter/", params)  # PeftModel.from_pretrained(torch_model, "adapter/") computes the same

    The folder gets `adapter_config.json` and `adapter_model.safetensors`, replaced as in `save_finetuned`; other files
    stay. Modules that trained with the delta become `modules_to_save`, single biases `bias`. In a program of several
    processes all must call this.

    Args:
      path: the folder; it is created if necessary.
      params, allow_untrained: as in `save_finetuned`.

    Raises:
      OSError: no permission, no space, or the path is a file. The folder is then as it was.
      ValueError: PEFT does not have the method, or cannot train what trained here; the message says what.
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
    held = surgery.parameters_of(tree)
    trains = training.trained(state, held)
    deltas = {path for a in state.host.attachments for path in a.leaves}
    backbone = [path for path, leaf in held.items() if path not in deltas and leaf is not surgery.empty_node]
    if own.generator is not None and (simple := method.materialised()) is not None:
        tree, own = materialised(state, tree, simple)
        method = simple
    leaves = surgery.flatten(surgery.parameters(tree))
    mine = [path for path in own.leaves if not method.regenerated(path)]
    wanted = [*mine, *(path for path in backbone if path in trains)]
    for path in wanted:
        if path not in leaves or isinstance(meta.unbox(leaves[path]), jax.ShapeDtypeStruct):
            raise ValueError(f"the tree holds no value of {surgery.name_of(path)!r}. Pass one that does: params=….")
    frozen = {surgery.name_of(path): leaves[path] for path in backbone if path not in trains}
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
