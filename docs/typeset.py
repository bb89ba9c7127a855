"""mkdocs hook: indented blocks that `equations` understands are typeset in the browser, by docs/assets/equations.js.

The page keeps the plain text, which is searched, and shown where no script runs; the TeX is stored in an attribute.
"""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from equations import Refused, equation
from markdown import Markdown
from markdown.blockprocessors import BlockProcessor
from markdown.extensions import Extension
from markdown.util import AtomicString


class Equations(BlockProcessor):
    """Handles indented blocks before the processors that turn them into code."""

    def test(self, parent: ElementTree.Element, block: str) -> bool:
        before = self.lastChild(parent)
        return block.startswith(" " * self.tab_length) and (before is None or before.tag != "pre")

    def run(self, parent: ElementTree.Element, blocks: list[str]) -> bool:
        text, rest = self.detab(blocks[0])
        code_goes_on = len(blocks) > 1 and blocks[1].startswith(" " * self.tab_length)
        if rest or code_goes_on:
            return False
        try:
            tex = equation(text)
        except Refused:
            return False
        blocks.pop(0)
        shown = ElementTree.SubElement(parent, "div", {"class": "equation", "data-tex": tex})
        ElementTree.SubElement(shown, "pre").text = AtomicString(text)
        return True


class EquationsExtension(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.parser.blockprocessors.register(Equations(md.parser), "equations", 85)  # priorities: lists 90, code 80


def on_config(config: Any) -> Any:
    config["markdown_extensions"].append(EquationsExtension())
    return config
