"""LN tuning: only the scales and biases of norms train (Zhao et al. 2023, arXiv 2312.11420)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from jdelta.core.edits import CallEdit, Edit
from jdelta.core.method import Method, Site
from jdelta.core.structure import ModuleInfo, Structure


@dataclasses.dataclass(frozen=True)
class LNTuningConfig(Method):
    """Arguments of LN tuning: those that every method has.

        config = jdelta.LNTuningConfig(exclude_modules=["embeddings"])
        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)

    It adds none of its own. By default it is at all norms of a model, whether they have a common name or not.
    """

    delta_type = "ln_tuning"
    default_modified_modules = ("layer_norm",)

    @classmethod
    def takes_single_modules(cls) -> bool:
        """Each norm trains by itself."""
        return True

    def place(self, site: Site, patterns: Sequence[str]) -> Iterable[Edit]:
        """All norms, where no modules are named."""
        if self.modified_modules is None and patterns:
            return self.edits(site.structure[""], site.structure)
        return super().place(site, patterns)

    def edits(self, host: ModuleInfo, structure: Structure) -> Iterable[CallEdit]:
        for info in structure.below(host.path):
            for leaf in info.params if is_norm(info) else ():
                yield CallEdit(info.path, "train", leaf=(leaf,))


def is_norm(info: ModuleInfo) -> bool:
    """Whether a module's own parameters are those of a norm: a scale, by whatever name, with or without a bias."""
    scales = info.params.keys() - {"bias"}
    if len(scales) != 1 or not scales <= {"scale", "weight", "w"}:
        return False
    (scale,) = scales
    return scale == "scale" or len(info.params[scale].shape) == 1
