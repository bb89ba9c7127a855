"""The framework of the reproductions: their definition, discovery, execution and verdicts."""
