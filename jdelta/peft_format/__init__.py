"""Deltas in the format of PyTorch PEFT, both ways: LoRA, prefix tuning and prompt tuning."""

from jdelta.peft_format.reading import from_peft
from jdelta.peft_format.writing import to_peft

__all__ = ["from_peft", "to_peft"]
