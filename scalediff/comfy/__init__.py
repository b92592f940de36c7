"""Nodes for ComfyUI. A folder in ComfyUI's `custom_nodes` that imports these two names installs them; docs/guide/comfyui.md shows how."""

from scalediff.comfy.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
