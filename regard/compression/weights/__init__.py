"""How the codes of a weight are chosen: where its grids end, and which code each number gets."""
