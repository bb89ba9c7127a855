"""Attention offloading (Lamina, arXiv 2405.01814): a language model without a cache, and attention workers without weights.

In decoding, linear layers read their weights once for a whole batch, while attention reads separate keys and values for
each sequence. So different devices may suit the two; queries, new keys and values, and outputs travel between them.

- :mod:`regard.serving.offload.reader`: the model worker, a model like any other to the scheduler; alternating
  micro-batches;
- :mod:`regard.serving.offload.pool`: the pool of attention workers; traffic; lost workers;
- :mod:`regard.serving.offload.splits`: how keys and values are split over workers;
- :mod:`regard.serving.offload.worker`: an attention worker;
- :mod:`regard.serving.offload.backends`, :mod:`regard.serving.offload.messages`: workers in the same process, in others
  or behind TCP, and the messages to them;
- :mod:`regard.serving.offload.costs`, :mod:`regard.serving.offload.simulator`: estimated cost on other devices;
- :mod:`regard.serving.offload.measure`: measurements on this machine.

Deviations from the paper: if a sequence is split, workers answer with normalised outputs and one log-sum-exp per head
instead of three numbers; the new token is merged by the worker that stores it.
"""

from __future__ import annotations

from regard.serving.offload.backends import LocalBackend, ProcessBackend, TcpBackend, create_backend
from regard.serving.offload.reader import OffloadedReader

__all__ = ["LocalBackend", "OffloadedReader", "ProcessBackend", "TcpBackend", "create_backend"]
