"""What the reproductions share: how they are written, found, run and judged."""
