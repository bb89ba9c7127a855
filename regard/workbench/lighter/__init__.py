"""Compression recipes measured on a model and this machine: their cost in quality, and their gain in size and time."""
