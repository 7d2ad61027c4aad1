"""Reward models behind a server, and the server for ours."""
