"""The nodes: they turn widgets and sockets into parts of a run description, and show results."""

from comfy_api.latest import ComfyExtension, io

from . import (
    base_model,
    compare,
    demo,
    lora,
    objective,
    prompts,
    rewards,
    run,
    sampling,
    settings,
    training,
    votes,
)

MODULES = (sampling, lora, rewards, demo, base_model, training, compare, run, settings, objective, prompts, votes)


class DanceGRPOExtension(ComfyExtension):
    async def on_load(self) -> None:
        from server import PromptServer

        from .host.routes import Routes
        from .host.run_routes import add_run_routes
        from .host.vote_routes import add_vote_routes

        routes = Routes(PromptServer.instance.routes)
        add_run_routes(routes)
        add_vote_routes(routes)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for module in MODULES for node in module.NODES]
