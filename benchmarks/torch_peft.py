"""PyTorch PEFT as a contender: the same BERT with the same numbers, in eager PyTorch with its fused attention."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import peft
import torch
from contenders import PEFT, Path, batch_of
from flax.traverse_util import unflatten_dict
from handwritten import ALPHA, Sizes
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertForSequenceClassification
from transformers.modeling_flax_pytorch_utils import load_flax_weights_in_pytorch_model
from turns import RATE, WEIGHT_DECAY, Contender


def threads() -> int:
    """The cores that this process may use: as many threads as XLA takes."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device() -> str | None:
    """Where PyTorch computes when JAX is on its default device; `None` if it cannot go there."""
    if jax.default_backend() == "cpu":
        return "cpu"
    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else None


def model_of(sizes: Sizes, values: Mapping[Path, np.ndarray]) -> Any:
    """The wrapped model. LoRA and the classifier train."""
    base = BertForSequenceClassification(sizes.config())
    backbone = unflatten_dict({path: value for path, value in values.items() if "lora" not in path})
    with contextlib.redirect_stderr(io.StringIO()):
        load_flax_weights_in_pytorch_model(base, backbone)
    lora = peft.LoraConfig(r=sizes.rank, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=["query", "value"])
    model = peft.get_peft_model(base, lora).train()
    for name, parameter in model.named_parameters():
        host, found, rest = name.removeprefix("base_model.model.").partition(".lora_")
        if found:
            factor = values[(*host.split("."), "lora", rest[0].lower())]
            parameter.data.copy_(torch.tensor(factor.T))  # PyTorch keeps (out, in)
        elif name.startswith("base_model.model.classifier"):
            parameter.requires_grad_(True)
    return model


def in_torch(sizes: Sizes, values: Mapping[Path, np.ndarray], on: str) -> Contender:
    torch.set_num_threads(threads())
    torch.backends.cuda.matmul.allow_tf32 = True  # as JAX does by default
    model = model_of(sizes, values).to(on)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=WEIGHT_DECAY)
    batch = {name: torch.tensor(value, dtype=torch.long, device=on) for name, value in batch_of(sizes).items()}
    labels = batch.pop("labels")

    def loss_of() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(**batch).logits, labels)

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss.item()  # waits

    with FlopCounterMode(display=False) as counter:
        loss_of().backward()
    figures: dict[str, Any] = {
        "matrix_flops": counter.get_total_flops(),
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "optimizer_bytes": 2 * sum(parameter.numel() * parameter.element_size() for parameter in trained),
        "attention": model.config._attn_implementation,
    }
    if on == "cuda":
        torch.cuda.reset_peak_memory_stats()
        loss_of().backward()
        figures["peak_bytes"] = torch.cuda.max_memory_allocated()
    return Contender(PEFT, step, figures)
