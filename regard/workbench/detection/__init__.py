"""`regard detect-patterns`: what a module of somebody's own sees, and the module as a mechanism."""
