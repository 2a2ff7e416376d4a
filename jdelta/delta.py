"""`DeltaModel`: the stateful shell that puts deltas on a backbone, with OpenDelta's verbs."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import chex
import jax
import optax
from flax import linen as nn

from jdelta.core.config import CONFIGS, DeltaConfig, as_path
from jdelta.core.edits import CallEdit
from jdelta.core.random_keys import as_key
from jdelta.display.movement import Movement, measured, tabulated
from jdelta.display.visualization import Visualization
from jdelta.hosts import backbone
from jdelta.hosts.linen.instrument import attachments_of, with_made
from jdelta.kept import Kept
from jdelta.saved.finetuned import Finetuned
from jdelta.scale import sharding
from jdelta.trees import addressing, freezing, regexes, surgery
from jdelta.trees.surgery import Path, Tree

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class DeltaModel(Kept):
    """A delta on a backbone. Constructing one attaches it: `model.params` is then the grafted tree.

    It stays there until `detach` or `remove`, whoever holds the object. A second one of the same method, arguments and
    modules is a `UserWarning`, unless it is given a `name`.

    Of itself it changes nothing; it carries what `insert_sequential_module` and its like put in. A method is a
    subclass that says in `edits` what a module should get:

        class ScaleModel(jdelta.DeltaModel):
            delta_type = "scale"
            default_modified_modules = ("ff.w2",)

            def edits(self, host, structure):
                yield jdelta.CallEdit(host.path, "after", Scale(), leaf=(self.name,))

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
      **arguments: the method's own, see its configuration.

    Raises:
      TypeError: the backbone is none, or an argument has a wrong type or an unknown name.
      ValueError: a pattern matches nothing, a module cannot take the delta or gets nothing from it, the name is taken,
        or the leaves would be larger than all memory (where the backbone is shapes, than 2**50 bytes). The model is
        then as it was.
    """

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
        self._put_at(patterns, common=bool(common_structure) or modified_modules is None)

    def _choose(self, port: bool | int) -> None:
        """Attaches to the modules that the user picks in a page. If it is interrupted, the model is as it was."""
        from jdelta.display import interactive  # here, since it is made of this class

        if self.config.common_structure:
            raise ValueError("interactive_modify shows the model's own names: leave common_structure out.")

        def take(names: list[str]) -> None:
            self.config = dataclasses.replace(self.config, modified_modules=tuple(names))
            self._put_at(names)

        with backbone.unchanged_on_error(self._adapter):
            interactive.choose(self, port, take)

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
        with regexes.limited():  # it may come from a file
            return cls(backbone_model, name=name, rng=rng, **_arguments(config))

    @classmethod
    def _of_saved(cls, found: Finetuned, backbone_model: Any, name: str | None) -> Self:
        """Attaches a delta like one that was saved; before leaves are made, they are compared with the saved ones."""
        delta = cls.__new__(cls)
        delta._saved = found
        delta.__init__(backbone_model, name=name, **_arguments(found.config))  # type: ignore[misc]
        delta._saved = None
        return delta

    # --- the operations

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
          ValueError: a pattern matches nothing, or nothing but leaves that cannot be trained, such as whole numbers.
            The earlier choice then stays. A pattern that means some of those too is a `UserWarning`.
        """
        before, self._exclude = self._exclude, tuple(addressing.checked(exclude))
        try:
            self.trainable_mask()
        except ValueError:
            self._exclude = before
            raise
        self._warn_of_fixed(self._exclude, "freeze_module")

    # --- what it is

    def __repr__(self) -> str:
        states = {"removed": self._removed, "merged": self.merged, "attached": self.attached, "detached": True}
        state = next(state for state, holds in states.items() if holds)
        place = f"{len(self.targets)} modules of {self._adapter.class_name}"
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
        own = self._only_own(self._init_model(as_key(rng)))
        return self._started(own, self._adapter.params if params is None else params)

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
        carried = attachments_of(self._adapter.module)
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
        carried = attachments_of(self._adapter.module)
        return sharding.shardings(specs, self._tree(None), carried, self._structure, mesh)

    def own(self, tree: Tree) -> Tree:
        """The part of a tree that belongs to this delta alone, laid out as `init` gives it.

        Args:
          tree: of the grafted parameters' structure: values, specs, shardings, gradients.

        Raises:
          RuntimeError: it was donated.
          ValueError: it lacks some of the delta's leaves.
        """
        surgery.require_alive(tree)
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

        Raises:
          RuntimeError: it was donated.
        """
        tree = self._tree(params)
        return surgery.partition(tree, self._mask_of(tree))

    def combine(self, *trees: Tree) -> Tree:
        """`jdelta.combine`, and an error unless the parts make up the whole tree of this model.

        Raises:
          ValueError: the parts overlap, or leaves are missing or do not belong.
        """
        return surgery.combine(*trees, like=self._tree(None))

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
        bound = self._trained_in_model(self._tree(None))
        if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
            raise TypeError(f"optimizer takes one of optax's, such as optax.adamw(1e-3), got {tx!r}.")

        def mask(params: Tree) -> Tree:
            now = self._trained_in_model(params)
            if now != bound:
                raise RuntimeError(_changed(self.name, bound, now))
            return freezing.mask_of(params, bound)

        return freezing.freeze_except(tx, mask)

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
        has there without biases; `jdelta.display.movement.measured` says why. What else trained, such as a head in
        `unfrozen_modules`, is not in the table: its earlier values are not kept.

        Args:
          params: the tree to take the values from; by default `model.params`.

        Raises:
          RuntimeError: the delta is detached or merged, or the tree was donated.
          ValueError: its layers do something else than change weights, as adapters, prefixes and prompts do; or the
            values are elsewhere.
        """
        own, tree = self._active("measured"), surgery.parameters(self._values(params))
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree)):
            raise ValueError("the values are elsewhere. Pass the tree that holds them: params=….")
        self._require_whole(tree, "movement")
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
        from jdelta.display import plotting  # here, since matplotlib is optional

        figure = plotting.heatmap(self.movement(params))
        if path is not None:
            plotting.save(figure, as_path("plot", path))
        return figure

    # --- inside

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
            edits.append(CallEdit(host.path, where, layer, span_input=begin.path if begin else None, leaf=leaf))
        self._put([*own.edits, *edits])
        self._inserted += [surgery.name_of(edit.host) for edit in edits]

    def _init_model(self, rng: chex.PRNGKey) -> Tree:
        own = dataclasses.replace(self._attachment, active=True)
        return self._run_init([own if a.name == own.name else a for a in attachments_of(self._adapter.module)], rng)


