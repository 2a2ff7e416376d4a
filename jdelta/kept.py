"""What training leaves behind: saving, loading, exchanging and merging a delta."""

from __future__ import annotations

import dataclasses
import os
import warnings
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.core import meta

from jdelta.core import merging
from jdelta.core.config import DeltaConfig, as_path, as_type
from jdelta.hosts.linen.instrument import attachments_of, with_made
from jdelta.placed import Placed
from jdelta.saved import hub
from jdelta.saved.finetuned import BackboneInfo, Finetuned, listing, misfits, require_check_hash, require_same
from jdelta.trees import fingerprint, processes, surgery
from jdelta.trees.surgery import Tree


class Kept(Placed):
    """What `DeltaModel` does with a delta that is trained."""

    def finetuned(self, params: Tree | None = None) -> Finetuned:
        """The trained delta apart from the model: to be saved, added to others, put on another copy of the backbone.

        Args:
          params: the tree to take the values from; by default `model.params`.

        Returns:
          Its own leaves and whatever else trains (but no leaves of other deltas), with the configuration and the
          backbone's fingerprint. A prefix comes without the network that makes it, as `fold` leaves it.

        A delta of which nothing has moved since it was initialised is a `UserWarning`.

        Raises:
          RuntimeError: it is detached, or the tree was donated.
          ValueError: leaves are missing, or are shapes.
        """
        self._active("saved")
        if self._is_untrained(self._values(params)):
            warnings.warn(self._untrained("finetuned", params), stacklevel=2)
        return self._finetuned(params)

    def _untrained(self, verb: str, params: Tree | None) -> str:
        """The message for a delta that has not moved."""
        holder = "model.params" if params is None else "the tree that was passed"
        return (
            f"{verb}: nothing of delta {self.name!r} has moved since it was initialised: {holder} holds the values "
            "from before training. Pass the tree that training returned: pass params=…."
        )

    def _trained_or_allowed(self, verb: str, params: Tree | None, allow_untrained: bool) -> Finetuned:
        """What is written. Raises `ValueError` if nothing has moved, unless that is allowed."""
        self._active("saved")
        if not as_type("allow_untrained", allow_untrained, bool) and self._is_untrained(self._values(params)):
            raise ValueError(f"{self._untrained(verb, params)} To write it as it is: allow_untrained=True.")
        return self._finetuned(params)

    def _finetuned(self, params: Tree | None) -> Finetuned:
        own, tree, config = self._active("saved"), self._values(params), self.config
        trains = surgery.flatten(surgery.parameters(self._mask_of(tree)))
        deltas = {path for a in attachments_of(self._adapter.module) for path in a.leaves}
        backbone = [path for path, flag in trains.items() if path not in deltas and flag is not surgery.empty_node]
        if own.generator is not None and (simple := self.folded()) is not None:
            config, (tree, own) = simple, self._written(tree)
        leaves = surgery.flatten(surgery.parameters(tree))
        wanted = [*own.leaves, *(path for path in backbone if trains[path])]
        for path in wanted:
            if path not in leaves or isinstance(meta.unbox(leaves[path]), jax.ShapeDtypeStruct):
                raise ValueError(f"the tree holds no value of {surgery.name_of(path)!r}. Pass one that does: params=….")
        frozen = {surgery.name_of(path): leaves[path] for path in backbone if not trains[path]}
        return Finetuned(
            name=self.name,
            config=config,
            values={surgery.name_of(path): processes.to_host(leaves[path]) for path in wanted},
            targets=tuple(self.targets),
            exclude=self._exclude,
            inserted=tuple(self._inserted),
            backbone=BackboneInfo(self._adapter.class_name, self._adapter.source_repo, fingerprint.fingerprint(frozen)),
            own=frozenset(map(surgery.name_of, own.leaves)),
        )

    def save_finetuned(
        self, path: str | os.PathLike[str], params: Tree | None = None, *, allow_untrained: bool = False
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
        found = self._trained_or_allowed("save_finetuned", params, allow_untrained)
        processes.by_first(lambda: found.save(path))

    def push_to_hub(
        self, repo_id: str, params: Tree | None = None, *, allow_untrained: bool = False, **options: Any
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
        found = self._trained_or_allowed("push_to_hub", params, allow_untrained)
        return processes.by_first(lambda: hub.push(found.files(), repo_id, **options))

    def to_peft(
        self, path: str | os.PathLike[str], params: Tree | None = None, *, allow_untrained: bool = False
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
        from jdelta.saved import peft as peft_format  # here, since it knows the methods, which are made of this class

        path = as_path("to_peft", path)
        found = self._trained_or_allowed("to_peft", params, allow_untrained)
        processes.by_first(lambda: peft_format.to_peft(found, self._structure, path))

    def load_finetuned(
        self,
        source: str | os.PathLike[str] | Finetuned,
        params: Tree | None = None,
        check_hash: bool | Literal["warn"] = "warn",
        revision: str | None = None,
    ) -> Tree:
        """Puts saved values in the place of this delta's own. Compiled functions of the model stay valid.

            delta.load_finetuned("movies/")
            delta.load_finetuned("tweets/")  # another delta of the same method, arguments and modules

        Args:
          source: a folder, a repository of the Hub, or what `finetuned` gave.
          params: the tree to put them into, with or without leaves of this delta; by default `model.params`.
          check_hash: what to do if it was trained on another backbone, or on one whose head was left random: `"warn"`,
            `True` to refuse, `False` for nothing. Where the backbone is given as shapes, these alone are compared.
          revision: of the repository.

        Returns:
          The tree with the saved values, in the dtype that was saved, and in the sharding of those they replace. A
          dtype that is narrower than the one it replaces is a warning, and with any other one compiled functions are
          compiled again. Without `params`, the tree is also put into `model.params`.

        Raises:
          FileNotFoundError, PermissionError, ConnectionError: no such folder or repository, or none that opens.
          RuntimeError: the delta is detached, or the tree was donated.
          TypeError: `source` is none of these.
          ValueError: what is saved is damaged or was changed, is of another method or has other arguments or modules,
            or leaves are missing, surplus or of another shape, or floats stand where there are whole numbers, or the
            other way. Nothing has changed then. (Folders by jdelta before format 2 have a checksum of the tensors
            alone: there a changed description is noticed where it makes no sense or does not fit them.)
        """
        own = self._active("loaded")
        require_check_hash(check_hash)
        if not isinstance(source, Finetuned):
            source = read_delta(source, revision, self._values(params))
        found = source.renamed(self.name)
        self._require_fit(found)
        tree = self._values(params)
        leaves = surgery.flatten(surgery.parameters(tree))
        shapes = leaves | surgery.flatten(surgery.parameters(self._shapes))
        paths = {surgery.name_of(path): path for path in shapes}
        own_shapes = surgery.flatten(surgery.parameters(self._shapes))
        if odd := misfits(found, {path: own_shapes[path] for path in own.leaves}, leaves):
            raise ValueError(f"delta {self.name!r} cannot be loaded: {listing(odd)}.")
        if check_hash:
            deltas = {path for a in attachments_of(self._adapter.module) for path in a.leaves}
            rest = {
                name: leaves[path]
                for name, path in paths.items()
                if path in leaves and path not in deltas and name not in found.values
            }
            require_same({} if not rest else fingerprint.fingerprint(rest), found, check_hash)
        narrower = [
            f"{name} ({value.dtype} in place of {here})"
            for name, value in found.values.items()
            if jnp.promote_types(value.dtype, here := meta.unbox(shapes[paths[name]]).dtype) != value.dtype
        ]
        if narrower:
            warnings.warn(
                f"delta {self.name!r} was saved in a narrower dtype, and its leaves have that now: "
                f"{listing(narrower)}. In less than float32 training rounds small steps away, or overflows: before "
                "training on, cast what trains (trainable_mask says what) to float32.",
                stacklevel=3,
            )
        self._initial = None
        start = surgery.root(tree)
        loaded = surgery.replaced(tree, {(*start, *paths[name]): value for name, value in found.values.items()})
        if params is None and self._adapter.params is not None:
            self._adapter.params = loaded
        return loaded

    def merge(self, params: Tree | None = None) -> Tree:
        """Folds the delta into the weights of its hosts: the model then computes the same, at the bare backbone's cost.

        LoRA folds into every module that it takes; trained biases of BitFit are in their place already. A bias that
        BitFit gave to a module without one becomes the module's own leaf `bias`, as a module with biases would have it,
        and still costs its addition. The weights keep their dtype; the sums are computed in float32. `unmerge` puts the
        original bits back. A delta of which nothing has moved since it was initialised is a `UserWarning`.

        Args:
          params: a tree to fold, whose leaves are only read; by default `model.params`.

        Returns:
          The tree of the bare backbone, with the delta folded in. Without `params`, it is also put into `model.params`,
          and the delta is detached. With `params`, nothing else changes (and it can be jitted): call `detach()` for
          a model that takes the new tree.

        Raises:
          RuntimeError: the delta is detached or merged, or the tree was donated.
          ValueError: some of it cannot be folded, such as a layer with a non-linearity, an embedding that is tied to
            the head, or an update of weights that are no floats of 16 bits and more. The message names the modules.
        """
        own, tree = self._active("merged"), self._values(params)
        start, attachments = surgery.root(tree), attachments_of(self._adapter.module)
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree)):
            raise ValueError("merge: the values are elsewhere. Pass the tree that holds them: delta.merge(params).")
        self._require_whole(tree, "merge")
        made = with_made({"params": surgery.parameters(tree)}, [own])["params"]
        if self._is_untrained(tree):
            warnings.warn(self._untrained("merge", params), stacklevel=2)
        folded = merging.folded(made, self.name, attachments, self._structure)
        new = {(*start, *path): value for path, value in folded.items()}
        self._was_merged = True
        if params is not None:
            leaves = surgery.flatten(tree)
            own_leaves = {(*start, *path) for path in own.leaves}
            return surgery.unflatten({p: leaf for p, leaf in leaves.items() if p not in own_leaves} | new, like=tree)
        new |= {path: leaf for path, leaf in self._borrowed(tree).items()}
        self._switch(active=False)
        before = surgery.flatten(self._adapter.params)
        self._unmerged = {path: (before.get(path), leaf) for path, leaf in new.items()}
        self._adapter.params = surgery.unflatten({**before, **new}, like=tree)
        return self._adapter.params

    def unmerge(self) -> None:
        """Takes the delta out of the weights again, which then have the bits that they had, and attaches it.

        Raises:
          RuntimeError: it is not merged, or the weights of then or of now were donated.
          ValueError: weights were changed since, by training or by a delta that was merged later.
        """
        if not self.merged:
            raise RuntimeError(f"delta {self.name!r} is not merged.")
        surgery.require_alive(self._adapter.params)
        if any(surgery.is_deleted(original) for original, _ in self._unmerged.values()):
            raise RuntimeError(
                "unmerge: the weights from before merging were donated to a jitted function, and so deleted. Load the "
                "backbone afresh."
            )
        leaves = surgery.flatten(self._adapter.params)
        for path, (_, merged) in self._unmerged.items():
            if leaves.get(path) is not merged and not _same_bits(leaves.get(path), merged):
                raise ValueError(
                    f"unmerge: {surgery.name_of(path)!r} was changed after delta {self.name!r} was merged. If another "
                    "delta was merged since, unmerge that one first."
                )
        back = leaves | {path: original for path, (original, _) in self._unmerged.items()}
        back = {path: leaf for path, leaf in back.items() if leaf is not None}
        self._adapter.params = surgery.unflatten(back, like=self._adapter.params)
        self._unmerged = {}
        self._switch(active=True)

    def _require_fit(self, found: Finetuned) -> None:
        """Raises `ValueError` unless the saved delta is what this one is, up to its values."""
        mine, its = self.config.to_dict(), found.config.to_dict()
        if mine["delta_type"] != its["delta_type"]:
            raise ValueError(
                f"delta {self.name!r} is of method {mine['delta_type']!r}; saved is {its['delta_type']!r}."
            )
        common = {field.name for field in dataclasses.fields(DeltaConfig)}
        for key in its.keys() - common:
            if mine[key] != its[key]:
                raise ValueError(f"delta {self.name!r} has {key}={mine[key]!r}; saved is {key}={its[key]!r}.")
        for what, here, there in (
            ("sits on", self.targets, found.targets),
            ("has layers inserted at", self._inserted, found.inserted),
        ):
            if odd := sorted({*here} ^ {*there}):
                side = "the saved one does not" if odd[0] in here else "the saved one does"
                kind = found.backbone.kind if found.backbone is not None else ""
                on = (
                    f" (on {kind}; this is {self._adapter.class_name})"
                    if kind not in ("", self._adapter.class_name)
                    else ""
                )
                raise ValueError(
                    f"delta {self.name!r} {what} {len(here)} modules, the saved one{on} {what} {len(there)}; at "
                    f"{odd[0]}, {side}. Attach with the saved delta's modified_modules, or with "
                    "AutoDeltaModel.from_finetuned."
                )


def read_delta(source: str | os.PathLike[str], revision: str | None, params: Tree | None) -> Finetuned:
    """What is saved in a folder or on the Hub. Where other processes hold some of `params`, all have to find the same.

    Raises:
      FileNotFoundError, PermissionError, ConnectionError: no such folder or repository, or none that opens.
      ValueError: a file is damaged, or the processes find different deltas.
    """

    def read() -> Finetuned:
        return Finetuned.read(hub.fetch(source, revision))

    return processes.together(read, Finetuned.checksum) if processes.spread(params) else read()


def _same_bits(one: Any, other: Any) -> bool:
    if one is None or one.dtype != other.dtype or surgery.is_deleted(other):
        return False
    return fingerprint.digest(one) == fingerprint.digest(other)
