"""The package version, the single source for all of its parts."""

VERSION = "0.1.0"
