"""Versions and hardware, which results bear."""

import importlib.metadata
import os
import platform

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "webdataset", "open_clip_torch", "clean-fid")


def environment() -> dict[str, str]:
    """Versions of Python and packages, and the hardware. Loads torch."""
    import torch
    gpus = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **versions,
            "hardware": gpus or f"{os.cpu_count()} CPU cores ({platform.machine()})"}
