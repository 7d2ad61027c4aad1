"""Prompt sets and their text conditioning."""
