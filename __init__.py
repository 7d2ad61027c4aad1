"""DanceGRPO: teach an image model what you like."""
