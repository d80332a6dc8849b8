"""Load probes from a file, a folder or a dataset."""

from __future__ import annotations

import os
from pathlib import Path

from rocr.errors import InputError
from rocr.evaluation.probes.files import read_folder, read_jsonl
from rocr.evaluation.probes.hub import PREFIX, load_hub_probes, parse_hub_name
from rocr.evaluation.probes.probe import Probe, Problems, check_all


def load_probes(path: str | os.PathLike[str], download: bool = False) -> list[Probe]:
    """Read probes from a `.jsonl` file, from a folder of RWKU or ORT, or from a Hugging Face dataset.

    A line of a `.jsonl` file is an object with `subject`, `query` and `answer`, and optionally `distractors` (a
    list), `form` ("qa", "fb", "mcp", "adversarial"), `split` ("forget", "retain"), `cloze`, and a question for
    each of "translated", "misspelt", "abbreviated", "described" (a text, or an object with `query` and `answer`).
    A folder is one target's, with `forget_level1.json` and the like, or holds such folders. A dataset is named as
    "hf:OWNER/NAME", "hf:OWNER/NAME/CONFIGURATION" or "hf:OWNER/NAME@SPLIT"; see `load_hub_probes`.

    Args:
        path: the file, folder or dataset.
        download: allow the network, for a dataset on a hub.

    Raises:
        InputError: it cannot be read, or probes are wrong; names file and line of every one, up to 50.
    """
    if str(path).startswith(PREFIX):
        return load_hub_probes(*parse_hub_name(str(path)), download=download)
    place = Path(path)
    problems = Problems()
    if place.is_dir():
        probes = read_folder(place, problems)
    elif place.suffix.lower() == ".jsonl":
        probes = read_jsonl(place, problems)
    else:
        flaw = "is neither a .jsonl file nor a folder" if place.exists() else "does not exist"
        raise InputError(f"{place} {flaw}; probes are a .jsonl file, a folder of RWKU or ORT, or hf:OWNER/NAME.")
    check_all(probes, problems, str(place))
    return probes
