"""Serving on one machine: a scheduler with continuous batching, and an HTTP server with OpenAI's API.

- :mod:`regard.serving.engine`: the scheduler, in plain Python: continuous batching, chunked prefill, a paged cache,
  fairness;
- :mod:`regard.serving.language`, :mod:`regard.serving.transformers`: models wrapped for the scheduler;
- :mod:`regard.serving.prefixes`: the prefix cache, for prompts that begin alike;
- :mod:`regard.serving.service`: the scheduler in a thread, with answers as asynchronous streams;
- :mod:`regard.serving.protocol`, :mod:`regard.serving.app`: OpenAI's requests and answers, and the HTTP server (the
  extra ``serve``);
- :mod:`regard.serving.bench`: a load test: latencies and throughput of a server.
"""

from __future__ import annotations

from regard.serving.engine import Busy, Engine, Event, Limits, Request
from regard.serving.language import LanguageReader
from regard.serving.opened import Opened, open_model

__all__ = ["Busy", "Engine", "Event", "LanguageReader", "Limits", "Opened", "Request", "open_model"]
