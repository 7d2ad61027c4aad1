"""The embedded model: a small text-to-image model of a world of coloured shapes, its prompts and its checker."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""Folder of the embedded model in diffusers' StableDiffusion3Pipeline layout."""
