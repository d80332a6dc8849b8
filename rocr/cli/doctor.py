"""`rocr doctor`: show devices, kernels and packages of this machine."""

from __future__ import annotations

import importlib.util
import platform
from typing import TYPE_CHECKING, Any

from rocr.cli.console import Console
from rocr.cli.parsing import Arguments, command
from rocr.io.boundary import calling

if TYPE_CHECKING:
    from rocr.cli.installation import Installation


@command("doctor")
def doctor(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Show devices, backends and versions."""
    import torch

    from rocr import ops
    from rocr.cli.installation import find_installation
    from rocr.io.versions import versions

    devices = {"cpu": platform.processor() or platform.machine()}
    with calling("The driver of the GPUs"):
        devices |= {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    backends = {device: ops.available_backends(device) for device in devices}
    extras = {name: importlib.util.find_spec(name) is not None for name in ("gguf", "pyarrow", "peft", "triton")}
    found = find_installation()
    console.say(f"rocr {found.version} in {found.folder}" + (", a source tree" if found.source_tree else ""))
    rows = [(device, name, ", ".join(backends[device])) for device, name in devices.items()]
    console.table("Devices", ("device", "name", "backends, fastest first"), rows)
    console.table("Versions", ("package", "version"), list(versions().items()))
    console.table("Optional packages", ("package", "installed"), [(n, "yes" if e else "no") for n, e in extras.items()])
    notes = _notes(found, torch.get_num_threads())
    for note in notes:
        console.say(note)
    return {
        "rocr": {
            "version": found.version,
            "folder": str(found.folder),
            "source_tree": found.source_tree,
            "hides": None if found.hidden is None else str(found.hidden),
            "kernels_flaw": found.kernels_flaw,
        },
        "devices": devices,
        "backends": backends,
        "optional": extras,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "notes": notes,
    }


def _notes(found: Installation, threads: int) -> list[str]:
    from rocr.io.dtypes import dtype_name
    from rocr.ops.wide_products import slow_dtypes

    notes = [f"torch uses {threads} threads, and so do the compiled kernels."]
    slow = ", ".join(sorted(dtype_name(dtype) for dtype in slow_dtypes()))
    if slow:
        notes.append(f"This CPU has no instructions for products in {slow}: rocr multiplies such weights in float32.")
    if found.hidden is not None:
        notes.append(
            f"Another rocr is installed in {found.hidden}; this one hides it, because Python searches the current "
            "folder and PYTHONPATH first."
        )
    if found.kernels_flaw is not None:
        notes.append(
            f"The compiled CPU kernels (rocr._C) are not used. {found.kernels_flaw} Without them rocr runs on torch, "
            "more slowly."
        )
    return notes
