"""Errors, files, params and the options that all commands share."""
