"""The folder of a run, and what is read from it again."""

from typing import Literal

Form = Literal["diffusers", "comfyui", "peft", "merged"]  # of an exported adapter
