"""The machine and the versions of what runs on it."""

import subprocess
from pathlib import Path

import torch


def version(module):
    try:
        return str(__import__(module).__version__)
    except Exception:  # whatever an import raises
        return "none"


def driver_version():
    """The driver's version, or that of CUDA it brings."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        pass
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return f"for CUDA {torch._C._cuda_getDriverVersion()}"
