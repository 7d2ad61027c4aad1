"""Rewards that a server computes, and a server for the rewards of this pack."""
