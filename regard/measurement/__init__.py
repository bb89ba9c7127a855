"""Measurement tools: the store of results, their provenance, statistics, timings and memory."""
