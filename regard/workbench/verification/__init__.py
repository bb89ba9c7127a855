"""`regard verify`: properties measured on every mechanism, at the contract, in layers and in swapped models."""
