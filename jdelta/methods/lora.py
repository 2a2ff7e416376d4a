"""LoRA: a low-rank change of a weight (Hu et al. 2021, arXiv 2106.09685).

`W + (alpha / r) a b`, as `y + (alpha / r) · dropout(x) a b`. Numbers agree with PyTorch PEFT's for the same weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from jdelta.core.config import as_number, require_positive_int, require_positive_ints, require_probability, shown
from jdelta.core.data_starts import DataStart
from jdelta.core.edits import Edit, WeightEdit
from jdelta.core.linear import weight_edits
from jdelta.core.linear_maps import LookupMap
from jdelta.core.method import Method
from jdelta.core.placement import resolved
from jdelta.core.structure import ModuleInfo, ParameterInfo, Structure
from jdelta.core.warn import warn
from jdelta.methods import lora_data
from jdelta.methods.lora_rules import STARTS, DoraRule, LoraRule, is_start
from jdelta.trees import addressing, surgery
from jdelta.trees.surgery import Path


@dataclasses.dataclass(frozen=True)
class LoraConfig(Method):
    """Arguments of LoRA.

        config = jdelta.LoraConfig(lora_r=8, modified_modules=["query", "value"])
        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)

    Attributes:
      lora_r: the rank.
      lora_alpha: the update is scaled by `lora_alpha / lora_r`.
      lora_dropout: rate of dropout on the input of `a`.
      rank_pattern: patterns of modules to their own rank, in place of `lora_r`; the first that matches counts.
      alpha_pattern: likewise, in place of `lora_alpha`.
      freeze_a: train `b` alone (LoRA-FA, Zhang et al. 2023, arXiv 2308.03303), so that the backward pass keeps the
        thin `x a` of each module, `(…, r)`, and not its input, unless the model itself needs that.
      use_rslora: scale by `lora_alpha / sqrt(lora_r)` (Kalajdzievski 2023, arXiv 2312.03732).
      use_dora: train the norm of each output's column of the weight too, as `m`, and change its direction by `a b`
        (DoRA, Liu et al. 2024, arXiv 2402.09353). Dropout is on the input of `a` alone.
      init_lora_weights: how `a` and `b` start. `True`: `a` at U(±1/√d_in), `b` at 0; `"gaussian"`: `a` at N(0, 1/r);
        `"orthogonal"`: both random, with `a b = 0`, for even ranks; `"pissa"`, from the leading singular vectors of the
        weight (Meng et al. 2024, arXiv 2404.02948), `"pissa_niter_16"` by that many power iterations, and `"olora"`,
        from its QR factors (Büyükakyüz 2024, arXiv 2406.01775): the change then is of `a b − a₀ b₀`, with the frozen
        leaves `a0`, `b0`, so that the weight stays as it is, and the output unchanged. `False`: both random, and the
        output changes, for debugging. An embedding starts with `a` at 0 and `b` at N(0, 1).
    """

    delta_type = "lora"
    default_modified_modules = ("attn.q", "attn.v", "conv")  # conv: of ResNet and its like

    pattern_fields: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")

    lora_r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    rank_pattern: dict[str, int] | None = dataclasses.field(default=None, hash=False)
    alpha_pattern: dict[str, float] | None = dataclasses.field(default=None, hash=False)
    freeze_a: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_int("lora_r", self.lora_r)
        require_probability("lora_dropout", self.lora_dropout)
        require_positive_ints("rank_pattern", self.rank_pattern)
        if not is_start(self.init_lora_weights):
            raise ValueError(f"init_lora_weights is one of {STARTS}, got {shown(self.init_lora_weights)}.")
        odd = [rank for rank in (self.lora_r, *(self.rank_pattern or {}).values()) if rank % 2]
        if self.init_lora_weights == "orthogonal" and odd:
            raise ValueError(f"init_lora_weights='orthogonal' needs even ranks, got {odd[0]}.")

    def rank_of(self, host: str) -> int:
        """The rank at the module of this name."""
        return addressing.first_match(self.rank_pattern, host, self.lora_r)

    def alpha_of(self, host: str) -> float:
        """The `lora_alpha` at the module of this name."""
        return addressing.first_match(self.alpha_pattern, host, self.lora_alpha)

    def scale_of(self, host: str) -> float:
        """The factor of the update of the module of this name."""
        rank = self.rank_of(host)
        return self.alpha_of(host) / (math.sqrt(rank) if self.use_rslora else rank)

    def rule(self, name: str) -> LoraRule:
        kind = DoraRule if self.use_dora else LoraRule
        return kind(self.rank_of(name), self.scale_of(name), self.lora_dropout, start=self.init_lora_weights)

    def update_factors(self, leaves: Iterable[Path], lora_plus_ratio: float = 1.0) -> Mapping[Path, float]:
        """LoRA+ (Hayou et al. 2024, arXiv 2402.12354): `b` at another learning rate than `a`."""
        ratio = as_number("lora_plus_ratio", lora_plus_ratio)
        if ratio <= 0:
            raise ValueError(f"lora_plus_ratio is above 0, got {ratio:g}.")
        return {path: ratio for path in leaves if path[-1] == "b"}

    @property
    def starts_from_data(self) -> bool:
        return self.init_lora_weights in lora_data.STARTS

    def data_start(self, **options: Any) -> DataStart:
        """EVA, CorDA or LoRA-GA, by `init_lora_weights`."""
        return lora_data.data_start(self.init_lora_weights, options)

    def frozen(self, leaf: Path) -> bool:
        return leaf[-1] in (("a", "a0", "b0") if self.freeze_a else ("a0", "b0"))

    def edits(self, host: ModuleInfo, structure: Structure) -> Iterable[Edit]:
        rule = self.rule(host.name)
        try:
            edits = list(weight_edits(host, rule))
        except TypeError as error:
            raise TypeError(f"LoRA needs a linear module; {error}{_instead(host, structure)}") from error
        for edit in edits:
            if isinstance(edit.linear, LookupMap):
                if self.freeze_a:
                    raise ValueError(
                        "`a` starts at 0 in an embedding, and with freeze_a=True would stay there, so that nothing "
                        f"trains. Leave it out, with exclude_modules=[{host.name!r}], or take freeze_a=False."
                    )
                edit = dataclasses.replace(edit, rule=dataclasses.replace(rule, dropout=0.0, of_rows=True))
            _warn_of_rank(host.name, rule.rank, *edit.linear.layout(edit.shape).matrix_shape(edit.shape))
            yield edit

    def parameter_edits(self, parameter: ParameterInfo, structure: Structure) -> Iterable[Edit]:
        name = parameter.name
        rule = self.rule(name)
        edit = resolved(WeightEdit(parameter.path, rule, own=parameter.path[-1:]), structure)
        if len(edit.shape) < 2:
            raise ValueError(f"LoRA needs a matrix, and it has shape {edit.shape}.")
        _warn_of_rank(name, rule.rank, *edit.linear.layout(edit.shape).matrix_shape(edit.shape))
        yield edit


def _instead(host: ModuleInfo, structure: Structure) -> str:
    """What can be done where a module has no kernel of its own."""
    if "kernel" in host.params:
        return ""
    weighted = (
        info for info in structure.below(host.path) if any(len(leaf.shape) > 1 for leaf in info.params.values())
    )
    inside = [info.name for info in weighted if info is not host and not info.sharing]
    if inside:
        return f" Name a linear module inside it, such as {inside[0]!r}."
    ways = f" An adapter goes after any module; its parameters can train, with unfrozen_modules=[{host.name!r}]."
    if host.sharing:
        classes = ", ".join(cls.__name__ for cls in host.sharing.values())
        return (
            f" It holds the weights of modules in its scope (nn.share_scope: {classes}). Name its parameters, with "
            f"modified_parameters=[{surgery.name_of((*host.path, next(iter(host.params))))!r}] for example.{ways}"
        )
    return ways if host.params else ""


def _warn_of_rank(name: str, rank: int, d_in: int, d_out: int) -> None:
    """Such ranks are valid, and PEFT's `all-linear` makes them where a classifier has few outputs."""
    if rank > min(d_in, d_out):
        warn(
            f"LoraModel at {name}: lora_r={rank} is above the width of this module, {d_in} -> {d_out}, whose "
            f"changes have rank {min(d_in, d_out)} at most. With that in rank_pattern, less is trained and stored.",
        )
