"""What all studies share: how one is written, found and shown."""
