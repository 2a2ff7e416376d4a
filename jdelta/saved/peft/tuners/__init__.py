"""The methods that change weights of modules, as PEFT has them, by `peft_type`. LoRA is read and written by itself."""

from __future__ import annotations

from jdelta.methods.hira import HiraConfig
from jdelta.methods.miss import MissConfig
from jdelta.saved.peft.tuners.tuner import Tuner
from jdelta.saved.peft.tuners.untransposed import Untransposed

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
        Untransposed(
            "MISS",
            MissConfig,
            {"d": "miss_block"},
            fields=("r", "miss_dropout", "mini_r", "init_weights"),
            biases="MiSS_only",
        ),
    )
}
