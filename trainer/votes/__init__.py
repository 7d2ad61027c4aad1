"""Votes on pairs of images: the store, the fit, and which pair to show next."""
