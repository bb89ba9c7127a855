"""Modules: a shell for each kind of mechanism, and the parts they are built from."""
