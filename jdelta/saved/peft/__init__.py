"""Deltas in the format of PyTorch PEFT, both ways: LoRA, other changes of weights, prefix tuning and prompt tuning."""

from jdelta.saved.peft.writing import to_peft

__all__ = ["to_peft"]
