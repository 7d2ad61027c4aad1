"""Filled in by what follows."""

NODES = []
