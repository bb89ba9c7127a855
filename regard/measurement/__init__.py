"""What every room measures with: the store of rows, their provenance, statistics and timings."""
