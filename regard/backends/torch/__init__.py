"""Engines in plain PyTorch: traceable, differentiable, on every device."""
