"""The main job: compare, profile, verify and report."""
