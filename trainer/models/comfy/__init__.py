"""Models that a ComfyUI graph loaded: described, loaded again, run."""
