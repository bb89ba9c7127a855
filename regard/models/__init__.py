"""Models with any mechanism in any layer."""
