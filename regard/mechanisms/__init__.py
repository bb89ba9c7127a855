"""One module per mechanism. To add a mechanism, add one file here that defines ``MECHANISM``; see CONTRIBUTING.md."""
