"""Sparse attention in a trained model, measured on long tasks: how much is safe, and what it saves."""
