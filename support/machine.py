"""Finds out what a run ran on: versions, the processor and the memory that it took."""
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

from data.world import VERSION
from support.run import ROOT


def versions() -> dict:
    """Returns the versions that a result depends on; commit is None outside of git."""
    try:
        git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"],
                             capture_output=True, text=True)
        commit = git.stdout.strip() or None
    except OSError:                         # no git on this machine
        commit = None
    return {"python": platform.python_version(), "torch": torch.__version__,
            "world": VERSION, "commit": commit, "machine": platform.machine(),
            "threads": torch.get_num_threads()}


def hardware(device: str) -> str:
    """Returns the name of the GPU or the processor that a device is."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def peak_memory_mb(device: str) -> float | None:
    """Returns the most memory used so far, in MiB, on the GPU if the device is one.

    On the CPU it is that of the whole process, with libraries and data. On Windows it is None.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    try:
        import resource
    except ImportError:                     # Windows has no such counter
        return None
    unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10      # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
