"""Common names, such as attn.q, for the modules of many families of models."""
