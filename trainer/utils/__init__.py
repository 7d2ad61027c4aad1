"""Errors, seeds, distributed communication, files, media."""
