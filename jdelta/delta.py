"""`DeltaModel`: the stateful shell that puts deltas on a backbone, with OpenDelta's verbs."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.core import meta

from jdelta import addressing, backbone, common_names, fingerprint, freezing, hub, merging, sharding, surgery
from jdelta.config import CONFIGS, DeltaConfig
from jdelta.finetuned import BackboneInfo, Finetuned, listing, require_same
from jdelta.interception import Attachment, Edit, attachments_of, instrument, with_made
from jdelta.movement import Movement, measured, tabulated
from jdelta.structure import ModuleInfo, Structure
from jdelta.surgery import Path, Tree
from jdelta.visualization import Visualization

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Find = Callable[[Sequence[str]], list[ModuleInfo]]


class DeltaModel:
    """A delta on a backbone. Constructing one attaches it: `model.params` is then the grafted tree.

    Of itself it changes nothing; it carries what `insert_sequential_module` and its like put in. A method is a
    subclass that says in `edits` what a module should get:

        class ScaleModel(jdelta.DeltaModel):
            delta_type = "scale"
            default_modified_modules = ("ff.w2",)

            def edits(self, host, structure):
                yield jdelta.Edit(host.path, "after", Scale(), leaf=(self.name,))

    Args:
      backbone_model: a Flax model of transformers, or a `jdelta.Backbone`.
      modified_modules: patterns of the modules to change; without them, the method's default positions.
      exclude_modules: patterns of modules to leave alone, with everything below them.
      unfrozen_modules: patterns of what trains besides the delta, a classifier head for example.
      common_structure: whether `modified_modules` are common names (`"attn.q"`) in place of the model's own.
      interactive_modify: choose the modules in a web page, whose link is printed: `True`, or the page's port. Ctrl-C
        stops, and leaves the model as it was. See `jdelta.select_modules`.
      name: the delta's name in the tree; by default its `delta_type`, numbered if that is taken.
      rng: seed or key of the delta's initial values.
      **arguments: the method's own, see its configuration.

    Raises:
      TypeError: the backbone is none, or an argument has a wrong type or an unknown name.
      ValueError: a pattern matches nothing, a module cannot take the delta, or the name is taken. The model is then
        as it was.
    """

    delta_type: ClassVar[str] = "delta"
    config_class: ClassVar[type[DeltaConfig]] = DeltaConfig
    default_modified_modules: ClassVar[Sequence[str]] = ()

    config: Any  # of config_class

    def __init__(
        self,
        backbone_model: Any,
        modified_modules: Sequence[str] | None = None,
        exclude_modules: Sequence[str] | None = None,
        unfrozen_modules: Sequence[str] | None = None,
        common_structure: bool | None = None,
        interactive_modify: bool | int = False,
        name: str | None = None,
        rng: int | jax.Array = 0,
        **arguments: Any,
    ):
        where = {
            "modified_modules": modified_modules,
            "exclude_modules": exclude_modules,
            "unfrozen_modules": unfrozen_modules,
            "common_structure": common_structure,
        }
        self.config = self.config_class.from_arguments(type(self).__name__, where | arguments)
        if interactive_modify and modified_modules is not None:
            raise ValueError("give either modified_modules or interactive_modify, not both.")
        self._begin(backbone_model, name, rng)
        if interactive_modify:
            self._choose(interactive_modify)
            return
        method = type(self).__name__
        patterns = self.default_modified_modules if modified_modules is None else modified_modules
        if not patterns and type(self) is not DeltaModel:
            raise ValueError(f"{method} was given no modules. Name some: modified_modules=[…].")
        self._put(self._edits_at(patterns, common=bool(common_structure) or modified_modules is None))

    def _begin(self, backbone_model: Any, name: str | None, rng: int | jax.Array) -> None:
        """Everything but the modules that it goes to; `config` is there already. Nothing of the model changes."""
        self.backbone_model = backbone_model
        self._face = backbone.face_of(backbone_model)
        self._structure = backbone.trace(self._face)
        self._rng = jax.random.key(rng) if isinstance(rng, int) else rng
        self.name = self._free_name(name)
        self._exclude: tuple[str, ...] | None = None  # None: own leaves and self._unfrozen
        self._unfrozen = tuple(self.config.unfrozen_modules or ())
        self._inserted: list[str] = []  # modules where a layer was put in by hand
        self._unmerged: dict[Path, tuple[Any, Any]] = {}  # while it is merged: the weights before and after
        self._kept: dict[Path, Any] = {}  # values to put back: on detach the backbone's, on attach the delta's

    def _choose(self, port: bool | int) -> None:
        """Attaches to the modules that the user picks in a page. If it is interrupted, the model is as it was."""
        from jdelta import interactive  # here, since it is made of this class

        if self.config.common_structure:
            raise ValueError("interactive_modify shows the model's own names: leave common_structure out.")

        def take(names: list[str]) -> None:
            self.config = dataclasses.replace(self.config, modified_modules=tuple(names))
            self._put(self._edits_at(names))

        with backbone.unchanged_on_error(self._face):
            interactive.choose(self, port, take)

    def _edits_at(self, patterns: Sequence[str], common: bool = False) -> list[Edit]:
        """What the method does at the modules that the patterns mean."""
        find = self._finder(common, self.config.exclude_modules or ())
        edits = list(self.place(self._structure, find, patterns))
        if patterns and not edits:
            raise ValueError(
                f"{type(self).__name__}: none of the modules that {list(patterns)} mean gets a change from it."
            )
        return edits

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Registers the method by its `delta_type`, and shows the configuration's fields in the signature."""
        super().__init_subclass__(**kwargs)
        if "delta_type" in vars(cls):
            _register(cls)
        common = [p for p in inspect.signature(DeltaModel.__init__).parameters.values() if p.kind is not p.VAR_KEYWORD]
        own = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
            for f in dataclasses.fields(cls.config_class)
            if f.name not in {p.name for p in common}
        ]
        if cls.__init__ is DeltaModel.__init__:
            cls.__signature__ = inspect.Signature([*common[1:], *own])  # type: ignore[attr-defined]

    @classmethod
    def from_config(cls, config: DeltaConfig, backbone_model: Any, name: str | None = None, rng: Any = 0) -> Self:
        """Attaches the delta that a configuration describes.

            delta = jdelta.LoraModel.from_config(jdelta.LoraConfig(lora_r=4), model)

        Args:
          config: a configuration of this method.
          backbone_model, name, rng: as in the constructor.

        Raises:
          TypeError: it is no configuration of this method.
          TypeError, ValueError: as the constructor.
        """
        if not isinstance(config, DeltaConfig) or config.delta_type != cls.delta_type:
            raise TypeError(
                f"{cls.__name__}.from_config takes a {cls.config_class.__name__}, got {config!r}. "
                "AutoDeltaModel takes the configuration of any method, AutoDeltaConfig makes one from a dict."
            )
        arguments = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        return cls(backbone_model, name=name, rng=rng, **arguments)

    def edits(self, host: ModuleInfo, structure: Structure) -> Iterable[Edit]:
        """What this method does at a module that it was pointed at. Override it.

        Raises:
          TypeError, ValueError: the module cannot take this delta; `host.name` is put in front of the message.
        """
        return ()

    def place(self, structure: Structure, find: Find, patterns: Sequence[str]) -> Iterable[Edit]:
        """The edits at all modules that the patterns mean. Override it for a method whose modules come in pairs."""
        for host in find(patterns) if patterns else ():
            try:
                yield from self.edits(host, structure)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{type(self).__name__} at {host.name} ({host.type.__name__}): {error}") from error

    def shared(self, shapes: Mapping[Path, jax.ShapeDtypeStruct]) -> nn.Module | None:
        """A module that makes leaves of several hosts from parameters of its own. Override it.

        Its parameters lie once in the tree, below the delta's name at the root; what it makes is then not in the tree.

        Args:
          shapes: path to shape of each leaf that the delta's layers have.

        Returns:
          An unbound module which, called without arguments, returns `{path: array}` for some of these paths.
        """
        return None

    def folded(self) -> DeltaConfig | None:
        """The configuration after what `shared` makes has taken the place of its parameters. Override it.

        A delta is saved in that form. `None`: it stays as it is.
        """
        return None

    def frozen(self, leaf: Path) -> bool:
        """Whether this leaf of the delta's own never trains. Override it."""
        return False

    def start(self, leaves: Mapping[Path, jax.Array], params: Mapping[Path, jax.Array]) -> Mapping[Path, jax.Array]:
        """The initial values of the delta's own leaves, where they depend on the backbone's. Override it.

        Args:
          leaves: path to value, as the layers initialise it.
          params: path to value of the backbone's parameters.
        """
        return leaves

    # --- the operations

    def insert_sequential_module(
        self, name: str | Sequence[str], layer: nn.Module, where: Literal["after", "before"] = "after"
    ) -> None:
        """Puts a layer after a module, `y -> layer(y)`, or before it, `x -> layer(x)`.

        `x` is the module's first array argument; `y` the array it returns, alone or first in a tuple or model output.

        Args:
          name: the name of the module, or patterns that mean one or several.
          layer: any unbound linen module, from an array to an array.
          where: on which side.

        Raises:
          TypeError: the layer is no linen module, or the module gives no floating array at that place.
          ValueError: no such module.
        """
        if where not in ("after", "before"):
            raise ValueError(f"where is 'after' or 'before', got {where!r}.")
        self._insert(name, where, layer)

    def insert_parallel_module(self, name: str | Sequence[str], layer: nn.Module, start: str | None = None) -> None:
        """Puts a layer beside a module: `y + layer(x)`.

        Args:
          name: the name of the module, or patterns.
          layer: any unbound linen module; its output has the shape of `y`.
          start: a pattern of one other module that runs before; `layer` then gets the input of that one, and so
            spans everything from there to the output of `name`.

        Raises:
          TypeError, ValueError: as `insert_sequential_module`; also if `start` does not come first.
        """
        self._insert(name, "parallel", layer, start)

    def replace_module(self, name: str | Sequence[str], layer: nn.Module) -> None:
        """Runs a layer in place of a module, with the module's arguments. The module's parameters stay in the tree.

        Args:
          name: the name of the module, or patterns.
          layer: any unbound linen module that takes what the module takes and returns what it returns.

        Raises:
          TypeError, ValueError: as `insert_sequential_module`.
        """
        self._insert(name, "replace", layer)

    def freeze_module(self, exclude: Sequence[str] = ("deltas",)) -> None:
        """Freezes the whole model except what is named. Calling it again replaces the first choice.

        Args:
          exclude: patterns of modules or leaves that train, with everything below them; `"deltas"` means the leaves
            of all attached deltas.

        Raises:
          TypeError: `exclude` is a bare string.
          ValueError: a pattern matches nothing; the earlier choice then stays.
        """
        before, self._exclude = self._exclude, tuple(addressing.checked(exclude))
        try:
            self.trainable_mask()
        except ValueError:
            self._exclude = before
            raise

    def detach(self) -> None:
        """Takes the delta off: the model then computes what it computed without it.

        The leaves that `model.params` held are kept, and `attach` puts them back; leaves of the backbone's own that
        trained with the delta get their earlier values meanwhile. Deltas come off in any order. A tree that you hold
        yourself is yours to change: `jdelta.prune(params, delta.name)`.

        Raises:
          RuntimeError: it is detached already.
          ValueError: `model.params` lacks leaves of this delta.
        """
        self._switch(active=False)

    def attach(self) -> None:
        """Puts the delta back in its place, with the values it had when it was detached.

        Raises:
          RuntimeError: it is attached already.
        """
        self._switch(active=True)

    # --- what training leaves behind

    def finetuned(self, params: Tree | None = None) -> Finetuned:
        """The trained delta apart from the model: to be saved, added to others, put on another copy of the backbone.

        Args:
          params: the tree to take the values from; by default `model.params`.

        Returns:
          Its own leaves and whatever else trains (but no leaves of other deltas), with the configuration and the
          backbone's fingerprint. A prefix comes without the network that makes it, as `fold` leaves it.

        Raises:
          RuntimeError: it is detached.
          ValueError: leaves are missing, or are shapes.
        """
        own, tree, config = self._active("saved"), self._tree(params), self.config
        trains = surgery.flatten(surgery.parameters(self._mask_of(tree)))
        deltas = {path for a in attachments_of(self._face.module) for path in a.leaves}
        backbone = [path for path, flag in trains.items() if path not in deltas and flag is not surgery.empty_node]
        if own.source is not None and (simple := self.folded()) is not None:
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
            values={surgery.name_of(path): fingerprint.to_host(leaves[path]) for path in wanted},
            targets=tuple(self.targets),
            exclude=self._exclude,
            inserted=tuple(self._inserted),
            backbone=BackboneInfo(self._face.kind, self._face.origin, fingerprint.fingerprint(frozen)),
        )

    def save_finetuned(self, path: str | os.PathLike[str], params: Tree | None = None) -> None:
        """Writes what was trained to a folder: `delta_config.json`, `delta.safetensors` and a model card.

        `AutoDeltaModel.from_finetuned(path, backbone_model=…)` restores it bit for bit, in the dtype that it has now.
        The folder is replaced as a whole: whenever this is interrupted, it holds the old delta or the new one. In a
        program of several processes all have to call this, and the first one writes.

        Args:
          path: the folder; it is made if need be, and other files in it stay.
          params: the tree to take the values from; by default `model.params`.

        Raises:
          OSError: no permission, no space, or the path is a file. What was there before is there still.
          RuntimeError, ValueError: as `finetuned`.
        """
        found = self.finetuned(params)
        if jax.process_index() == 0:
            found.save(path)

    def push_to_hub(self, repo_id: str, params: Tree | None = None, **options: Any) -> str:
        """Saves what was trained and uploads it to the Hub.

        Args:
          repo_id: `"user/name"`; the repository is made if need be.
          params: as in `save_finetuned`.
          **options: `token`, `private`, `revision`, `commit_message`, `create_pr`, as huggingface_hub has them.

        Returns:
          The address of the commit; `""` in all processes but the first, which uploads.

        Raises:
          PermissionError: the token does not allow it, or there is none.
          ConnectionError: the Hub cannot be reached, or fails.
          FileNotFoundError: no such revision to start from.
          TypeError: an unknown option.
          ValueError: the Hub refuses the name; or `private` of a repository that is public already.
          RuntimeError, ValueError: as `finetuned`.
        """
        found = self.finetuned(params)
        if jax.process_index() != 0:
            return ""
        with tempfile.TemporaryDirectory() as folder:
            found.save(folder)
            return hub.push(folder, repo_id, **options)

    def to_peft(self, path: str | os.PathLike[str], params: Tree | None = None) -> None:
        """Writes what was trained in the format of PyTorch PEFT, which `PeftModel.from_pretrained` loads.

        Of LoRA, prefix tuning and prompt tuning. The folder gets `adapter_config.json` and `adapter_model.safetensors`,
        written beside it first; other files in it stay. Whole modules that trained with the delta become
        `modules_to_save`, single biases `bias`. In a program of several processes all have to call this.

        Args:
          path: the folder; it is made if need be.
          params: as in `save_finetuned`.

        Raises:
          OSError: no permission, no space, or the path is a file. What was there before is there still.
          ValueError: PEFT has no such method, or cannot train what trained here; the message says what.
          RuntimeError, ValueError: as `finetuned`.
        """
        from jdelta import peft_format  # here, since it knows the methods, which are made of this class

        found = self.finetuned(params)
        if jax.process_index() == 0:
            peft_format.to_peft(found, self._structure, path)

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
          The tree with the saved values, in their dtype, and in the sharding of those they replace. Without
          `params`, it is also put into `model.params`.

        Raises:
          FileNotFoundError, PermissionError, ConnectionError: no such folder or repository, or none that opens.
          RuntimeError: the delta is detached.
          TypeError, ValueError: what is saved is damaged, is of another method or has other arguments or modules, or
            leaves are missing, surplus or of another shape. Nothing has changed then.
        """
        own = self._active("loaded")
        if not isinstance(source, Finetuned):
            source = Finetuned.read(hub.fetch(source, revision))
        found = source.renamed(self.name)
        self._require_fit(found)
        tree = self._tree(params)
        leaves = surgery.flatten(surgery.parameters(tree))
        shapes = leaves | surgery.flatten(surgery.parameters(self._shapes))
        paths = {surgery.name_of(path): path for path in shapes}
        odd = [
            f"{surgery.name_of(path)} is missing" for path in own.leaves if surgery.name_of(path) not in found.values
        ]
        for name, value in found.values.items():
            if name not in paths:
                odd.append(f"{name} belongs to no part of this model")
            elif value.shape != (shape := meta.unbox(shapes[paths[name]]).shape):
                odd.append(f"{name} has shape {value.shape}, here {shape}")
        if odd:
            raise ValueError(f"delta {self.name!r} cannot be loaded: {listing(odd)}.")
        if check_hash:
            deltas = {path for a in attachments_of(self._face.module) for path in a.leaves}
            rest = {
                name: leaves[path]
                for name, path in paths.items()
                if path in leaves and path not in deltas and name not in found.values
            }
            require_same({} if not rest else fingerprint.fingerprint(rest), found, check_hash)
        start = surgery.root(tree)
        loaded = surgery.replaced(tree, {(*start, *paths[name]): value for name, value in found.values.items()})
        if params is None and self._face.params is not None:
            self._face.params = loaded
        return loaded

    # --- merging

    @property
    def merged(self) -> bool:
        """Whether the delta is folded into the backbone's weights."""
        return bool(self._unmerged)

    def merge(self, params: Tree | None = None) -> Tree:
        """Folds the delta into the weights of its hosts: the model then computes the same, at the bare backbone's cost.

        LoRA folds into every module that it takes; trained biases of BitFit are in their place already. The weights
        keep their dtype; the sums are computed in float32. `unmerge` puts the original bits back.

        Args:
          params: a tree to fold, whose leaves are only read; by default `model.params`.

        Returns:
          The tree of the bare backbone, with the delta folded in. Without `params`, it is also put into `model.params`,
          and the delta is detached. With `params`, nothing else changes (and it can be jitted): call `detach()` for
          a model that takes the new tree.

        Raises:
          RuntimeError: the delta is detached or merged.
          ValueError: some of it cannot be folded, such as a layer with a non-linearity, or an embedding that is tied
            to the head. The message names the modules.
        """
        own, tree = self._active("merged"), self._tree(params)
        start, attachments = surgery.root(tree), attachments_of(self._face.module)
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree)):
            raise ValueError("merge: the values are elsewhere. Pass the tree that holds them: delta.merge(params).")
        made = with_made({"params": surgery.parameters(tree)}, [own])["params"]
        folded = merging.folded(made, self.name, attachments, self._structure)
        new = {(*start, *path): value for path, value in folded.items()}
        if params is not None:
            leaves = surgery.flatten(tree)
            own_leaves = {(*start, *path) for path in own.leaves}
            return surgery.unflatten({p: leaf for p, leaf in leaves.items() if p not in own_leaves} | new, like=tree)
        new |= {path: leaf for path, leaf in self._borrowed(tree).items()}
        self._switch(active=False)
        before = surgery.flatten(self._face.params)
        self._unmerged = {path: (before[path], leaf) for path, leaf in new.items()}
        self._face.params = surgery.unflatten({**before, **new}, like=tree)
        return self._face.params

    def unmerge(self) -> None:
        """Takes the delta out of the weights again, which then have the bits that they had, and attaches it.

        Raises:
          RuntimeError: it is not merged.
          ValueError: weights were changed since, by training or by a delta that was merged later.
        """
        if not self.merged:
            raise RuntimeError(f"delta {self.name!r} is not merged.")
        leaves = surgery.flatten(self._face.params)
        for path, (_, merged) in self._unmerged.items():
            if leaves.get(path) is not merged and not _same_bits(leaves.get(path), merged):
                raise ValueError(
                    f"unmerge: {surgery.name_of(path)!r} was changed after delta {self.name!r} was merged. If another "
                    "delta was merged since, unmerge that one first."
                )
        back = {path: original for path, (original, _) in self._unmerged.items()}
        self._face.params = surgery.unflatten({**leaves, **back}, like=self._face.params)
        self._unmerged = {}
        self._switch(active=True)

    # --- what it is

    def __repr__(self) -> str:
        state = "merged" if self.merged else "attached" if self.attached else "detached"
        return f"<{type(self).__name__} {self.name!r} on {len(self.targets)} modules of {self._face.kind}, {state}>"

    @property
    def structure(self) -> Structure:
        """The backbone's modules, in the order of execution."""
        return self._structure

    @property
    def attached(self) -> bool:
        """Whether the model runs this delta."""
        return self._attachment.active

    @property
    def targets(self) -> list[str]:
        """The names of the modules this delta sits on, in the order of execution."""
        hosts = {edit.host for edit in self._attachment.edits if not edit.helps}
        return [info.name for info in self._structure if info.path in hosts]

    def shapes(self) -> Tree:
        """Shapes of the delta's own leaves, as a tree to be grafted into the backbone's."""
        return self._shapes

    def init(self, rng: int | jax.Array, params: Tree | None = None) -> Tree:
        """Fresh values of the delta's own leaves, as a tree to be grafted into the backbone's.

            params = jdelta.graft(params, jax.jit(delta.init)(jax.random.key(0)))

        It can be jitted, with `out_shardings` too; the compiled program holds nothing of the backbone's.

        Args:
          rng: seed or key.
          params: the backbone's tree, for a method that starts from its values; by default `model.params`.

        Raises:
          ValueError: the method starts from the backbone's values, and there are none.
        """
        own = self._only_own(self._init_model(jax.random.key(rng) if isinstance(rng, int) else rng))
        return self._started(own, self._face.params if params is None else params)

    # --- how it is split over a mesh

    def partition_specs(self, specs: Tree, mesh: jax.sharding.Mesh | None = None) -> Tree:
        """How every leaf is split, the deltas' too, from how the backbone's are.

            specs = jdelta.match_partition_rules(rules, params, default=P())  # or nn.get_partition_spec(…), …
            specs = delta.partition_specs(specs)

        A delta's leaf follows the weights of its host: LoRA's `a` the axis of their input and `b` that of their output,
        adapters and biases the axis of the host's output, and all of them the layer axis in `nn.scan`. Its axes of its
        own, the rank and the width in the middle, are whole.

        Args:
          specs: a tree of the backbone's parameters, or of the grafted ones, with `PartitionSpec`s (shorter than the
            leaf has axes, if you like; `None` is `P()`), with `NamedSharding`s, with arrays that are placed, or with
            boxes of `nn.Partitioned`. What it says of the deltas' own leaves is passed over.
          mesh: the mesh. With it, the specs are checked, and a delta follows also where sizes differ and the mesh
            divides both, as a prefix's heads do. `NamedSharding`s bring it.

        Returns:
          A tree with the structure of the grafted parameters and a `PartitionSpec` for each leaf. `jdelta.partition`,
          `jdelta.prune` and `delta.own` take it as they take parameters.

        Raises:
          TypeError: something else is in the place of a spec, or specs of two kinds are mixed.
          ValueError: a leaf of the backbone has no spec, or one that does not fit its shape or the mesh, or there are
            several meshes. The message names the leaf.
        """
        carried = attachments_of(self._face.module)
        return sharding.partition_specs(specs, self._tree(None), carried, self._structure, mesh)

    def shardings(self, specs: Tree, mesh: jax.sharding.Mesh | None = None) -> Tree:
        """`partition_specs` as `NamedSharding`s, for `jax.jit` and `jax.device_put`.

            split = delta.shardings(specs, mesh)
            delta_params = jax.jit(delta.init, out_shardings=delta.own(split))(jax.random.key(0))
            step = jax.jit(step, in_shardings=(split, by_data))

        Args:
          specs: as in `partition_specs`.
          mesh: the mesh, unless `specs` bring one.

        Returns:
          A tree with the structure of the grafted parameters. `NamedSharding`s that were given are in it as they were.

        Raises:
          TypeError, ValueError: as `partition_specs`; also if there is no mesh.
        """
        carried = attachments_of(self._face.module)
        return sharding.shardings(specs, self._tree(None), carried, self._structure, mesh)

    def own(self, tree: Tree) -> Tree:
        """The part of a tree that belongs to this delta alone, laid out as `init` gives it.

        Args:
          tree: of the grafted parameters' structure: values, specs, shardings, gradients.

        Raises:
          ValueError: it lacks some of the delta's leaves.
        """
        have, start = surgery.flatten(tree), surgery.root(tree)
        for path in self._attachment.leaves:
            if (*start, *path) not in have:
                raise ValueError(f"own: the tree lacks {surgery.name_of(path)!r} of delta {self.name!r}.")
        return self._only_own(tree)

    # --- what trains

    def trainable_mask(self, params: Tree | None = None) -> Tree:
        """A tree of bools, `True` where a leaf trains, for any optax wrapper.

        Args:
          params: the tree to make it for; by default `model.params`.
        """
        return self._mask_of(self._tree(params))

    def partition(self, params: Tree | None = None) -> tuple[Tree, Tree]:
        """Splits a tree into what trains and what is frozen; neither part has holes.

            trainable, frozen = delta.partition(model.params)
            grads = jax.grad(lambda t: loss(jdelta.combine(t, frozen)))(trainable)

        Args:
          params: the tree to split; by default `model.params`.
        """
        tree = self._tree(params)
        return surgery.partition(tree, self._mask_of(tree))

    def combine(self, *trees: Tree) -> Tree:
        """`jdelta.combine`, and an error unless the parts make up the whole tree of this model.

        Raises:
          ValueError: the parts overlap, or leaves are missing or do not belong.
        """
        return surgery.combine(*trees, like=self._tree(None))

    def optimizer(self, tx: optax.GradientTransformation) -> optax.GradientTransformation:
        """An optimizer for the whole tree that moves only what trains now, and holds state only for that.

            tx = delta.optimizer(optax.adamw(1e-3))
            state = TrainState.create(apply_fn=model.__call__, params=model.params, tx=tx)

        Args:
          tx: the optimizer of the trainable leaves.
        """
        return freezing.freeze_except(tx, self._mask_of)

    def log(self, params: Tree | None = None) -> None:
        """Prints the model as a coloured tree, and how much of it trains.

        Args:
          params: the tree to show; by default `model.params`.
        """
        self.visualization().structure_graph(params)

    def visualization(self) -> Visualization:
        """The model as a tree, with what trains now, for the terminal, notebooks, the web and papers.

            delta.visualization().to_svg("bert_with_lora.svg")

        In a notebook, a delta shows itself as this tree.
        """
        return Visualization(self.backbone_model, self._mask_of)

    def _repr_html_(self) -> str:
        return self.visualization()._repr_html_()

    def movement(self, params: Tree | None = None) -> Movement:
        """How far each module that the delta changes moved in training: `‖change‖ / ‖weight‖`, layer by layer.

        Of LoRA the change is the update of the weight, of BitFit that of the bias, and the weight is what the backbone
        has there without biases; `jdelta.movement.measured` says why. What else trained, such as a head in
        `unfrozen_modules`, is not in the table: its earlier values are not kept.

        Args:
          params: the tree to take the values from; by default `model.params`.

        Raises:
          RuntimeError: the delta is detached or merged.
          ValueError: its layers do something else than change weights, as adapters, prefixes and prompts do; or the
            values are elsewhere.
        """
        own, tree = self._active("measured"), surgery.parameters(self._tree(params))
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree)):
            raise ValueError("the values are elsewhere. Pass the tree that holds them: params=….")
        pretrained = surgery.flatten(surgery.parameters(surgery.unflatten(self._kept)))
        made = with_made({"params": tree}, [own])["params"]
        return tabulated(measured(made, pretrained, own, self._structure))

    def plot(self, params: Tree | None = None, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draws `movement` as a heat map: kinds of module in rows, layers in columns.

            delta.plot(params, "moved.png")

        Args:
          params: as in `movement`.
          path: where to write it, if anywhere: `.png`, `.svg` or `.pdf`.

        Returns:
          The figure, which notebooks show.

        Raises:
          ModuleNotFoundError: matplotlib is not there; `pip install 'jdelta[plot]'`.
          RuntimeError, ValueError: as `movement`.
        """
        from jdelta import plotting  # here, since matplotlib is optional

        figure = plotting.heatmap(self.movement(params))
        if path is not None:
            plotting.save(figure, path)
        return figure

    # --- inside

    @property
    def _attachment(self) -> Attachment:
        return next(a for a in attachments_of(self._face.module) if a.name == self.name)

    def _active(self, verb: str) -> Attachment:
        """The attachment. Raises `RuntimeError` if it is off."""
        own = self._attachment
        if not own.active:
            state, remedy = ("merged", "unmerge") if self.merged else ("detached", "attach")
            raise RuntimeError(f"delta {self.name!r} is {state} and cannot be {verb}. Call {remedy}() first.")
        return own

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
                on = f" (on {kind}; this is {self._face.kind})" if kind not in ("", self._face.kind) else ""
                raise ValueError(
                    f"delta {self.name!r} {what} {len(here)} modules, the saved one{on} {what} {len(there)}; at "
                    f"{odd[0]}, {side}. Attach with the saved delta's modified_modules, or with "
                    "AutoDeltaModel.from_finetuned."
                )

    def _free_name(self, name: str | None) -> str:
        taken = {key for path in surgery.flatten(self._structure.params) for key in path}
        taken |= {key for info in self._structure for key in info.path}
        deltas = {attachment.name for attachment in attachments_of(self._face.module)}
        if name is None:
            numbers = (f"{self.delta_type}_{i}" for i in itertools.count(2))
            return next(n for n in itertools.chain([self.delta_type], numbers) if n not in taken | deltas)
        if not isinstance(name, str) or not name or "." in name or name in ("params", freezing.DELTAS):
            raise ValueError(f"a delta's name is a word without dots, and not 'params' or 'deltas'; got {name!r}.")
        if name in deltas:
            raise ValueError(f"the model has a delta named {name!r} already. Choose another name.")
        if name in taken:
            raise ValueError(f"{name!r} is the name of a part of this backbone. Choose another name for the delta.")
        return name

    def _finder(self, common: bool, exclude: Sequence[str]) -> Find:
        def find(patterns: Sequence[str]) -> list[ModuleInfo]:
            if not common:
                return self._structure.find(patterns, exclude)
            try:
                resolved = common_names.resolve(self._structure, addressing.checked(patterns))
            except ValueError as error:
                raise ValueError(f"{type(self).__name__}: {error}") from error
            found = [info.name for info in resolved]
            return self._structure.find([f"[r]^{re.escape(name)}" for name in found], exclude) if found else []

        return find

    def _insert(self, name: str | Sequence[str], where: Any, layer: nn.Module, start: str | None = None) -> None:
        if not isinstance(layer, nn.Module):
            raise TypeError(f"the layer is a flax.linen module, got {layer!r}.")
        begin = None
        if start is not None:
            begin, *more = self._structure.find([start])
            if more:
                raise ValueError(f"start={start!r} means {1 + len(more)} modules; name one.")
        own = self._attachment
        edits = []
        for host in self._structure.find([name] if isinstance(name, str) else name):
            number = sum(edit.host == host.path and edit.layer is not None for edit in own.edits)
            leaf = (self.name, str(number)) if number else (self.name,)
            edits.append(Edit(host.path, where, layer, start=begin.path if begin else None, leaf=leaf))
        self._put([*own.edits, *edits])
        self._inserted += [surgery.name_of(edit.host) for edit in edits]

    def _put(self, edits: Sequence[Edit]) -> None:
        """Makes these the delta's edits. All that can fail comes first; then model and parameters change."""
        draft, index, everything = self._tried(edits)
        edits, others = draft[index].edits, attachments_of(self._face.module)
        known = {path for path in surgery.flatten(self._structure.params)}
        known.update(path for a in others if a.name != self.name for path in a.leaves)
        shapes = {p: leaf for p, leaf in surgery.flatten(surgery.parameters(everything)).items() if p not in known}
        draft[index], own = self._attachment_of(edits, shapes)

        module, params = self._face.module, self._face.params
        after = params
        if params is not None:
            have = surgery.flatten(params)
            fresh = [p for p in draft[index].leaves if (*surgery.root(params), *p) not in have]
            after = surgery.graft(params, self._initial_values(draft, fresh, params)) if fresh else params
        start = surgery.root(everything)
        try:
            self._face.module = instrument(module, draft)
            if params is not None:
                self._face.params = after
                self._kept = {p: _copy(leaf) for p, leaf in self._borrowed(after).items()} | self._kept
            self._mask_of(everything if params is None and not draft[index].made else self._tree(None))
        except Exception:
            self._face.module = module
            if params is not None:
                self._face.params = params
            raise
        self._shapes = surgery.unflatten({(*start, *path): shape for path, shape in own.items()})

    def _tried(self, edits: Sequence[Edit]) -> tuple[list[Attachment], int, Tree]:
        """What the model would carry with these edits, which of it they are, and its leaves' shapes.

        Nothing changes; raises what can be wrong with the edits.
        """
        edits = list({(e.host, e.where, e.leaf): e for e in edits}.values())  # a module meant twice is edited once
        others = attachments_of(self._face.module)
        index = next((i for i, a in enumerate(others) if a.name == self.name), len(others))
        if index < len(others) and not others[index].active:
            raise RuntimeError(f"delta {self.name!r} is detached; call attach() before changing it.")
        self._check(edits, others)
        draft = [*others[:index], Attachment(self.name, tuple(edits)), *others[index + 1 :]]
        ran: set[Edit] = set()
        everything = jax.eval_shape(lambda key: self._run_init(draft, key, ran), self._rng)
        for edit in edits:
            if edit.layer is not None and edit not in ran:
                raise ValueError(f"{surgery.name_of(edit.host)} was not called in the model's run on its pseudo input.")
        return draft, index, everything

    def _attachment_of(self, edits: Sequence[Edit], shapes: Mapping[Path, Any]) -> tuple[Attachment, dict[Path, Any]]:
        """The attachment of these edits, whose layers have leaves of these shapes; and the shapes of its own leaves."""
        source, own = self.shared(shapes), dict(shapes)
        made: tuple[Path, ...] = ()
        if source is not None:
            output, variables = jax.eval_shape(source.init_with_output, self._rng)
            made = tuple(path for path in shapes if path in output)
            own = {path: shape for path, shape in shapes.items() if path not in made}
            own |= {(self.name, *path): shape for path, shape in surgery.flatten(variables["params"]).items()}
        fixed = frozenset(path for path in own if self.frozen(path))
        return Attachment(self.name, tuple(edits), tuple(own), True, fixed, source, made), own

    def _write_out(self, params: Tree | None, config: DeltaConfig) -> Tree:
        """Puts what the source makes into the tree in place of its parameters. `config` is then the delta's own."""
        own = self._attachment
        if own.source is None or not own.active:
            raise ValueError(f"delta {self.name!r} {'is detached' if own.source else 'has nothing to fold'}.")
        folded, written = self._written(self._tree(params))
        others = attachments_of(self._face.module)
        self._face.module = instrument(self._face.module, [written if a.name == own.name else a for a in others])
        self.config = config
        self._shapes = surgery.shapes(_select(folded, written.leaves))
        if params is None and self._face.params is not None:
            self._face.params = folded
        return folded

    def _written(self, tree: Tree) -> tuple[Tree, Attachment]:
        """The tree with what the source makes in place of its parameters, and the attachment that goes with it."""
        own, start = self._attachment, surgery.root(tree)
        leaves = surgery.flatten(with_made({"params": surgery.parameters(tree)}, [own])["params"])
        leaves = {path: leaf for path, leaf in leaves.items() if path[0] != self.name}
        rest = {path: leaf for path, leaf in surgery.flatten(tree).items() if path[: len(start)] != start}
        written = surgery.unflatten(rest | {(*start, *path): leaf for path, leaf in leaves.items()}, like=tree)
        kept = tuple(path for path in own.leaves if path[0] != self.name)
        return written, dataclasses.replace(own, leaves=(*kept, *own.made), source=None, made=())

    def _check(self, edits: Sequence[Edit], others: Sequence[Attachment]) -> None:
        spans = any(edit.start is not None for edit in edits)
        order = {info.path: i for i, info in enumerate(self._structure)} if spans else {}
        lent = {path: a.name for a in others if a.name != self.name for path in a.borrowed}
        for edit in edits:
            host = self._structure[surgery.name_of(edit.host)]
            if edit.where == "train":
                if (*edit.host, *edit.leaf) in lent:
                    owner = lent[(*edit.host, *edit.leaf)]
                    raise ValueError(f"{host.name}.{surgery.name_of(edit.leaf)} is trained by delta {owner!r} already.")
                continue
            if edit.where == "around" and not getattr(type(edit.layer).__call__, "nowrap", False):
                raise TypeError(f"{type(edit.layer).__name__} goes around modules: mark its __call__ with nn.nowrap.")
            if edit.start is not None and order[edit.start] > order[edit.host]:
                raise ValueError(f"the span starts at {surgery.name_of(edit.start)}, which runs after {host.name}.")
            for side in {"before": "x", "after": "y", "parallel": "y"}.get(edit.where, ""):
                what = "takes" if side == "x" else "returns"
                try:
                    dtype = getattr(host, side).dtype
                except TypeError as error:
                    raise TypeError(f"{host.name} ({host.type.__name__}) cannot be a target: {error}") from error
                if not jnp.issubdtype(dtype, jnp.floating):
                    raise TypeError(
                        f"{host.name} ({host.type.__name__}) {what} an array of {dtype}; a layer needs floats."
                    )

    def _run_init(self, attachments: Sequence[Attachment], rng: jax.Array, ran: set[Edit] | None = None) -> Tree:
        return self._face.init(instrument(self._face.module, attachments, ran), rng)

    def _init_model(self, rng: jax.Array) -> Tree:
        own = dataclasses.replace(self._attachment, active=True)
        return self._run_init([own if a.name == own.name else a for a in attachments_of(self._face.module)], rng)

    def _initial_values(self, attachments: Sequence[Attachment], paths: Sequence[Path], params: Tree) -> Tree:
        """Values of new leaves; shapes, where the backbone's own are."""

        def new(rng: jax.Array) -> Tree:
            return _select(self._run_init(attachments, rng), paths)

        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
            return jax.eval_shape(new, self._rng)
        return self._started(jax.jit(new)(self._rng), params)

    def _started(self, own: Tree, params: Tree | None) -> Tree:
        """The delta's own leaves after `start`."""
        if type(self).start is DeltaModel.start:
            return own
        leaves = surgery.flatten(surgery.parameters(own))
        values = surgery.flatten(surgery.parameters(params)) if params is not None else {}
        if not values or any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in values.values()):
            raise ValueError(
                f"{type(self).__name__} starts from the backbone's values, which are elsewhere. Pass them: "
                "delta.init(rng, params)."
            )
        begin = surgery.root(own)
        started = self.start(leaves, values)
        return surgery.unflatten({(*begin, *path): leaf for path, leaf in started.items()}, like=own)

    def _only_own(self, tree: Tree) -> Tree:
        return _select(tree, self._attachment.leaves)

    def _tree(self, params: Tree | None) -> Tree:
        return backbone.tree_of(self._face) if params is None else params

    def _mask_of(self, params: Tree) -> Tree:
        attachments = attachments_of(self._face.module)
        never = {path for a in attachments for path in a.fixed}
        if self._exclude is None:
            exclude: tuple[str, ...] = (freezing.DELTAS, *self._unfrozen)
            return freezing.trainable_mask(params, exclude, self._attachment.trained, never)
        trained = {path for a in attachments if a.active for path in a.trained}
        return freezing.trainable_mask(params, self._exclude, trained, never)

    def _borrowed(self, params: Tree) -> dict[Path, Any]:
        """The backbone's own leaves that train with this delta."""
        flat, start = surgery.flatten(params), surgery.root(params)
        return {(*start, *path): flat[(*start, *path)] for path in self._attachment.borrowed}

    def _switch(self, active: bool) -> None:
        own = self._attachment
        if self.merged:
            raise RuntimeError(f"delta {self.name!r} is merged into the weights. Call unmerge() first.")
        if own.active == active:
            raise RuntimeError(f"delta {self.name!r} is {'attached' if active else 'detached'} already.")
        attachments = [
            dataclasses.replace(a, active=active) if a.name == self.name else a
            for a in attachments_of(self._face.module)
        ]
        params = self._face.params
        if params is not None:
            flat, start = surgery.flatten(params), surgery.root(params)
            leaves = [(*start, *path) for path in own.leaves]
            keep = dict(self._borrowed(params))
            if not active:
                for path in leaves:
                    if path not in flat:
                        raise ValueError(
                            f"detach: model.params lacks {surgery.name_of(path)!r}. Set model.params to a tree "
                            "that holds the delta's leaves."
                        )
                keep.update({path: flat[path] for path in leaves})
                flat = {path: leaf for path, leaf in flat.items() if path not in set(leaves)}
            flat.update(self._kept)
            self._face.params = surgery.unflatten(flat, like=params)
            self._kept = keep
        self._face.module = instrument(self._face.module, attachments)


