"""The workbench: compare, advise, profile, verify and report."""
