"""Recipes of compression measured on a model: what each costs in quality, and what it gives in size and time, here."""
