"""`regard train` and what is done with its result: one model in a folder, looked at, reduced, asked."""
