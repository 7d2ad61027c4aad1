"""The nodes: widgets and sockets turned into trainer objects, and nothing else."""

from comfy_api.latest import ComfyExtension, io

from . import base_model, demo, lora, prompts, rewards, sampling, settings, training, votes

MODULES = (sampling, lora, rewards, demo, base_model, training, settings, prompts, votes)


class DanceGRPOExtension(ComfyExtension):
    async def on_load(self) -> None:
        from server import PromptServer

        from .host import routes, votes_routes  # noqa: F401 - importing it adds its routes

        routes.register(PromptServer.instance.routes)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for module in MODULES for node in module.NODES]
