"""ComfyUI's side of the nodes: folders, runs, memory, encoding."""
