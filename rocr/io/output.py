"""Outputs that appear under their final name only when they are complete, whatever stops the process."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rocr.errors import InputError, RocrError

AnyPath = str | os.PathLike[str]
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


def check_output(path: AnyPath, inputs: Iterable[AnyPath] = (), overwrite: bool = False) -> None:
    """Make sure that an output can be written to a path and that no input is harmed by it.

    Symlinks are followed on both sides, also where the last part of the path does not exist yet. Inputs that
    are no paths of this machine (such as the ids of models on a hub) are left out.

    Raises:
        InputError: the path exists and `overwrite` is off, or is not UTF-8; it is an input, lies inside an input
            folder, or contains an input, the current folder or the home folder; its parent does not exist, is no
            folder, or cannot be written to.
    """
    try:
        final = _location(path)
        _check_utf8(path, final)
        for source in inputs:
            _check_apart(path, final, source)
        if os.path.lexists(final):
            _check_replaceable(path, final, overwrite)
        elif not final.parent.is_dir():
            flaw = "is not a folder" if final.parent.exists() else "does not exist"
            raise InputError(f"The output {path} cannot be made: {final.parent} {flaw}.")
        if not os.access(final.parent, os.W_OK | os.X_OK):
            raise InputError(f"The output {path} cannot be made: no permission to write to {final.parent}.")
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path of an input
        raise InputError(f"The output {path} cannot be examined: {error}.") from error


@contextmanager
def new_directory(path: AnyPath, inputs: Iterable[AnyPath] = (), overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that takes this name when the context ends and all is on disk.

    On any exception (KeyboardInterrupt too) the temporary folder is removed, and what `overwrite` would have
    replaced is as it was. A killed process leaves the temporary folder, named `<name>.partial-<8 hex>`.

    Raises:
        InputError: as `check_output`; or `overwrite` would replace something that is not a folder.
        RocrError: the file system refused a step (disk full, no permission), or the name was taken meanwhile.
    """
    check_output(path, inputs, overwrite)
    final = _location(path)
    if os.path.lexists(final) and (final.is_symlink() or not final.is_dir()):
        raise InputError(f"The output {path} would replace something that is not a folder; remove it first.")
    with _unfinished(final) as partial:
        partial.mkdir()
        yield partial
        _give_ordinary_modes(partial)
        _sync_tree(partial)
        if overwrite:
            _replace_directory(partial, final)
        else:
            _refuse_taken(final)  # a rename by itself replaces an empty folder, and only an empty one
            os.rename(partial, final)
            _sync(final.parent)


@contextmanager
def new_file(path: AnyPath, overwrite: bool = False) -> Iterator[Path]:
    """Yield the name of a file, yet to be written, that takes the name `path` likewise.

    It lies in a folder of its own beside `path`, named `<name>.partial-<8 hex>`, since libraries write under names of
    their own choice first: safetensors would leave `.tmp…` beside `path` where the process is killed.

    Raises:
        InputError: as `check_output`; or `overwrite` would replace something that is not a file.
        RocrError: nothing was written, the file system refused a step, or the name was taken meanwhile.
    """
    check_output(path, overwrite=overwrite)
    final = _location(path)
    if os.path.lexists(final) and not final.is_file():
        raise InputError(f"The output {path} would replace something that is not a file; remove it first.")
    with _unfinished(final) as folder:
        folder.mkdir()
        partial = folder / final.name
        yield partial
        if not partial.is_file():
            raise RocrError(f"Nothing was written for the output {path}.")
        _give_ordinary_modes(folder)
        _sync(partial)
        if overwrite:
            os.replace(partial, final)
        else:
            _link_file(partial, final)
        _sync(final.parent)
        shutil.rmtree(folder)


def _location(path: AnyPath) -> Path:
    """Return the absolute path with every symlink followed but the last part, which an output replaces."""
    path = Path(path)
    if "\0" in str(path):
        raise InputError(f"The output {str(path)!r} cannot be made: its name holds a zero byte.")
    if path.name in ("", ".."):
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent), path.name)


def _check_utf8(path: AnyPath, final: Path) -> None:
    try:
        str(final).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"The output {path} cannot be made: its path is not UTF-8, and the libraries that read safetensors files "
            "and tokenizers open no such path. Choose another name or folder."
        ) from None


