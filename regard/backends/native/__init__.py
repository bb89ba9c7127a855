"""Engines in C++ for CPUs, from one shared library with a plain C interface (see `native/`)."""
