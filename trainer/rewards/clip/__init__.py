"""Rewards on CLIP."""
