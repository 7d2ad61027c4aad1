"""Reward models built on CLIP."""
