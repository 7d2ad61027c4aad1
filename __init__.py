"""DanceGRPO: teach an image model what you like."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import DanceGRPOExtension

    return DanceGRPOExtension()
