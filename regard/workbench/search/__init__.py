"""Architecture search: the mechanism, heads and widths for each layer of a network, within a budget (Liu et al.,
"Neural Architecture Search on Efficient Transformers and Beyond", arXiv 2207.13955)."""
