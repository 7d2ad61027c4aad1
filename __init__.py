"""DanceGRPO: teach an image or video model what you like."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import DanceGRPOExtension

    return DanceGRPOExtension()
