"""`regard detect-patterns`: finds out what a user's module sees, and makes the module a mechanism."""
