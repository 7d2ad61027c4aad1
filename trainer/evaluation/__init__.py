"""Comparing models on held-out prompts: what their images look like, intervals, tables and contact sheets."""
