"""Fetch a file from the web, from a package on the package index, or from this machine."""
