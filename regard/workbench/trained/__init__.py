"""`regard train` and the uses of its result, one model in a folder: explain it, reduce its tokens, query it."""
