"""The nodes: widgets and sockets turned into trainer objects, and nothing else."""

from comfy_api.latest import ComfyExtension, io

from . import base_model, demo, lora, prompts, rewards, sampling, settings, training

MODULES = (sampling, lora, rewards, demo, base_model, training, settings, prompts)


class DanceGRPOExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for module in MODULES for node in module.NODES]
