"""The framework of the reproductions: how they are written, found, run and judged."""
