"""Models from diffusers folders, one file per family."""
