"""The command line. Every command has ``--help`` with examples; commands that a program may read have ``--json``.

A file for each command: it turns arguments into a call of the workbench, and what comes back into words.
"""

from __future__ import annotations

from regard.cli.app import app, main

__all__ = ["app", "main"]