def _check_apart(path: AnyPath, final: Path, source: AnyPath) -> None:
    real_source = Path(os.path.realpath(source))
    if not real_source.exists():
        return
    if final.exists() and final.samefile(real_source):
        raise InputError(f"The output {path} is the input {source}, which is never written to.")
    if _within(final, real_source):
        raise InputError(f"The output {path} lies inside the input {source}, which is never written to.")
    if _within(real_source, final) or _within(_location(source), final):
        raise InputError(f"The output {path} contains the input {source}; choose another folder.")


def _check_replaceable(path: AnyPath, final: Path, overwrite: bool) -> None:
    if not overwrite:
        raise InputError(f"The output {path} exists; choose another name, or pass --overwrite to replace it.")
    for place, kind in ((os.getcwd(), "the current folder"), (os.path.expanduser("~"), "the home folder")):
        if _within(Path(os.path.realpath(place)), final):
            raise InputError(f"The output {path} is or contains {kind}, which is never replaced.")


def _within(path: Path, folder: Path) -> bool:
    """Say whether a resolved path is the folder or below it, by what the names lead to and not by spelling."""
    if not folder.exists():
        return False
    return any(parent.exists() and parent.samefile(folder) for parent in (path, *path.parents))


@contextmanager
def _unfinished(final: Path) -> Iterator[Path]:
    """Yield an unused name beside `final`; on an exception remove what has that name, and say so in a sentence."""
    partial = _sibling(final, "partial")
    try:
        yield partial
    except BaseException as error:
        _remove(partial)
        if isinstance(error, OSError) and _is_about(error, final):
            raise RocrError(_sentence(error, final)) from error
        raise


def _sibling(final: Path, kind: str) -> Path:
    return final.with_name(f"{final.name}.{kind}-{secrets.token_hex(4)}")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _is_about(error: OSError, final: Path) -> bool:
    """Say whether an error concerns the output, and not a file that the code in the context reads."""
    if not isinstance(error.filename, str):
        return error.errno in _DISK
    ours = (f"{final}.partial-", f"{final}.old-")
    return error.filename.startswith(ours) or error.filename in (str(final), str(final.parent))


def _sentence(error: OSError, final: Path) -> str:
    if error.errno in _TAKEN and os.path.lexists(final):
        return f"The output {final} was made by somebody else meanwhile and is left as it is; choose another name."
    return f"The output {final} could not be written, and nothing is left of it: {error.strerror or error}."


def _refuse_taken(final: Path) -> None:
    if os.path.lexists(final):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final))


def _replace_directory(partial: Path, final: Path) -> None:
    aside = _sibling(final, "old")
    try:
        with suppress(FileNotFoundError):
            os.rename(final, aside)
        os.rename(partial, final)
        _sync(final.parent)
    finally:
        if os.path.lexists(partial):
            if os.path.lexists(aside) and not os.path.lexists(final):
                os.rename(aside, final)
        elif os.path.lexists(aside):
            _remove_replaced(aside, final)


def _remove_replaced(aside: Path, final: Path) -> None:
    try:
        shutil.rmtree(aside)
    except OSError as error:
        reason = error.strerror or error
        raise RocrError(
            f"The output {final} is complete, but {aside}, its old state, is not removed: {reason}."
        ) from error


def _link_file(partial: Path, final: Path) -> None:
    """Rename a file to a name that nothing bears: a link, unlike a rename, never replaces."""
    try:
        os.link(partial, final)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        _refuse_taken(final)
        os.rename(partial, final)


def _give_ordinary_modes(folder: Path) -> None:
    """Give new files the permissions that the umask gives: safetensors makes them readable to their owner alone.

    The folder was made by `mkdir`, so that its own permissions tell the umask. A file with several names is a hard
    link to an input, and stays as it is.
    """
    mode = folder.stat().st_mode & 0o666
    for parent, _, names in os.walk(folder, onerror=_raise):
        for path in (Path(parent, name) for name in names):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_mode & 0o777 != mode:
                path.chmod(mode)


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder, topdown=False, onerror=_raise):  # by default, walk skips on errors
        for path in (Path(parent, name) for name in names):
            if path.is_file() and not path.is_symlink():
                _sync(path)
        _sync(Path(parent))


def _raise(error: OSError) -> None:
    raise error


def _sync(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot sync folders
            raise
    finally:
        os.close(descriptor)
