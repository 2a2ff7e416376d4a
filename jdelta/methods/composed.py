"""Several methods as one delta, such as the Mix-And-Match adapter (He et al. 2021, arXiv 2110.04366)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import jax
from flax import linen as nn

from jdelta.core.config import config_from_dict
from jdelta.core.edits import Edit, WeightEdit
from jdelta.core.method import Method, Site
from jdelta.core.placement import edits_of
from jdelta.names import common_names
from jdelta.trees.surgery import Path


@dataclasses.dataclass(frozen=True)
class ComposedConfig(Method):
    """Arguments of a composition.

        parts = (jdelta.PrefixConfig(prefix_token_num=4), jdelta.ParallelAdapterConfig(modified_modules=["ff", "ff"]))
        delta = jdelta.AutoDeltaModel.from_config(jdelta.ComposedConfig(methods=parts), backbone_model=model)

    Each method is where it would be alone. `exclude_modules` and `unfrozen_modules` are those of all.

    Attributes:
      methods: the configurations of the methods, at least two.
    """

    delta_type = "composed"
    default_modified_modules = ("where each of the methods is",)

    methods: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        methods = tuple(config_from_dict(each) if isinstance(each, Mapping) else each for each in self.methods)
        for each in methods:
            if not isinstance(each, Method):
                hint = " It is attached already: give its configuration." if hasattr(each, "config") else ""
                raise TypeError(
                    f"methods holds configurations, such as jdelta.LoraConfig(lora_r=8), got {each!r}.{hint}"
                )
            if isinstance(each, ComposedConfig) or type(each) is Method:
                raise ValueError(f"methods holds the methods themselves, and no {type(each).__name__}.")
            if each.starts_from_data:
                raise ValueError(
                    f"{each.described()} starts from data, which a composition does not pass on. Attach it by itself."
                )
        for name in ("modified_modules", "modified_parameters", "common_structure"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} belongs to the methods, such as LoraConfig({name}=…).")
        unfrozen = [*(self.unfrozen_modules or ()), *(p for each in methods for p in each.unfrozen_modules or ())]
        object.__setattr__(self, "methods", methods)
        object.__setattr__(self, "unfrozen_modules", tuple(dict.fromkeys(unfrozen)) or None)

    def to_dict(self) -> dict[str, Any]:
        """Returns the `delta_type` and all fields, with the types of JSON."""
        return {**super().to_dict(), "methods": [each.to_dict() for each in self.methods]}

    @property
    def parts(self) -> dict[str, Method]:
        """The methods by the names below which their leaves are: the `delta_type`, numbered from the second on."""
        parts: dict[str, Method] = {}
        for each in self.methods:
            count = sum(other.delta_type == each.delta_type for other in parts.values())
            parts[f"{each.delta_type}_{count + 1}" if count else each.delta_type] = each
        return parts

    def place(self, site: Site, patterns: Sequence[str]) -> Iterable[Edit]:
        """What each of the methods does, its own leaves below its name."""
        if len(self.methods) < 2:
            raise ValueError(f"a composition is of two methods or more, got {len(self.methods)}.")
        for label, part in self.parts.items():
            exclude = (*(part.exclude_modules or ()), *(self.exclude_modules or ()))
            found = dataclasses.replace(part, exclude_modules=exclude or None)
            for edit in edits_of(found, part.described(), site.structure, site.attachments, *_where(found, site)):
                if isinstance(edit, WeightEdit):
                    yield dataclasses.replace(edit, own=(label, *edit.own))
                else:
                    yield edit if edit.where == "train" else dataclasses.replace(edit, leaf=(label, *edit.leaf))

    def generator(self, shapes: Mapping[Path, jax.ShapeDtypeStruct]) -> nn.Module | None:
        made = {}
        for label, part in self.parts.items():
            own = {path: shape for path, shape in shapes.items() if self._label(path) == label}
            if (module := part.generator(own)) is not None:
                made[label] = module
        return Generators(tuple(made.items())) if made else None

    def materialised(self) -> Self | None:
        made = [each.materialised() for each in self.methods]
        if not any(made):
            return None
        return dataclasses.replace(
            self, methods=tuple(new or each for new, each in zip(made, self.methods, strict=True))
        )

    def frozen(self, leaf: Path) -> bool:
        label = self._label(leaf)
        return label is not None and self.parts[label].frozen(leaf)

    def regenerated(self, leaf: Path) -> bool:
        label = self._label(leaf)
        return label is not None and self.parts[label].regenerated(leaf)

    def init_from_backbone(
        self, leaves: Mapping[Path, jax.Array], params: Mapping[Path, jax.Array]
    ) -> Mapping[Path, jax.Array]:
        found = dict(leaves)
        for label, part in self.parts.items():
            own = {_without(path, label): path for path in leaves if self._label(path) == label}
            started = part.init_from_backbone({short: leaves[path] for short, path in own.items()}, params)
            found |= {own[short]: value for short, value in started.items()}
        return found

    def penalty(self, own: Mapping[Path, jax.Array]) -> jax.Array | float:
        return sum(part.penalty(leaves) for part, leaves in self._split(own))

    def optimizer(self, tx: Any, leaves: Iterable[Path] = ()) -> Any:
        for part, own in self._split(dict.fromkeys(leaves)):
            tx = part.optimizer(tx, [*own])
        return tx

    def _split(self, own: Mapping[Path, Any]) -> Iterator[tuple[Method, dict[Path, Any]]]:
        """The methods with their leaves."""
        for label, part in self.parts.items():
            yield part, {path: leaf for path, leaf in own.items() if self._label(path) == label}

    def _label(self, leaf: Path) -> str | None:
        """The name of the method that a leaf belongs to."""
        return next((key for key in reversed(leaf) if key in self.parts), None)


class Generators(nn.Module):
    """Generates what several generators do.

    Attributes:
      parts: the name of each method to its generator.
    """

    parts: tuple[tuple[str, nn.Module], ...]

    @nn.compact
    def __call__(self) -> dict[Path, jax.Array]:
        made: dict[Path, jax.Array] = {}
        for label, module in self.parts:
            made |= module.clone(parent=self, name=label)()
        return made


def _where(part: Method, site: Site) -> tuple[Sequence[str], Any]:
    """The patterns of a method's modules, and what finds them, if these are common names."""
    if part.modified_modules is None and part.modified_parameters is not None:
        return (), None
    patterns = part.default_modified_modules if part.modified_modules is None else part.modified_modules
    if not patterns and not part.modified_parameters:
        raise ValueError(f"{part.described()} was given no modules. Name some: modified_modules=[…].")
    if part.modified_modules is not None and not part.common_structure:
        return patterns, None
    return patterns, common_names.finder(site.structure, part.exclude_modules or (), part.described())


def _without(path: Path, label: str) -> Path:
    """The path that a leaf would have in a delta of its method alone."""
    i = len(path) - 1 - path[::-1].index(label)
    return (*path[:i], *path[i + 1 :])
