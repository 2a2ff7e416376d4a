"""The displays of a delta: a tree in the terminal and in notebooks, and a picture of how far its modules moved."""

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

        delta.log()

    Args:
      params: the tree to show; by default `model.params`.
    """
    visualization(state).structure_graph(params)


def visualization(state: DeltaState) -> Visualization:
    """Returns the model as a tree, with what trains now, for the terminal, notebooks, the web and papers.

        delta.visualization().to_svg("bert_with_lora.svg")

    A notebook displays a delta as this tree.
    """
    return Visualization(state.backbone_model, lambda params: training.trainable_mask(state, params))


def plot(state: DeltaState, params: Tree | None = None, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draws `movement` as a heat map: kinds of module in rows, layers in columns.

        delta.plot(params, "moved.png")

    Args:
      params: as in `movement`.
      path: the file to write, if any: `.png`, `.svg` or `.pdf`.

    Returns:
      The figure, which notebooks display.

    Raises:
      ModuleNotFoundError: matplotlib is not installed; `pip install 'jdelta[plot]'`.
      RuntimeError, ValueError: as `movement`.
    """
    from jdelta.display import plotting  # here, since matplotlib is optional

    figure = plotting.heatmap(movement(state, params))
    if path is not None:
        plotting.save(figure, as_path("plot", path))
    return figure
