"""One machine as a server: a scheduler that batches continuously, and an HTTP server as OpenAI's API has it.

- :mod:`regard.serving.engine`: the scheduler, plain Python: continuous batching, prompts in chunks beside it, pages, fairness;
- :mod:`regard.serving.language`, :mod:`regard.serving.transformers`: models as it reads them;
- :mod:`regard.serving.prefixes`: what is kept of prompts for others that begin alike;
- :mod:`regard.serving.service`: the scheduler in a thread, its answers as asynchronous streams;
- :mod:`regard.serving.protocol`, :mod:`regard.serving.app`: OpenAI's requests and answers, and HTTP (the extra ``serve``);
- :mod:`regard.serving.bench`: load, and what it does to times.
"""

from __future__ import annotations

from regard.serving.engine import Busy, Engine, Event, Limits, Request
from regard.serving.language import LanguageReader
from regard.serving.opened import Opened, open_model

__all__ = ["Busy", "Engine", "Event", "LanguageReader", "Limits", "Opened", "Request", "open_model"]
