"""A method: its arguments, and the edits that a module gets from it. It holds no state, and knows no model."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
from flax import linen as nn

from jdelta.core.config import METHODS, DeltaConfig
from jdelta.core.data_starts import DataStart
from jdelta.core.edits import Attachment, Edit, WeightEdit
from jdelta.core.linear import weight_edits
from jdelta.core.structure import ModuleInfo, ParameterInfo, Structure
from jdelta.trees.surgery import Path

Find = Callable[[Sequence[str]], list[ModuleInfo]]


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a delta is to be attached.

    Attributes:
      structure: the modules of the backbone, in the order of execution.
      find: from patterns to the modules that they mean, without those that are excluded.
      attachments: what the model carries already.
    """

    structure: Structure
    find: Find
    attachments: Sequence[Attachment] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(DeltaConfig):
    """What a delta does, as a frozen dataclass: fields are its arguments, `edits` says what a module gets.

        @dataclasses.dataclass(frozen=True)
        class Scale(jdelta.Method):
            delta_type = "scale"
            default_modified_modules = ("ff.w2",)
            init: float = 1.0

            def edits(self, host, structure):
                yield jdelta.CallEdit(host.path, "after", ScaleLayer(self.init))

        delta = jdelta.DeltaModel(model, method=Scale(init=2.0))

    A method that defines a `delta_type` is known by it: `AutoDeltaConfig` and `AutoDeltaModel` make it, and a saved
    delta of it loads where its class is defined.

    Raises:
      ValueError: another method has this `delta_type`.
    """

    default_modified_modules: ClassVar[Sequence[str]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Registers the method by its `delta_type`."""
        super().__init_subclass__(**kwargs)
        if "delta_type" in vars(cls):
            _register(cls)

    @classmethod
    def described(cls) -> str:
        """The name of the method for messages: `"LoraModel"`, as its constructor is called, or its class."""
        return re.sub(r"Config$", "Model", cls.__name__)

    @classmethod
    def takes_single_modules(cls) -> bool:
        """Whether what it does at one module does not depend on the others that are named."""
        return cls.place is Method.place

    @classmethod
    def has_edits(cls) -> bool:
        """Whether it does anything of itself."""
        return any(getattr(cls, name) is not getattr(Method, name) for name in ("edits", "place", "rule"))

    def edits(self, host: ModuleInfo, structure: Structure) -> Iterable[Edit]:
        """What this method does at a module that it was pointed at. Override it.

        The parameters of a layer are below the delta's name at its host, and below `leaf` of the edit, if it has one.

        Args:
          host: the module.
          structure: all modules of the backbone.

        Raises:
          TypeError, ValueError: the module cannot take this delta; `host.name` is put in front of the message.
        """
        return () if (rule := self.rule(host.name)) is None else weight_edits(host, rule)

    def parameter_edits(self, parameter: ParameterInfo, structure: Structure) -> Iterable[Edit]:
        """Yields the edits at one parameter that `modified_parameters` names. Override `rule`, or this.

        Args:
          parameter: the parameter.
          structure: all modules of the backbone.

        Raises:
          TypeError, ValueError: the parameter cannot take this delta; its name is put in front of the message.
        """
        if (rule := self.rule(parameter.name)) is None:
            raise TypeError("the method changes modules; name some in modified_modules.")
        yield WeightEdit(parameter.path, rule, own=parameter.path[-1:])

    def rule(self, name: str) -> Any:
        """Returns the rule that changes the weight of a module, or a parameter. Override it, or `edits`.

        Args:
          name: the dot-joined name of the module or parameter.

        Returns:
          A `core.rules.WeightRule` or `FeatureRule`.
        """
        return None

    def place(self, site: Site, patterns: Sequence[str]) -> Iterable[Edit]:
        """Yields the edits at all modules that match the patterns. Override it where modules come in pairs.

        Args:
          site: where the delta is to be attached.
          patterns: those of `modified_modules`, or of the default positions.
        """
        for host in site.find(patterns) if patterns else ():
            try:
                yield from self.edits(host, site.structure)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{self.described()} at {host.name} ({host.type.__name__}): {error}") from error

    def generator(self, shapes: Mapping[Path, jax.ShapeDtypeStruct]) -> nn.Module | None:
        """Returns a module that generates leaves of several hosts from parameters of its own. Override it.

        Its parameters are in the tree once, below the delta's name at the root; the leaves that it generates are not in
        the tree.

        Args:
          shapes: path to shape of each leaf that the delta's layers have.

        Returns:
          An unbound module which, called without arguments, returns `{path: array}` for some of these paths.
        """
        return None

    def materialised(self) -> Self | None:
        """Returns the method whose leaves are those that `generator` generates, if a delta is to be saved as that.

        Override it. `None`: the delta is saved as it is.
        """
        return None

    def frozen(self, leaf: Path) -> bool:
        """Whether a leaf of the delta's own never trains. Override it.

        Args:
          leaf: its path.
        """
        return False

    def regenerated(self, leaf: Path) -> bool:
        """Whether a leaf is frozen and generated from the seed `rng`, and so not saved. Override it.

        Args:
          leaf: its path.
        """
        return False

    def init_from_backbone(
        self, leaves: Mapping[Path, jax.Array], params: Mapping[Path, jax.Array]
    ) -> Mapping[Path, jax.Array]:
        """Returns the initial values of the delta's own leaves, where they depend on the backbone's. Override it.

        Args:
          leaves: path to value, as the layers initialise it.
          params: path to value of the backbone's parameters.
        """
        return leaves

    def optimizer(self, tx: Any, leaves: Iterable[Path] = ()) -> Any:
        """The optimizer of what trains, made of the user's; `delta.optimizer` applies it. Override it.

            def optimizer(self, tx, leaves):
                return optax.chain(tx, budget_schedule(self.target_r))

        Args:
          tx: what the user passed to `delta.optimizer`. What it is given has the leaves that train.
          leaves: the paths of the delta's own leaves.
        """
        return tx

    def update_factors(self, leaves: Iterable[Path]) -> Mapping[Path, float]:
        """By what the updates of the delta's own leaves are multiplied; 1, if it is not said. Override it.

            def update_factors(self, leaves, lora_plus_ratio=1.0):
                return {path: lora_plus_ratio for path in leaves if path[-1] == "b"}

        Further arguments are options of `delta.optimizer`, by keyword.

        Args:
          leaves: the paths of the leaves.
        """
        return {}

    def penalty(self, own: Mapping[Path, jax.Array]) -> jax.Array | float:
        """What the method adds to the loss; `delta.penalty` gives it. Override it.

        Args:
          own: path to value of the delta's own leaves.
        """
        return 0.0

    @property
    def starts_from_data(self) -> bool:
        """Whether `data_start` says how the delta's own leaves start."""
        return type(self).data_start is not Method.data_start

    def data_start(self, **options: Any) -> DataStart | None:
        """How the delta's own leaves start from data, which `delta.init_from_data` puts in. Override it.

            def data_start(self, power=2):
                return MomentStart(power)

        Args:
          **options: further keywords of `delta.init_from_data`.
        """
        return None


def _register(method: type[Method]) -> None:
    """Makes a method known by its `delta_type`. A class that is defined anew, as in a notebook, replaces itself."""
    taken, kind = METHODS.get(method.delta_type), method.delta_type
    if taken is not None and (taken.__module__, taken.__qualname__) != (method.__module__, method.__qualname__):
        where = f"{taken.__module__}.{taken.__qualname__}"
        raise ValueError(
            f"{method.__name__}: delta_type {kind!r} is that of {where} already. Choose another delta_type."
        )
    METHODS[kind] = method


def signature_of(method: type[DeltaConfig], common: inspect.Signature) -> inspect.Signature:
    """A constructor's signature with the fields of a method in place of `**arguments`."""
    shared = [p for p in common.parameters.values() if p.kind is not p.VAR_KEYWORD]
    own = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in dataclasses.fields(method)
        if f.name not in {p.name for p in shared}
    ]
    return inspect.Signature([*shared, *own])


METHODS["delta"] = Method
