"""What the Flax models of transformers need besides what a linen module does."""
