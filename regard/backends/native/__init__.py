"""Engines in C++ for CPUs, from a shared library with a plain C interface (see `native/`)."""
