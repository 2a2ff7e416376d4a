"""Deltas in the format of PyTorch PEFT, both ways: LoRA, prefix tuning and prompt tuning."""

from jdelta.saved.peft.reading import from_peft
from jdelta.saved.peft.writing import to_peft

__all__ = ["from_peft", "to_peft"]
