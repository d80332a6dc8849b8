"""`rocr doctor`: what this machine offers to rocr."""

from __future__ import annotations

import argparse
import importlib.util
import platform
from typing import Any

from rocr.cli.console import Console


def add_parsers(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser = subparsers.add_parser("doctor", parents=[common], help="show devices, backends and versions")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Show devices with their backends, optional packages, and versions."""
    import torch

    from rocr import ops
    from rocr.versions import versions

    devices = {"cpu": platform.processor() or platform.machine()}
    for i in range(torch.cuda.device_count()):
        devices[f"cuda:{i}"] = torch.cuda.get_device_name(i)
    backends = {device: ops.available_backends(device) for device in devices}
    extras = {name: importlib.util.find_spec(name) is not None for name in ("gguf", "pyarrow", "peft", "triton")}
    rows = [(device, name, ", ".join(backends[device])) for device, name in devices.items()]
    console.table("Devices", ("device", "name", "backends, the fastest first"), rows)
    console.table("Versions", ("package", "version"), list(versions().items()))
    console.table("Optional packages", ("package", "there"), [(n, "yes" if e else "no") for n, e in extras.items()])
    notes = _notes(backends, torch.get_num_threads())
    for note in notes:
        console.say(note)
    return {
        "devices": devices,
        "backends": backends,
        "optional": extras,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "notes": notes,
    }


def _notes(backends: dict[str, list[str]], threads: int) -> list[str]:
    notes = [f"torch uses {threads} threads, and so do the compiled kernels."]
    if "cpp" not in backends["cpu"]:
        notes.append(
            "The compiled CPU kernels (rocr._C) are not there: no C++ compiler was found when rocr was installed. "
            "rocr runs on torch, more slowly; install a C++17 compiler and reinstall rocr."
        )
    return notes