METHODS: dict[str, type[DeltaModel]] = {
    "delta": DeltaModel
}  # by delta_type: every subclass that defines one of its own


def _register(method: type[DeltaModel]) -> None:
    """Makes a method known by its `delta_type`, and its configuration class the one of that type."""
    taken, kind = METHODS.get(method.delta_type), method.delta_type
    if taken is not None and taken.__module__.startswith("jdelta.") and taken.__module__ != method.__module__:
        raise ValueError(f"{method.__name__}: delta_type {kind!r} is that of jdelta.{taken.__name__}. Choose another.")
    base = method.config_class
    if vars(base).get("delta_type", kind) != kind:  # inherited from a method of another type
        namespace = {"__module__": method.__module__, "__doc__": f"Arguments of {method.__name__}."}
        method.config_class = type(f"{method.__name__.removesuffix('Model')}Config", (base,), namespace)
    method.config_class.delta_type = kind
    METHODS[kind] = method
    CONFIGS[kind] = method.config_class


def _select(tree: Tree, paths: Iterable[Path]) -> Tree:
    """The sub-tree of some leaves of the parameters."""
    flat, start = surgery.flatten(tree), surgery.root(tree)
    return surgery.unflatten({(*start, *path): flat[(*start, *path)] for path in paths})


def _same_bits(one: Any, other: Any) -> bool:
    return one is not None and one.dtype == other.dtype and fingerprint.digest(one) == fingerprint.digest(other)


def _copy(leaf: Any) -> Any:
    """A copy that outlives the donation of the original."""
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.array(leaf, copy=True)
