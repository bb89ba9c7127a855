"""Tools of measurement: the store of rows, their provenance, statistics and timings."""
