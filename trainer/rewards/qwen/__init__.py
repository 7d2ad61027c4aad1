"""Rewards on Qwen2-VL."""
