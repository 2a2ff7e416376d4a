"""What an abstract trace saw: the modules of a model as the tensors flow through them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from flax.core import meta

from jdelta.core.arguments import input_if_any, main_input, main_output
from jdelta.core.standalone import Standalone
from jdelta.trees import addressing, surgery
from jdelta.trees.surgery import Path, Tree

ModuleType = type[Any]


@dataclasses.dataclass(frozen=True)
class ModuleInfo:
    """One module of a backbone, as an abstract call saw it.

        info = delta.structure["bert.encoder.layer.0.attention.self.query"]
        info.type, info.x.shape, info.params["kernel"].shape  # (flax.linen.Dense, (1, 1, 768), (768, 768))

    Attributes:
      path: the path of the module and its parameters in the tree.
      type: its class.
      fields: its hyperparameters: the fields of the linen dataclass; of an nnx module, its static attributes.
      args, kwargs: the arguments of the call, arrays as `jax.ShapeDtypeStruct`s.
      output: what the call returned, likewise.
      params: shapes of its own parameters as the module itself sees them: inside `nn.scan` without the layer axis.
      calls: how often it is called in one run of the model; inside `nn.scan`, once for each layer.
      caller: path of the module in whose call its first call was; `None` for the outermost.
      sharing: names and classes of the modules inside it that use its scope (`nn.share_scope`); their parameters are
        among its own.
      closed: the reason why a delta cannot be attached at the module; `""` if it can.
      standalone: the module by itself, on which it is tried whether it is linear; `None` if it cannot be tried.
    """

    path: Path
    type: ModuleType
    fields: Mapping[str, Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    params: Mapping[str, jax.ShapeDtypeStruct]
    calls: int = 1
    caller: Path | None = None
    sharing: Mapping[str, ModuleType] = dataclasses.field(default_factory=dict)
    closed: str = ""
    standalone: Standalone | None = None

    @property
    def name(self) -> str:
        """The dot-joined name."""
        return surgery.name_of(self.path)

    @property
    def x(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the first array among the arguments. Raises `TypeError` if there is none."""
        x: jax.ShapeDtypeStruct = main_input(self.type, self.args, self.kwargs)[1]
        return x

    @property
    def y(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the array that is returned, see `main_output`. Raises `TypeError` if there is none."""
        y: jax.ShapeDtypeStruct = main_output(self.output, input_if_any(self.type, self.args, self.kwargs))
        return y


@dataclasses.dataclass(frozen=True)
class ParameterInfo:
    """One parameter of a backbone, as `Method.parameter_edits` gets it.

        def parameter_edits(self, parameter, structure):
            yield jdelta.WeightEdit(parameter.path, MyRule(), own=parameter.path[-1:])

    Attributes:
      path: where it is in the tree.
      shape: as it is stored: inside `nn.scan` with the layers' axis.
      dtype: of its numbers.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: Any

    @property
    def name(self) -> str:
        """The dot-joined name."""
        return surgery.name_of(self.path)


@dataclasses.dataclass(frozen=True)
class Structure:
    """The modules of a backbone in the order of their first call, and the shapes of its parameters.

        for info in delta.structure:
            print(info.name, info.type.__name__, info.calls)
        queries = delta.structure.find(["self.query"], exclude=["layer.0"])

    Attributes:
      modules: name to module. The name of the root module is `""`.
      uncalled: name to the reason why a delta cannot be attached at that part of the model.
      params: the tree of parameter shapes, without other collections.
      tied: names of the modules with whose weights something computes besides their calls, such as a tied head.
      by_method: name and method to what a call showed, of modules that are run by other methods than `__call__`.
      reserved: names that no delta can have, since modules have other attributes so called.
      derived: what others have found out about it, by a name of theirs.
    """

    modules: Mapping[str, ModuleInfo]
    uncalled: Mapping[str, str]
    params: Tree
    tied: frozenset[str] = frozenset()
    by_method: Mapping[tuple[str, str], ModuleInfo] = dataclasses.field(default_factory=dict)
    reserved: frozenset[str] = frozenset()
    derived: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def __getitem__(self, name: str) -> ModuleInfo:
        return self.modules[name]

    def __iter__(self) -> Iterator[ModuleInfo]:
        return iter(self.modules.values())

    def __len__(self) -> int:
        return len(self.modules)

    def find(self, patterns: Sequence[str], exclude: Sequence[str] = ()) -> list[ModuleInfo]:
        """Returns the modules that match the patterns, in order of execution.

        Args:
          patterns, exclude: as in `jdelta.match`.

        Raises:
          ValueError: as `jdelta.match`; also if a pattern matches only parts at which no delta can be attached, or a
            module that is `closed`.
        """
        names = [name for name in self.modules if name]
        for pattern in addressing.checked(patterns):
            if not any(addressing.matches(name, pattern) for name in names):
                for name, reason in self.uncalled.items():
                    if addressing.matches(name, pattern):
                        raise ValueError(f"{pattern!r} means {name!r}, which cannot be a target: {reason}")
        found = [self.modules[name] for name in addressing.match(names, patterns, exclude)]
        for info in found:
            require_open(info)
        return found

    @functools.cached_property
    def leaves(self) -> dict[Path, Any]:
        """Path to shape of each parameter."""
        return surgery.flatten(self.params)

    @property
    def parameters(self) -> list[ParameterInfo]:
        """All parameters, by the names that `modified_parameters` takes, in the order of the tree."""
        found = {path: meta.unbox(leaf) for path, leaf in self.leaves.items() if leaf is not surgery.empty_node}
        return [ParameterInfo(path, tuple(leaf.shape), leaf.dtype) for path, leaf in found.items()]

    def run_by(self, name: str, method: str) -> ModuleInfo:
        """A module, as a call of one of its methods showed it.

        Args:
          name: of the module.
          method: `"__call__"`, or the name of another one.

        Raises:
          ValueError: it is not run by this method.
        """
        if method == "__call__":
            return self.modules[name]
        if (name, method) not in self.by_method:
            methods = [other for module, other in self.by_method if module == name]
            instead = f"; it is run by {', '.join(methods)}" if methods else ""
            raise ValueError(f"{name!r} is not run by its method {method!r} in the model's run{instead}.")
        return self.by_method[name, method]

    def find_run_by(self, patterns: Sequence[str], method: str) -> list[ModuleInfo]:
        """The modules that patterns mean among those that are run by a method.

        Args:
          patterns: of modules.
          method: `"__call__"`, or the name of another one.

        Raises:
          ValueError: no module is run by this method, or a pattern means none of those that are.
        """
        if method == "__call__":
            return self.find(patterns)
        named = {name: info for (name, other), info in self.by_method.items() if other == method}
        if not named:
            raise ValueError(f"no module of this model is run by a method {method!r} in the model's run.")
        return [named[name] for name in addressing.match(list(named), patterns)]

    def callers(self, info: ModuleInfo) -> list[ModuleInfo]:
        """Returns the modules in whose calls a module was first called, innermost first; the last is the root.

        Args:
          info: the module.
        """
        found = []
        while info.caller is not None:
            info = self.modules[surgery.name_of(info.caller)]
            found.append(info)
        return found

    def below(self, path: Path) -> list[ModuleInfo]:
        """Returns a module and everything inside it, in order of execution.

        Args:
          path: the path of the module.
        """
        return list(self._below.get(path, ()))

    @functools.cached_property
    def _below(self) -> dict[Path, list[ModuleInfo]]:
        found: dict[Path, list[ModuleInfo]] = {}
        for info in self:
            for i in range(len(info.path) + 1):
                found.setdefault(info.path[:i], []).append(info)
        return found


def require_open(info: ModuleInfo) -> None:
    """Raises `ValueError` if the module is `closed`."""
    if info.closed:
        raise ValueError(
            f"{info.name!r} cannot be a target: {info.closed}. Leave it out, with exclude_modules=[{info.name!r}] for "
            f"example; its own parameters can train with a delta, by unfrozen_modules=[{info.name!r}]."
        )
