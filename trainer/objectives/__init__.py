"""How scored samples become a gradient."""
