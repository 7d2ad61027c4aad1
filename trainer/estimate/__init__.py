"""What a run will cost before it starts: memory by part, seconds per iteration, what to change where it is too much."""
