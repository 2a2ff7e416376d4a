"""The methods that change weights of modules, as PEFT has them, by `peft_type`. LoRA is read and written by itself."""

from __future__ import annotations

from jdelta.methods.hira import HiraConfig
from jdelta.saved.peft.tuners.tuner import Tuner

TUNERS = {
    tuner.kind: tuner
    for tuner in (
        Tuner(
            "HIRA",
            HiraConfig,
            {"a": "hira_A", "b": "hira_B"},
            fields=("r", "hira_dropout"),
            other_fields=("init_weights", "rank_pattern"),  # PEFT 0.21 takes rank_pattern, and gives all the rank r
            conv1d=True,
        ),
    )
}
