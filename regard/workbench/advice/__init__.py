"""`regard advise`: which mechanism will be fastest and smallest, from short measurements."""
