"""How the codes of a weight are chosen: where its grids end, and which number each weight goes to."""
