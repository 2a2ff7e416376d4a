"""The most that an accelerator can do, for shares of it."""

from __future__ import annotations

import jax

# TFLOP/s of dense products of float32 at JAX's default precision, from the makers' data sheets: TensorFloat-32 on a
# GPU, bfloat16 passes on a TPU. A name is the beginning of `device_kind`; longer names first.
PEAKS = {
    "NVIDIA H100": 494.0,
    "NVIDIA H200": 494.0,
    "NVIDIA A100": 156.0,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,  # v5p
    "TPU v6": 918.0,  # v6e
}


def peak_of(device: jax.Device) -> float | None:
    """TFLOP/s; `None` for a device that is not in the table."""
    return next((peak for name, peak in PEAKS.items() if device.device_kind.startswith(name)), None)
