"""Architecture search: which mechanism, heads and widths each layer of a network should have, within a budget
(Liu et al., "Neural Architecture Search on Efficient Transformers and Beyond", arXiv 2207.13955)."""
