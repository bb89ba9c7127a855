"""`regard compare`: mechanisms trained on the same work, judged together, and one recommended."""
