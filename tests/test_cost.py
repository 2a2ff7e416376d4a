"""What a training step costs: small versions of what `benchmarks/handwritten.py` measures. Nothing is run here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import handwritten
import jax
import jax.extend
import pytest
import steps
from flax.traverse_util import flatten_dict
from tiers import breadth

SMALL = handwritten.Sizes(layers=2, hidden=64, vocab=100, batch=3, length=16, dropout=0.1)
# The width of BERT large: LoRA's own products are a small part of the whole there.
WIDE = handwritten.Sizes(layers=2, hidden=1024, vocab=100, batch=8, length=128)

# On a GPU XLA does not count what it hands to libraries.
counts_products = pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA counts all FLOPs on the CPU only")

each_choice = pytest.mark.parametrize("choice", breadth(handwritten.TARGETS, "query and value"))


@each_choice
@pytest.mark.slow
def test_the_handwritten_model_computes_the_same_loss_and_gradients(choice: str) -> None:
    differences = handwritten.agreement(choice, SMALL)
    assert differences["loss"] <= 1e-5
    assert differences["gradients"] <= 1e-5


@each_choice
def test_a_step_costs_what_the_handwritten_step_costs(choice: str) -> None:
    patterns, names = handwritten.TARGETS[choice]
    mine = handwritten.cost(handwritten.with_jdelta(SMALL, patterns), SMALL.inputs())
    hand = handwritten.cost(handwritten.by_hand(SMALL, names), SMALL.inputs())
    assert mine["flops"] > 0
    assert mine["temp"] > 0
    assert mine["flops"] <= handwritten.SAME_COST * hand["flops"]
    assert mine["temp"] <= handwritten.SAME_MEMORY * hand["temp"]


@each_choice
def test_no_weight_gradient_of_the_backbone_is_computed(choice: str) -> None:
    """A weight gradient is a product of the shape of a kernel, or its transpose; LoRA's own have the rank in theirs."""
    whole = handwritten.full(SMALL)
    kernels = Counter(kernel_shapes(whole.trainable))
    assert products(whole, kernels) == kernels  # so the count sees them: one for each kernel
    patterns, _ = handwritten.TARGETS[choice]
    training = handwritten.with_jdelta(SMALL, patterns)
    head = Counter(kernel_shapes({"classifier": training.trainable["classifier"]}))
    assert products(training, kernels) == head


@counts_products
@pytest.mark.parametrize("choice", ["every Dense"])
@pytest.mark.slow
def test_a_step_takes_at_most_068_of_the_flops_of_full_fine_tuning(choice: str) -> None:
    patterns, _ = handwritten.TARGETS[choice]
    mine = handwritten.cost(handwritten.with_jdelta(WIDE, patterns), WIDE.inputs())
    whole = handwritten.cost(handwritten.full(WIDE), WIDE.inputs())
    assert mine["flops"] <= handwritten.OF_FULL * whole["flops"]


def kernel_shapes(params: Any) -> list[tuple[int, ...]]:
    return [tuple(sorted(leaf.shape)) for path, leaf in flatten_dict(params).items() if path[-1] == "kernel"]


def products(training: Any, shapes: Counter[tuple[int, ...]]) -> Counter[tuple[int, ...]]:
    """How many matrix products of the loss's gradient have one of these shapes, whichever axis comes first."""
    jaxpr = steps.trace(training, SMALL.inputs(), gradient=True).jaxpr
    found = (tuple(sorted(e.outvars[0].aval.shape)) for e in equations(jaxpr) if e.primitive.name == "dot_general")
    return Counter(shape for shape in found if shape in shapes)


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, also inside nested jaxprs."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)
