"""`regard compare`: train mechanisms on the same work, judge them together, and recommend one."""
