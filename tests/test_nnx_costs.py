"""What a step on an nnx model costs: small versions of what `benchmarks/handwritten_nnx.py` measures."""

from __future__ import annotations

import dataclasses

import handwritten_nnx
import pytest
from handwritten_nnx import CASES, EVERY, QUERY_VALUE, Case, Sizes
from steps import SAME_COST, cost
from tiers import breadth

SMALL = Sizes(layers=3, width=64, vocab=100, batch=3, length=16, rank=4)
MANY_TOKENS = dataclasses.replace(SMALL, batch=8, length=128)  # on a CPU, LoRA's update is added to the weights then


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_handwritten_model_computes_the_same_loss_and_gradients(case: Case) -> None:
    differences = handwritten_nnx.agreement(SMALL, case)
    assert differences["loss"] <= 1e-5
    assert differences["gradients"] <= 1e-5


@pytest.mark.parametrize("case", breadth(CASES, Case("LoRA", QUERY_VALUE, scanned=True)), ids=lambda case: case.name)
def test_a_step_costs_what_the_handwritten_step_costs(case: Case) -> None:
    """In a scan that says too that no layer of the backbone is copied or stacked anew: by hand, none is."""
    costs_no_more(SMALL, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.at == EVERY], ids=lambda case: case.name)
def test_a_step_on_many_tokens_costs_no_more_than_the_handwritten_step(case: Case) -> None:
    costs_no_more(MANY_TOKENS, case)


def costs_no_more(sizes: Sizes, case: Case) -> None:
    mine = cost(handwritten_nnx.with_jdelta(sizes, case), sizes.inputs())
    hand = cost(handwritten_nnx.by_hand(sizes, case), sizes.inputs())
    assert mine["flops"] > 0
    assert mine["temp"] > 0
    assert mine["flops"] <= SAME_COST * hand["flops"]
    assert mine["temp"] <= handwritten_nnx.SAME_MEMORY * hand["temp"]
