"""Layers as `nn.Module`: a shell for each kind of mechanism, and the parts that shells are built from."""
