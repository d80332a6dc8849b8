"""Probes from a Hugging Face dataset, or from a folder in its layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rocr.errors import InputError
from rocr.evaluation.probes.files import FIELDS, FOLDER_FILE, FORM_OF_LEVEL, SPLIT_OF_FILE, read_probe
from rocr.evaluation.probes.probe import Probe, Problems, check_all
from rocr.io.boundary import calling
from rocr.model.hub import load_dataset

PREFIX = "hf:"


def load_hub_probes(
    name: str, configuration: str | None = None, split: str | None = None, download: bool = False
) -> list[Probe]:
    """Read probes from a dataset with the columns of a `.jsonl` file; others are left out.

    Args:
        name: a dataset of a hub, as "owner/name", or a folder with its files.
        configuration: of the dataset. One named as a file of RWKU ("forget_level2") says what form and split its
            rows are of, where they have no such columns.
        split: of the dataset; None: its only one, else "test".
        download: allow the network; without it, what was downloaded before is used.

    Raises:
        InputError: the package datasets is missing, the dataset cannot be had, or rows are wrong; names the number
            of every one, from 1, up to 50.
    """
    rows = _rows(name, configuration, split, download)
    match = FOLDER_FILE.fullmatch(f"{configuration}.json")
    defaults: dict[str, Any] = {}
    if match is not None and match[2] in FORM_OF_LEVEL:
        defaults = {"form": FORM_OF_LEVEL[match[2]], "split": SPLIT_OF_FILE[match[1]]}
    shown = PREFIX + name + (f"/{configuration}" if configuration else "")
    problems, probes = Problems(), []
    with calling(f"The reader of the dataset {shown}"):
        for number, row in enumerate(rows, start=1):
            fields = {key: value for key, value in row.items() if key in FIELDS and value is not None}
            probe = read_probe({**defaults, **fields}, f"{shown}, row {number}", problems)
            if probe is not None:
                probes.append(probe)
    check_all(probes, problems, shown)
    return probes


def parse_hub_name(text: str) -> tuple[str, str | None, str | None]:
    """Dataset, configuration and split of "hf:OWNER/NAME", "hf:OWNER/NAME/CONFIGURATION", each with "@SPLIT" or not.

    Raises:
        InputError: it names no dataset.
    """
    place, _, split = text.removeprefix(PREFIX).partition("@")
    if place and Path(place).is_dir():
        return place, None, split or None
    owner, _, rest = place.partition("/")
    name, _, configuration = rest.partition("/")
    if not owner or not name:
        raise InputError(f"{text!r} names no dataset; write hf:OWNER/NAME, hf:OWNER/NAME/CONFIGURATION or …@SPLIT.")
    return f"{owner}/{name}", configuration or None, split or None


def _rows(name: str, configuration: str | None, split: str | None, download: bool) -> Iterable[Mapping[str, Any]]:
    found = load_dataset(name, configuration, download)
    chosen = split or (next(iter(found)) if len(found) == 1 else "test")
    if chosen not in found:
        raise InputError(f"The dataset {name} has no split {chosen!r}; it has {', '.join(found)}.")
    rows: Iterable[Mapping[str, Any]] = found[chosen]
    return rows
