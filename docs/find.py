"""mkdocs hook: lets the site search answer questions in whole sentences.

docs/assets/search.js is added to the theme's search worker. If node is installed, the questions of docs/questions.txt are
put to the built site; a question whose answer is not among the first two hits is a warning, or an error with ``--strict``.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

DOCS = Path(__file__).parent
LOG = logging.getLogger("mkdocs.hooks.find")


def on_post_build(config: Any) -> None:
    site = Path(config["site_dir"])
    workers = list((site / "assets/javascripts/workers").glob("search.*.js"))
    if not workers:
        raise PluginError("the theme has no search worker: docs/find.py looks in the wrong place")
    for worker in workers:
        worker.write_text((DOCS / "assets/search.js").read_text() + worker.read_text())
    node = shutil.which("node")
    if node is None:
        LOG.info("There is no node: the search is not tried.")
        return
    questions = dict(line.split(" = ") for line in (DOCS / "questions.txt").read_text().splitlines())
    command = [node, str(DOCS / "find.mjs"), str(site)]
    asked = subprocess.run(command, input=json.dumps(list(questions)), capture_output=True, text=True, check=True)
    for (question, wanted), found in zip(questions.items(), json.loads(asked.stdout), strict=True):
        if wanted not in found:
            LOG.warning("%r is answered by %s, but the search finds %s", question, wanted, " and ".join(found))
