"""`DeltaModel`: a method on a backbone, with OpenDelta's verbs. Each is a line over functions of a `DeltaState`."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import chex
import jax
import optax
from flax import linen as nn

from jdelta.core import attaching, merging, training
from jdelta.core.config import as_path
from jdelta.core.host import unchanged_on_error
from jdelta.core.method import Method, signature_of
from jdelta.core.random_keys import as_key
from jdelta.core.state import new_state, own_leaves, targets
from jdelta.core.structure import Structure
from jdelta.display import interactive
from jdelta.display import movement as movements
from jdelta.display.movement import Movement
from jdelta.display.visualization import Visualization
from jdelta.hosts.adapting import adapt
from jdelta.names import common_names
from jdelta.saved import extraction, hub, peft
from jdelta.saved.finetuned import Finetuned
from jdelta.scale import sharding
from jdelta.trees import processes, regexes, surgery
from jdelta.trees.surgery import Path, Tree

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class DeltaModel:
    """A delta on a backbone. Constructing one attaches it: `model.params` is then the grafted tree.

    It stays there until `detach` or `remove`, whoever holds the object. A second one of the same method, arguments and
    modules is a `UserWarning`, unless it is given a `name`.

        delta = jdelta.LoraModel(model, lora_r=8)  # a method of jdelta, by its own constructor
        delta = jdelta.DeltaModel(model, method=Scale(init=2.0))  # a method of your own: see `jdelta.Method`
        delta = jdelta.DeltaModel(model)  # without a method: carries what `insert_sequential_module` puts in

    Args:
      backbone_model: a Flax model of transformers, or a `jdelta.Backbone`.
      modified_modules: patterns of the modules to change; without them, the method's default positions.
      exclude_modules: patterns of modules to leave alone, with everything below them, also where a method walks below
        the modules that it was pointed at.
      unfrozen_modules: patterns of what trains besides the delta, a classifier head for example.
      common_structure: whether `modified_modules` are common names (`"attn.q"`) in place of the model's own.
      interactive_modify: choose the modules in a web page, whose link is printed: `True`, or the page's port. Ctrl-C
        stops, and leaves the model as it was. See `jdelta.select_modules`.
      name: the delta's name in the tree; by default its `delta_type`, numbered if that is taken.
      rng: seed or key of the delta's initial values: a whole number, `jax.random.key(0)`, or an old-style key.
      method: what the delta does, for a `DeltaModel` that is not of one method already.
      **arguments: the method's own, see its configuration.

    Raises:
      TypeError: the backbone is none, or an argument has a wrong type or an unknown name.
      ValueError: a pattern matches nothing, a module cannot take the delta or gets nothing from it, the name is taken,
        or the leaves would be larger than all memory (where the backbone is shapes, than 2**50 bytes). The model is
        then as it was.
    """

    method_class: ClassVar[type[Method]] = Method
    delta_type: ClassVar[str] = Method.delta_type
    default_modified_modules: ClassVar[Sequence[str]] = ()  # in place of the method's own

    def __init__(
        self,
        backbone_model: Any,
        modified_modules: Sequence[str] | None = None,
        exclude_modules: Sequence[str] | None = None,
        unfrozen_modules: Sequence[str] | None = None,
        common_structure: bool | None = None,
        interactive_modify: bool | int = False,
        name: str | None = None,
        rng: int | chex.PRNGKey = 0,
        method: Method | None = None,
        **arguments: Any,
    ):
        where = {
            "modified_modules": modified_modules,
            "exclude_modules": exclude_modules,
            "unfrozen_modules": unfrozen_modules,
            "common_structure": common_structure,
        }
        self._attach(backbone_model, self._method(method, where, arguments), name, rng, interactive_modify)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Makes the class the constructor of its method, and shows the method's arguments in the signature."""
        super().__init_subclass__(**kwargs)
        cls.delta_type = cls.method_class.delta_type
        if "method_class" in vars(cls) and "delta_type" in vars(cls.method_class):
            MODELS[cls.method_class.delta_type] = cls
        if cls.__init__ is DeltaModel.__init__:
            common = inspect.signature(DeltaModel.__init__)
            common = common.replace(parameters=[p for n, p in common.parameters.items() if n not in ("self", "method")])
            cls.__signature__ = signature_of(cls.method_class, common)  # type: ignore[attr-defined]

    def _method(self, given: Method | None, where: dict[str, Any], arguments: dict[str, Any]) -> Method:
        """The method that the constructor's arguments mean."""
        cls, label = self.method_class, type(self).__name__
        if given is None:
            return cls.from_arguments(label, where | arguments)
        if not isinstance(given, cls):
            kind = f" subclass of {cls.__name__}" if cls is Method else f" {cls.__name__}"
            raise TypeError(f"{label}: method is an instance of a{kind}, got {given!r}.")
        if arguments:
            raise TypeError(f"{label}: {', '.join(arguments)} belong to the method: {type(given).__name__}(…).")
        return dataclasses.replace(given, **{key: value for key, value in where.items() if value is not None})

    def _attach(
        self,
        backbone_model: Any,
        method: Method,
        name: str | None,
        rng: int | chex.PRNGKey,
        interactive_modify: bool | int = False,
        saved: Finetuned | None = None,
    ) -> None:
        label = type(self).__name__ if type(self) is not DeltaModel or type(method) is Method else method.described()
        if interactive_modify and method.modified_modules is not None:
            raise ValueError("give either modified_modules or interactive_modify, not both.")
        self._state = state = new_state(adapt(backbone_model), backbone_model, method, label, name, rng)
        if saved is not None:
            state.check = lambda state, own: extraction.require_leaves(saved, state, own)
        if interactive_modify:
            if method.common_structure:
                raise ValueError("interactive_modify shows the model's own names: leave common_structure out.")
            with unchanged_on_error(state.host):
                interactive.choose(state, interactive_modify, self._take)
            return
        default = type(self).default_modified_modules or method.default_modified_modules
        patterns = default if method.modified_modules is None else method.modified_modules
        if not patterns and type(method) is not Method:
            raise ValueError(f"{label} was given no modules. Name some: modified_modules=[…].")
        by_common_names = bool(method.common_structure) or method.modified_modules is None
        find = common_names.finder(state.structure, method.exclude_modules or (), label) if by_common_names else None
        attaching.attach_at(state, patterns, find, name is not None)
        state.check = None

    def _take(self, names: list[str]) -> None:
        """Attaches to the modules that were selected in the page."""
        state = self._state
        state.method = dataclasses.replace(state.method, modified_modules=tuple(names))
        attaching.attach_at(state, names, None, False)

    def __copy__(self) -> Self:
        copied = object.__new__(type(self))
        vars(copied).update(vars(self), _state=copy.copy(self._state))
        return copied

    @classmethod
    def from_config(cls, config: Method, backbone_model: Any, name: str | None = None, rng: Any = 0) -> Self:
        """Attaches the delta that a configuration describes.

            delta = jdelta.LoraModel.from_config(jdelta.LoraConfig(lora_r=4), model)

        Args:
          config: a configuration of this method.
          backbone_model, name, rng: as in the constructor.

        Raises:
          TypeError: it is no configuration of this method.
          TypeError, ValueError: as the constructor.
        """
        if not isinstance(config, Method) or (
            cls is not DeltaModel and config.delta_type != cls.method_class.delta_type
        ):
            raise TypeError(
                f"{cls.__name__}.from_config takes a {cls.method_class.__name__}, got {config!r}. "
                "AutoDeltaModel takes the configuration of any method, AutoDeltaConfig makes one from a dict."
            )
        return cls._of(config, backbone_model, name, rng)

    @classmethod
    def _of(
        cls, method: Method, backbone_model: Any, name: str | None, rng: Any = 0, saved: Finetuned | None = None
    ) -> Self:
        """Attaches a method; one that was saved only if its leaves are those of the saved delta."""
        delta = object.__new__(cls)
        with regexes.limited():  # it may come from a file
            delta._attach(backbone_model, method, name, rng, saved=saved)
        return delta

    # --- what it is

    @property
    def config(self) -> Any:
        """The method with its arguments, such as `LoraConfig(lora_r=8)`."""
        return self._state.method

    @property
    def name(self) -> str:
        """The delta's name in the tree."""
        return self._state.name

    @property
    def backbone_model(self) -> Any:
        """The backbone."""
        return self._state.backbone_model

    @property
    def structure(self) -> Structure:
        """The backbone's modules, in the order of execution."""
        return self._state.structure

    @property
    def attached(self) -> bool:
        """Whether the model runs this delta."""
        return self._state.removed is None and self._state.attachment.active

    @property
    def merged(self) -> bool:
        """Whether the delta is merged into the backbone's weights."""
        return self._state.merged

    @property
    def targets(self) -> list[str]:
        """The names of the modules that this delta is on, in the order of execution."""
        return targets(self._state)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The paths of the delta's own leaves in the tree of parameters."""
        return (self._state.removed or self._state.attachment).leaves

    def shapes(self) -> Tree:
        """Shapes of the delta's own leaves, as a tree to be grafted into the backbone's."""
        return self._state.shapes

    # --- on and off

    def detach(self) -> None:
        """Takes the delta off: the model then computes what it computed without it.

        The leaves that `model.params` held are kept, and `attach` puts them back; leaves of the backbone's own that
        trained with the delta get their earlier values meanwhile. Deltas come off in any order. A tree that you hold
        yourself is yours to change: `jdelta.prune(params, delta)`.

        Raises:
          RuntimeError: it is detached already, or `model.params` was donated.
          ValueError: `model.params` lacks leaves of this delta.
        """
        attaching.switch(self._state, active=False)

    def attach(self) -> None:
        """Puts the delta back in its place, with the values it had when it was detached.

        Raises:
          RuntimeError: it is attached already, or `model.params` was donated.
        """
        attaching.switch(self._state, active=True)

    def remove(self) -> None:
        """Takes the delta off for good: its leaves go, and its name is free again.

        Nothing can be done with this object afterwards; what `finetuned` gave before can be attached anew. A delta that
        is merged stays in the weights, which are then the model's own: `merge(); remove()` leaves a bare backbone. To
        forget a detached delta, `del` will do: one that nobody holds does not stay on the model.

        Raises:
          RuntimeError: it was removed already.
          RuntimeError, ValueError: as `detach`.
        """
        attaching.remove(self._state)

    # --- layers of your own

    def insert_sequential_module(
        self, name: str | Sequence[str], layer: nn.Module, where: Literal["after", "before"] = "after"
    ) -> None:
        """Puts a layer after a module, `y -> layer(y)`, or before it, `x -> layer(x)`.

        `x` is the module's first array argument; `y` the array it returns, alone or as an element: the first, if that
        is an array, otherwise the only array, or the only one of the shape of `x`, as in `(cache, y)`.

        Args:
          name: the name of the module, or patterns that mean one or several.
          layer: any unbound linen module, from an array to an array.
          where: on which side.

        Raises:
          TypeError: the layer is no linen module, or the module gives no floating array at that place.
          ValueError: no such module.
        """
        if not isinstance(where, str) or where not in ("after", "before"):
            raise ValueError(f"where is 'after' or 'before', got {where!r}.")
        attaching.insert(self._state, name, where, layer)

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
        attaching.insert(self._state, name, "parallel", layer, start)

    def replace_module(self, name: str | Sequence[str], layer: nn.Module) -> None:
        """Runs a layer in place of a module, with the module's arguments. The module's parameters stay in the tree.

        Args:
          name: the name of the module, or patterns.
          layer: any unbound linen module that takes what the module takes and returns what it returns.

        Raises:
          TypeError, ValueError: as `insert_sequential_module`.
        """
        attaching.insert(self._state, name, "replace", layer)

    def freeze_module(self, exclude: Sequence[str] = ("deltas",)) -> None:
        """Freezes the whole model except what is named. Calling it again replaces the first choice.

        Args:
          exclude: patterns of modules or leaves that train, with everything below them; `"deltas"` means the leaves
            of all attached deltas.

        Raises:
          TypeError: `exclude` is a bare string.
          ValueError: a pattern matches nothing, or nothing but leaves that cannot be trained, such as whole numbers.
            The earlier choice then stays. A pattern that means some of those too is a `UserWarning`.
        """
        training.freeze(self._state, exclude)

    def __repr__(self) -> str:
        states = {"removed": self._state.removed, "merged": self.merged, "attached": self.attached, "detached": True}
        state = next(state for state, holds in states.items() if holds)
        place = f"{len(self.targets)} modules of {self._state.host.class_name}"
        return f"<{type(self).__name__} {self.name!r} on {place}, {state}>"

    def init(self, rng: int | chex.PRNGKey, params: Tree | None = None) -> Tree:
        """Fresh values of the delta's own leaves, as a tree to be grafted into the backbone's.

            params = jdelta.graft(params, jax.jit(delta.init)(jax.random.key(0)))

        It can be jitted, with `out_shardings` too; the compiled program holds nothing of the backbone's.

        Args:
          rng: seed or key, as in the constructor.
          params: the backbone's tree, for a method that starts from its values; by default `model.params`.

        Raises:
          ValueError: the method starts from the backbone's values, and there are none.
        """
        return attaching.init(self._state, as_key(rng), params)

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
        return sharding.partition_specs(
            specs, self._state.tree(None), self._state.host.attachments, self.structure, mesh
        )

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
        return sharding.shardings(specs, self._state.tree(None), self._state.host.attachments, self.structure, mesh)

    def own(self, tree: Tree) -> Tree:
        """The part of a tree that belongs to this delta alone, laid out as `init` gives it.

        Args:
          tree: of the grafted parameters' structure: values, specs, shardings, gradients.

        Raises:
          RuntimeError: it was donated.
          ValueError: it lacks some of the delta's leaves.
        """
        return own_leaves(self._state, tree)

    # --- what trains

    def trainable_mask(self, params: Tree | None = None) -> Tree:
        """A tree of bools, `True` where a leaf trains, for any optax wrapper.

        Args:
          params: the tree to make it for; by default `model.params`.
        """
        return training.mask_of(self._state, self._state.tree(params))

    def partition(self, params: Tree | None = None) -> tuple[Tree, Tree]:
        """Splits a tree into what trains and what is frozen; neither part has holes.

            trainable, frozen = delta.partition(model.params)
            grads = jax.grad(lambda t: loss(jdelta.combine(t, frozen)))(trainable)

        Args:
          params: the tree to split; by default `model.params`.

        Raises:
          RuntimeError: it was donated.
        """
        tree = self._state.tree(params)
        return surgery.partition(tree, training.mask_of(self._state, tree))

    def combine(self, *trees: Tree) -> Tree:
        """`jdelta.combine`, and an error unless the parts make up the whole tree of this model.

        Args:
          *trees: the parts, such as those of `partition`.

        Raises:
          ValueError: the parts overlap, or leaves are missing or do not belong.
        """
        return surgery.combine(*trees, like=self._state.tree(None))

    def optimizer(self, tx: optax.GradientTransformation | optax.MultiSteps) -> optax.GradientTransformationExtraArgs:
        """An optimizer for the whole tree that moves only what trains now, and holds state only for that.

            tx = delta.optimizer(optax.adamw(1e-3))
            state = TrainState.create(apply_fn=model.__call__, params=model.params, tx=tx)
            tx = delta.optimizer(optax.MultiSteps(optax.adamw(1e-3), every_k_schedule=4))  # of 4 micro-batches

        It is bound to what trains when it is made. If that changes, by `freeze_module`, `detach` or another delta, its
        next `init` or `update` is a `RuntimeError`; a compiled step goes on with what it was compiled for, until it is
        traced again. (`trainable_mask` and `partition` give plain trees, which stay as they are too.)

        Args:
          tx: the optimizer of the trainable leaves; `optax.MultiSteps` goes in here, since around the result it would
            sum up the gradients of the whole backbone.

        Raises:
          TypeError: `tx` is no optimizer.
        """
        return training.optimizer(self._state, tx)

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
        return Visualization(self.backbone_model, lambda params: training.mask_of(self._state, params))

    def _repr_html_(self) -> str:
        return self.visualization()._repr_html_()

    def movement(self, params: Tree | None = None) -> Movement:
        """How far each module that the delta changes moved in training: `‖change‖ / ‖weight‖`, layer by layer.

        Of LoRA the change is the update of the weight, of BitFit that of the bias, and the weight is what the backbone
        has there without biases; `jdelta.display.movement.measured` says why. What else trained, such as a head in
        `unfrozen_modules`, is not in the table: its earlier values are not kept.

        Args:
          params: the tree to take the values from; by default `model.params`.

        Raises:
          RuntimeError: the delta is detached or merged, or the tree was donated.
          ValueError: its layers do something else than change weights, as adapters, prefixes and prompts do; or the
            values are elsewhere.
        """
        return movements.tabulated(movements.of_delta(self._state, params))

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
        from jdelta.display import plotting  # here, since matplotlib is optional

        figure = plotting.heatmap(self.movement(params))
        if path is not None:
            plotting.save(figure, as_path("plot", path))
        return figure

    # --- saving, exchanging, merging

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
        return extraction.finetuned(self._state, params)

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
        found = extraction.trained_or_allowed(self._state, "save_finetuned", params, allow_untrained)
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
        found = extraction.trained_or_allowed(self._state, "push_to_hub", params, allow_untrained)
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
        path = as_path("to_peft", path)
        found = extraction.trained_or_allowed(self._state, "to_peft", params, allow_untrained)
        processes.by_first(lambda: peft.to_peft(found, self.structure, path))

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
        return extraction.load(self._state, source, params, check_hash, revision)

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
        return merging.merge(self._state, params)

    def unmerge(self) -> None:
        """Takes the delta out of the weights again, which then have the bits that they had, and attaches it.

        Raises:
          RuntimeError: it is not merged, or the weights of then or of now were donated.
          ValueError: weights were changed since, by training or by a delta that was merged later.
        """
        merging.unmerge(self._state)

    def materialise(self, params: Tree | None = None) -> Tree:
        """Writes what a generator makes, such as a prefix's keys and values, in place of its parameters.

        The model computes the same; the leaves are then those of `reparameterize=False`, the configuration says so,
        and training goes on with them.

            delta = jdelta.PrefixModel(model)
            delta.materialise()

        Args:
          params: the tree to take the values from; by default `model.params`.

        Returns:
          The new tree. Without `params`, it is also put into `model.params`.

        Raises:
          RuntimeError: the tree was donated.
          ValueError: there is no generator, or the delta is detached.
        """
        return merging.materialise(self._state, params)


MODELS: dict[str, type[DeltaModel]] = {"delta": DeltaModel}  # by delta_type: the constructors of the methods


def model_class(method: Method) -> type[DeltaModel]:
    """The constructor of a method; `DeltaModel` if it has none of its own."""
    return MODELS.get(method.delta_type, DeltaModel)
