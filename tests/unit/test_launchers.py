"""The launchers of docs/several-processes.md, run with stand-ins for the programs of a cluster."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from rocr.cli.main import program

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/several-processes.md").read_text(encoding="utf-8")

STAND_INS = {
    "scontrol": "echo node-7; echo node-8",
    "srun": 'exec "$@"',
    "ray": 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"',
    "torchrun": 'printf "%s\\n" "$@"',
}
"""What the programs do here: torchrun prints its arguments, one a line."""

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


def script(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n```\n(.*?)\n```\n", PAGE, re.DOTALL)
    assert found, name
    return found[1]


def arguments(tmp_path: Path, name: str) -> list[str]:
    """What torchrun is called with."""
    for tool, text in STAND_INS.items():
        (tmp_path / tool).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / tool).chmod(0o755)
    given = {"SLURM_JOB_NODELIST": "node-[7-8]", "SLURM_JOB_NUM_NODES": "64", "SLURM_JOB_ID": "1234"}
    given["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-eu", "-c", script(name)], env=given, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(("name", "nodes"), [("slurm", "64"), ("ray", "1:1")])
def test_torchrun_and_rocr_take_the_command_of_a_launcher(tmp_path: Path, name: str, nodes: str) -> None:
    subprocess.run(["bash", "-n"], input=script(name), text=True, check=True)
    parsed = get_args_parser().parse_args(arguments(tmp_path, name))
    assert (parsed.nnodes, parsed.nproc_per_node) == (nodes, "8")
    assert parsed.module and parsed.training_script == "rocr"
    if name == "slurm":
        assert (parsed.rdzv_id, parsed.rdzv_backend, parsed.rdzv_endpoint) == ("1234", "c10d", "node-7:29500")
    else:
        assert parsed.standalone
    command, *options = parsed.training_script_args
    context = program.commands[command].make_context(command, options)
    assert context.params["device"] == "cuda"
    assert str(context.params["out"]) == "ordinary.safetensors"


@pytest.mark.thorough
def test_the_model_of_what_is_sent_prints_the_table_of_the_page() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benches/distributed_model.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() in PAGE
