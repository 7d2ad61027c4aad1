"""Reward models built on Qwen2-VL."""
