"""Attention offloading (Lamina, arXiv 2405.01814): a language model without a cache, and attention workers without weights.

In decoding, linear layers read their weights once for a whole batch, attention reads the keys and values of each sequence for
it alone. So the two may be worth different devices; between them go queries, new keys and values, and outputs.

- :mod:`regard.serving.offload.reader`: the model worker, which the scheduler reads as any model; micro-batches in turn;
- :mod:`regard.serving.offload.pool`: its attention workers together; traffic; what was lost;
- :mod:`regard.serving.offload.splits`: which worker has which keys and values;
- :mod:`regard.serving.offload.worker`: an attention worker;
- :mod:`regard.serving.offload.backends`, :mod:`regard.serving.offload.messages`: where workers are, and how to reach them;
- :mod:`regard.serving.offload.costs`, :mod:`regard.serving.offload.simulator`: what it costs on devices that are not here;
- :mod:`regard.serving.offload.measure`: what it takes on this machine.

Deviations from the paper: workers answer with normalised outputs and one log-sum-exp a head where a sequence is split, instead
of three numbers; the new token is merged by the worker that keeps it.
"""

from __future__ import annotations

from regard.serving.offload.backends import LocalBackend, ProcessBackend, TcpBackend, create_backend
from regard.serving.offload.reader import OffloadedReader

__all__ = ["LocalBackend", "OffloadedReader", "ProcessBackend", "TcpBackend", "create_backend"]
