"""Sparse attention of a trained model, measured on long tasks: what is safe, and what it saves."""
