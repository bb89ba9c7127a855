"""One module a mechanism. Adding a mechanism = adding one file here that defines ``MECHANISM``; see CONTRIBUTING.md."""
