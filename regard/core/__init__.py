"""Shared utilities of engines, layers and mechanisms: padding, visibility, random draws, angles, precision, files."""
