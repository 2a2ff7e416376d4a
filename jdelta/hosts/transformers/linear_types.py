"""The linear modules of transformers that are none of flax."""

from jdelta.core import linear


def install() -> None:
    """Registers them, without importing transformers."""
    linear.register_by_name(
        "transformers.models.gpt2.modeling_flax_gpt2",
        "FlaxConv1D",
        transposed=True,
        plain={"features", "use_bias", "dtype", "precision"},
    )
