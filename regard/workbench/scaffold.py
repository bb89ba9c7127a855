"""`regard new`: writes the file of a new mechanism, with a definition that raises until it is written."""

from __future__ import annotations

import keyword
from pathlib import Path

from regard.catalogue import find_mechanism
from regard.contract import Unsupported

TEMPLATE = '''"""TITLE: what it is, in a sentence.

When to pick it: for what it is better.
When not: for what it is worse.

Definition (authors, arXiv 0000.00000, equation 0):

    o_i = sum_{j<=i} w(q_i, k_j) v_j

| paper | here |
|---|---|
| Q, K, V | `q`, `k`, `v` |

Layout: (B, H, N, D). Deviations: none.
"""

from dataclasses import dataclass

from regard import Kind, Mechanism, Pattern
from regard.contract import Cost, Paper


@dataclass(frozen=True)
class Config:
    """Options, with their defaults and what they accept. TITLE has none yet; those that come need `variants` on the card,
    sets of options with which the matrix is measured too."""


def reference(call, q, k, v):
    """The definition on unpadded tokens, as the paper has it: `call.pattern`, `call.scale` and `call.config` say what is
    asked. It needs no speed; a `parallel` or `chunked` form beside it may have that, and is proven equal to it."""
    raise NotImplementedError("the definition of NAME is to be written, in `reference`")


def cost(shape, config):
    """The cost of one call: floating-point operations, numbers stored meanwhile, and, to decode, the state and a step."""
    pairs = float(shape.batch * shape.heads * shape.n * shape.m)
    return Cost(flops=2 * pairs * (shape.dim_key + shape.dim_value), memory=pairs, state=0.0, step_flops=0.0)


NO_CROSS = "it is not defined yet"

MECHANISM = Mechanism(
    name="NAME",
    kind=Kind.ATTENTION,
    summary="What it does, in one sentence.",
    paper=Paper("The title of its paper", "0000.00000", 2026),
    inputs={"q": "bhnd", "k": "bhmd", "v": "bhmv"},
    patterns=(Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
    refused={Pattern.NONCAUSAL_CROSS: NO_CROSS, Pattern.CAUSAL_CROSS: NO_CROSS},
    forms={"reference": reference},
    config=Config,
    cost=cost,
)
'''


def new_mechanism(name: str, folder: str | Path = ".") -> Path:
    """Write ``NAME.py``, a mechanism card that is complete except for its definition.

    Args:
        name: the mechanism's name: lower case, digits and underscores.
        folder: the folder to write to.

    Returns:
        The path of the file.

    Raises:
        Unsupported: if the name is invalid or taken, or the file exists or cannot be written.
    """
    if not name.isidentifier() or not name.islower() or keyword.iskeyword(name):
        plain = "".join(letter if letter.isalnum() else "_" for letter in name.lower()).strip("_")
        raise Unsupported(
            f"mechanism name {name!r}",
            supported="lower case letters, digits and underscores",
            nearest=plain if plain.isidentifier() else "my_mechanism",
        )
    if find_mechanism(name) is not None:
        raise Unsupported(
            f"a second mechanism called {name!r}", supported="names not in regard list", nearest=f"my_{name}"
        )
    path = Path(folder) / f"{name}.py"
    text = TEMPLATE.replace("NAME", name).replace("TITLE", name.replace("_", " ").capitalize())
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise Unsupported(f"{str(path)!r}, which exists", supported="a new file", nearest="another --output") from None
    except OSError as error:
        raise Unsupported(f"{str(path)!r}: it cannot be written ({error.strerror})", supported="a folder") from None
    return path
