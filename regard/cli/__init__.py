"""The command line. Every command has ``--help`` with examples; commands whose output programs may read have
``--json``.

Each command has a file of its own, which turns arguments into a call of the workbench, and the result into words.
"""

from __future__ import annotations

from regard.cli.app import app, main

__all__ = ["app", "main"]
