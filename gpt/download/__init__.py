"""Download a file from an http(s) address, a wheel on the package index, or a local path."""
