"""The product x W^T + b at the speed of the machine, by the route that is fastest here.

Routes are chosen by a short measurement, which is remembered; the environment variable ``REGARD_LINEAR_ROUTE`` or
:func:`use_route` forces one. See :mod:`regard.backends.linear`.
"""

from __future__ import annotations

from regard.backends.linear import chosen_routes, linear, take_routes, use_route, which_route
from regard.backends.linear.routes import FrozenWeights

__all__ = ["FrozenWeights", "chosen_routes", "linear", "take_routes", "use_route", "which_route"]
