"""regard: the attention workbench for PyTorch.

Every mechanism is a card in the catalogue, a function in :mod:`regard.functional` and a layer from
:func:`regard.create_layer`; all share one contract (:mod:`regard.contract`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from regard.backends import watch_backends
from regard.catalogue import get_mechanism, list_mechanisms, load_plugin, register, which_backend
from regard.contract import (
    BlockMask,
    Context,
    Kind,
    Mask,
    Mechanism,
    Pattern,
    Result,
    Role,
    State,
    Unsupported,
)
from regard.create import create_layer
from regard.version import VERSION

if TYPE_CHECKING:  # names that are imported only on access, for editors and type checkers
    from regard import distributed as distributed
    from regard import functional as functional
    from regard import models as models
    from regard.compression.compress import compress as compress
    from regard.integrations.swap import swap as swap
    from regard.layers.linear import accelerate as accelerate
    from regard.workbench.advice.advise import advise as advise
    from regard.workbench.comparison.compare import compare as compare
    from regard.workbench.profile import profile as profile
    from regard.workbench.verification.verify import verify as verify

__version__ = VERSION

_LAZY = {
    "accelerate": "regard.layers.linear",
    "advise": "regard.workbench.advice.advise",
    "compare": "regard.workbench.comparison.compare",
    "compress": "regard.compression.compress",
    "distributed": "regard.distributed",
    "functional": "regard.functional",
    "models": "regard.models",
    "profile": "regard.workbench.profile",
    "retrofit": "regard.retrofit",
    "swap": "regard.integrations",
    "unswap": "regard.integrations",
    "verify": "regard.workbench.verification.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'regard' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    return getattr(module, name, module)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])


__all__ = [
    "BlockMask",
    "Context",
    "Kind",
    "Mask",
    "Mechanism",
    "Pattern",
    "Result",
    "Role",
    "State",
    "Unsupported",
    "create_layer",
    "get_mechanism",
    "list_mechanisms",
    "load_plugin",
    "register",
    "watch_backends",
    "which_backend",
]