def _arguments(config: DeltaConfig) -> dict[str, Any]:
    """The fields of a configuration, as arguments of its method."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _changed(name: str, before: set[Path], now: set[Path]) -> str:
    """The message for an optimizer that was made when other leaves trained."""
    parts = []
    for what, odd in (("trains now", now - before), ("trains no more", before - now)):
        if odd:
            names = sorted(map(surgery.name_of, odd))
            parts.append(f"{names[0]!r}{f' and {len(names) - 1} more' if len(names) > 1 else ''} {what}")
    return (
        f"what trains with delta {name!r} changed after this optimizer was made: {'; '.join(parts)}. Make it and its "
        "state anew: tx = delta.optimizer(…); state = tx.init(params)."
    )


# By delta_type: every subclass that defines one of its own.
METHODS: dict[str, type[DeltaModel]] = {"delta": DeltaModel}


def _register(method: type[DeltaModel]) -> None:
    """Makes a method known by its `delta_type`, and its configuration class the one of that type."""
    taken, kind = METHODS.get(method.delta_type), method.delta_type
    if taken is not None and taken.__module__.startswith("jdelta.") and taken.__module__ != method.__module__:
        raise ValueError(f"{method.__name__}: delta_type {kind!r} is that of jdelta.{taken.__name__}. Choose another.")
    base = method.config_class
    if vars(base).get("delta_type", kind) != kind:  # inherited from a method of another type
        namespace = {
            "__module__": method.__module__,
            "__qualname__": f"{method.__qualname__}.config_class",  # where pickle finds it
            "__doc__": f"Arguments of {method.__name__}.",
        }
        method.config_class = type(f"{method.__name__.removesuffix('Model')}Config", (base,), namespace)
    method.config_class.delta_type = kind
    METHODS[kind] = method
    CONFIGS[kind] = method.config_class
