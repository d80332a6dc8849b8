"""Write an edited model as a folder: by its edited tensors where it came from one, else as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from rocr.apply import down_projections
from rocr.architectures import find_architecture
from rocr.models import LoadedModel, save_model, saved_bytes
from rocr.partial import stored_name
from rocr.rewrite import rewrite_model
from rocr.shards import WeightFiles, find_weight_files
from rocr.space import check_space

if TYPE_CHECKING:
    from rocr.edit import Edit


def save_edited(loaded: LoadedModel, edit: Edit, folder: Path) -> list[str]:
    """Write a model whose down-projections were edited, or given back, into a folder that exists.

    Returns:
        Names of the weight files that are the input's own by hard links; their bytes were not read.

    Raises:
        RocrError: the disk is too small, or refuses.
    """
    source = loaded.source
    files = None if source.folder is None or source.gguf else find_weight_files(source.folder)
    changes = None if files is None else _changes(files, loaded, edit)
    if files is None or changes is None:
        save_model(loaded, folder)
        return []
    rewritten = rewrite_model(files, changes, folder)
    kept = [name for name in files.files if name not in rewritten]
    return [name for name in kept if (folder / name).samefile(files.folder / name)]


def check_room(loaded: LoadedModel, layers: Sequence[int], out: Path) -> None:
    """Refuse a disk on which the model will not find room once it is edited.

    Raises:
        InputError: says how much is missing.
    """
    source, architecture = loaded.source, find_architecture(loaded.model)
    files = None if source.folder is None or source.gguf else find_weight_files(source.folder)
    needed = saved_bytes(loaded.model)
    if files is not None:
        names = [
            stored_name(files, architecture, architecture.down_projection(layer).parameter_name) for layer in layers
        ]
        shards = {files.file_of[name] for name in names if name in files.file_of}
        needed = min(needed, sum((files.folder / shard).stat().st_size for shard in shards)) if shards else needed
    check_space(out, needed)


def _changes(files: WeightFiles, loaded: LoadedModel, edit: Edit) -> dict[str, Tensor] | None:
    """The edited tensors by their names in the files; None where they are stored otherwise than they are held."""
    architecture = find_architecture(loaded.model)
    changes = {}
    for projection in down_projections(architecture, edit.updates):
        name, values = stored_name(files, architecture, projection.parameter_name), projection.parameter.data
        if name not in files.file_of:
            return None
        place = files.find(name)
        if place.dtype != values.dtype or place.shape != tuple(values.shape):
            return None
        changes[name] = values
    return changes
