"""New attention for existing models: `regard.retrofit`, and its parts.

::

    made = regard.retrofit("smollm2/", "gated_linear", keep_layers="auto:22", data="corpus.txt", budget="2M tokens",
                           output="hybrid/")
    print(made.recommendation)

The folder loads through ``AutoModelForCausalLM.from_pretrained`` after ``import regard.integrations.transformers``;
those of encoders and of timm's vision transformers likewise, as their README says. The results page
is written by :func:`regard.workbench.reports.retrofit_report.write_retrofit_report`, as the command does.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from regard.retrofit.hosts import open_host
from regard.retrofit.run import Retrofit, read_record, retrofit
from regard.retrofit.settings import RetrofitSettings
from regard.retrofit.stage import Progress


class _Room(ModuleType):
    """This package, which is also callable: `regard.retrofit(...)`."""

    def __call__(self, *args: Any, **options: Any) -> Retrofit:
        return retrofit(*args, **options)


sys.modules[__name__].__class__ = _Room

__all__ = ["Progress", "Retrofit", "RetrofitSettings", "open_host", "read_record", "retrofit"]
