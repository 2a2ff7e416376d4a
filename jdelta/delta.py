"""`DeltaModel`: a method on a backbone, with OpenDelta's verbs. Each is a function of a `DeltaState`."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Concatenate, ParamSpec, Self, TypeVar

import chex

from jdelta.core import (
    attaching,
    checking,
    data_init,
    disabling,
    initial_values,
    inserting,
    merging,
    switching,
    training,
)
from jdelta.core import state as states
from jdelta.core.host import HostAdapter, unchanged_on_error
from jdelta.core.method import Method, signature_of
from jdelta.core.state import DeltaState, new_state, targets
from jdelta.core.structure import Structure
from jdelta.display import interactive, showing
from jdelta.display import movement as movements
from jdelta.display import status as statuses
from jdelta.hosts.adapting import adapt
from jdelta.hosts.nnx.adapter import DummyInputs
from jdelta.names import common_names
from jdelta.saved import extraction, loading
from jdelta.saved.finetuned import Finetuned
from jdelta.scale import sharding
from jdelta.trees import regexes
from jdelta.trees.filters import Trained
from jdelta.trees.surgery import Path, Tree

P = ParamSpec("P")
R = TypeVar("R")


def verb(function: Callable[Concatenate[DeltaState, P], R]) -> Callable[Concatenate[Any, P], R]:
    """The function as a method, of the same name, docstring and arguments, with `self._state` for its first one.

    merge = verb(merging.merge)
    """

    @functools.wraps(function)
    def method(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        return function(self._state, *args, **kwargs)

    signature = inspect.signature(function)
    first, *rest = signature.parameters.values()
    shown = first.replace(name="self", annotation=inspect.Parameter.empty)
    method.__signature__ = signature.replace(parameters=[shown, *rest])  # type: ignore[attr-defined]
    method.__annotations__ = {key: hint for key, hint in method.__annotations__.items() if key != first.name}
    method.__qualname__ = f"DeltaModel.{method.__name__}"
    method.__module__ = __name__
    return method


class DeltaModel:
    """A delta on a backbone. Constructing one attaches it: `model.params` is then the grafted tree.

    It stays there until `detach` or `remove`, whoever holds the object. A second one of the same method, arguments and
    modules is a `UserWarning`, unless it is given a `name`.

        delta = jdelta.LoraModel(model, lora_r=8)  # a method of jdelta, by its own constructor
        delta = jdelta.DeltaModel(model, method=Scale(init=2.0))  # a method of your own: see `jdelta.Method`
        delta = jdelta.DeltaModel(model)  # without a method: carries what `insert_sequential_module` puts in

    Args:
      backbone_model: a Flax model of transformers, a `jdelta.Backbone`, or an nnx module, which is changed in place.
      modified_modules: patterns of the modules to change; without them, the method's default positions.
      exclude_modules: patterns of modules to exclude, with everything below them, also where a method edits modules
        below those that are named.
      unfrozen_modules: patterns of what trains besides the delta, a classifier head for example.
      common_structure: whether `modified_modules` are common names (`"attn.q"`) in place of the model's own.
      interactive_modify: select the modules in a web page, whose link is printed: `True`, or the page's port. Ctrl-C
        stops, and leaves the model as it was. See `jdelta.select_modules`.
      name: the delta's name in the tree; by default its `delta_type`, numbered if that is taken.
      rng: seed or key of the delta's initial values: a whole number, `jax.random.key(0)`, or an old-style key.
      modified_parameters: patterns of parameters to change, by the same rules as those of modules: experts that are
        stored in one array, weights that a tied head reads too. Without `modified_modules`, nothing else is changed.
      dummy_inputs: of an nnx module, the arguments of one call: a tuple, or a dict of keywords. Only shapes and dtypes
        count. Without them, an int32 `[[0, 0, 0]]` and then `[0, 0, 0]` is tried; those of an earlier delta are
        remembered.
      method: what the delta does, for a `DeltaModel` that is not of one method already.
      **arguments: the method's own, see its configuration.

    Raises:
      TypeError: the backbone is not a supported model, or an argument has a wrong type or an unknown name.
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
        modified_parameters: Sequence[str] | None = None,
        dummy_inputs: DummyInputs | None = None,
        method: Method | None = None,
        **arguments: Any,
    ):
        where = {
            "modified_modules": modified_modules,
            "modified_parameters": modified_parameters,
            "exclude_modules": exclude_modules,
            "unfrozen_modules": unfrozen_modules,
            "common_structure": common_structure,
        }
        chosen = self._method(method, where, arguments)
        self._attach(adapt(backbone_model, dummy_inputs), backbone_model, chosen, name, rng, interactive_modify)

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
        host: HostAdapter,
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
        self._state = state = new_state(host, backbone_model, method, label, name, rng)
        if saved is not None:
            state.check = lambda state, own: loading.require_leaves(saved, state, own)
        if interactive_modify:
            if method.common_structure:
                raise ValueError("interactive_modify shows the model's own names: leave common_structure out.")
            with unchanged_on_error(state.host):
                interactive.choose(state, interactive_modify, self._take)
            return
        default = type(self).default_modified_modules or method.default_modified_modules
        patterns = default if method.modified_modules is None else method.modified_modules
        if method.modified_modules is None and method.modified_parameters is not None:
            patterns = ()
        if not patterns and not method.modified_parameters and type(method) is not Method:
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
    def from_config(
        cls,
        config: Method,
        backbone_model: Any,
        name: str | None = None,
        rng: Any = 0,
        dummy_inputs: DummyInputs | None = None,
    ) -> Self:
        """Attaches the delta that a configuration describes.

            delta = jdelta.LoraModel.from_config(jdelta.LoraConfig(lora_r=4), model)

        Args:
          config: a configuration of this method.
          backbone_model, name, rng, dummy_inputs: as in the constructor.

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
        return cls._of(config, adapt(backbone_model, dummy_inputs), backbone_model, name, rng)

    @classmethod
    def _of(
        cls,
        method: Method,
        host: HostAdapter,
        backbone_model: Any,
        name: str | None,
        rng: Any = 0,
        saved: Finetuned | None = None,
    ) -> Self:
        """Attaches a method; one that was saved only if its leaves are those of the saved delta."""
        delta = object.__new__(cls)
        with regexes.limited():  # it may come from a file
            delta._attach(host, backbone_model, method, name, rng, saved=saved)
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

    @property
    def filter(self) -> Trained:
        """What trains now, as a hashable filter of flax.nnx.

        optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=delta.filter)
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, delta.filter))(model, batch)
        """
        return training.trained_filter(self._state)

    def shapes(self) -> Tree:
        """Returns the shapes of the delta's own leaves, as a tree to be grafted into the backbone's.

            params = jdelta.graft(backbone_shapes, delta.shapes())

        They are `jax.ShapeDtypeStruct`s.
        """
        return self._state.shapes

    # --- on and off

    detach = verb(switching.detach)
    attach = verb(switching.attach)
    remove = verb(switching.remove)
    disabled = verb(disabling.disabled)

    # --- layers of your own

    insert_sequential_module = verb(inserting.insert_sequential_module)
    insert_parallel_module = verb(inserting.insert_parallel_module)
    replace_module = verb(inserting.replace_module)

    # --- values, and what trains

    init = verb(initial_values.init)
    own = verb(states.own)
    init_from_data = verb(data_init.init_from_data)
    freeze_module = verb(training.freeze_module)
    trainable_mask = verb(training.trainable_mask)
    partition = verb(training.partition)
    combine = verb(training.combine)
    optimizer = verb(training.optimizer)
    penalty = verb(training.penalty)

    # --- how it is split over a mesh

    partition_specs = verb(sharding.partition_specs)
    shardings = verb(sharding.shardings)

    # --- how it looks, and how far it moved

    status = verb(statuses.status)
    check_products = verb(checking.check_products)
    log = verb(showing.log)
    visualization = verb(showing.visualization)
    movement = verb(movements.movement)
    plot = verb(showing.plot)

    # --- saving, exchanging, merging

    finetuned = verb(extraction.finetuned)
    save_finetuned = verb(extraction.save_finetuned)
    push_to_hub = verb(extraction.push_to_hub)
    to_peft = verb(extraction.to_peft)
    load_finetuned = verb(loading.load_finetuned)
    merge = verb(merging.merge)
    unmerge = verb(merging.unmerge)
    materialise = verb(merging.materialise)

    def __repr__(self) -> str:
        states = {"removed": self._state.removed, "merged": self.merged, "attached": self.attached, "detached": True}
        state = next(state for state, holds in states.items() if holds)
        place = f"{len(self.targets)} modules of {self._state.host.class_name}"
        return f"<{type(self).__name__} {self.name!r} on {place}, {state}>"

    def _repr_html_(self) -> str:
        return self.visualization()._repr_html_()


MODELS: dict[str, type[DeltaModel]] = {"delta": DeltaModel}  # by delta_type: the constructors of the methods


def model_class(method: Method) -> type[DeltaModel]:
    """The constructor of a method; `DeltaModel` if it has none of its own."""
    return MODELS.get(method.delta_type, DeltaModel)
