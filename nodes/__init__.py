"""The nodes: they turn widgets and sockets into parts of a run description, and show results."""

from comfy_api.latest import ComfyExtension, io

from . import base_model, demo, lora, prompts, rewards, run, sampling, settings, training

MODULES = (sampling, lora, rewards, demo, base_model, training, run, settings, prompts)


class DanceGRPOExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for module in MODULES for node in module.NODES]
