"""How a delta shows itself: as a tree in the terminal and in notebooks, and as a picture of what moved."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from jdelta.core import training
from jdelta.core.config import as_path
from jdelta.core.state import DeltaState
from jdelta.display.movement import movement
from jdelta.display.visualization import Visualization
from jdelta.trees.surgery import Tree

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def log(state: DeltaState, params: Tree | None = None) -> None:
    """Prints the model as a coloured tree, and how much of it trains.

    Args:
      params: the tree to show; by default `model.params`.
    """
    visualization(state).structure_graph(params)


def visualization(state: DeltaState) -> Visualization:
    """The model as a tree, with what trains now, for the terminal, notebooks, the web and papers.

        delta.visualization().to_svg("bert_with_lora.svg")

    In a notebook, a delta shows itself as this tree.
    """
    return Visualization(state.backbone_model, lambda params: training.trainable_mask(state, params))


def plot(state: DeltaState, params: Tree | None = None, path: str | os.PathLike[str] | None = None) -> Figure:
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

    figure = plotting.heatmap(movement(state, params))
    if path is not None:
        plotting.save(figure, as_path("plot", path))
    return figure
