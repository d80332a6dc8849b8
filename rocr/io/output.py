"""Write outputs atomically: an output gets its final name only when it is complete."""

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
_NAME_IS_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


def check_output(path: AnyPath, inputs: Iterable[AnyPath] = (), overwrite: bool = False) -> None:
    """Raise InputError unless an output can be written to a path without changing an input.

    Symlinks are followed in the path and in the inputs, also if the last part of the path does not exist yet.

    Args:
        path: The path of the output.
        inputs: The files and folders that are read. Names that are not paths of this machine, such as the ids of
            models on a hub, are ignored.
        overwrite: Whether an existing output is replaced.

    Raises:
        InputError: The path exists and `overwrite` is off, or is not UTF-8; it is an input, lies inside an input
            folder, or contains an input, the current folder or the home folder; its parent does not exist, is not a
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
            raise InputError(f"The output {path} cannot be written: {final.parent} {flaw}.")
        if not os.access(final.parent, os.W_OK | os.X_OK):
            raise InputError(f"The output {path} cannot be written: no permission to write to {final.parent}.")
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path of an input
        raise InputError(f"The output {path} cannot be examined: {error}.") from error


@contextmanager
def new_directory(path: AnyPath, inputs: Iterable[AnyPath] = (), overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, and rename it to `path` at the end, after a sync to the disk.

    On any exception, KeyboardInterrupt included, the temporary folder is removed, and a folder that `overwrite`
    would have replaced stays unchanged. A killed process leaves the temporary folder, named
    `<name>.partial-<8 hex>`.

    Args:
        path: The path of the output.
        inputs: The files and folders that are read; see `check_output`.
        overwrite: Whether an existing folder is replaced.

    Raises:
        InputError: As `check_output`; or `overwrite` would replace something that is not a folder.
        RocrError: The file system refused a step (disk full, no permission), or the name was taken in the meantime.
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
            _check_free(final)  # a rename alone replaces an empty folder, and only an empty one
            os.rename(partial, final)
            _sync(final.parent)


@contextmanager
def temporary_directory(path: AnyPath) -> Iterator[Path]:
    """Yield an empty folder beside an output, for files that are needed until the output is written.

    It is removed at the end, and named as that of `new_directory`, so that a killed process leaves the same name.

    Raises:
        RocrError: The file system refused a step.
    """
    with _unfinished(_location(path)) as folder:
        folder.mkdir()
        yield folder
        _remove(folder)


@contextmanager
def new_file(path: AnyPath, overwrite: bool = False) -> Iterator[Path]:
    """Yield the path of a file to write, and move the file to `path` at the end, after a sync to the disk.

    The file is in a temporary folder beside `path`, named `<name>.partial-<8 hex>`, because libraries first write
    under other names: safetensors would leave `.tmp…` beside `path` if the process is killed.

    Args:
        path: The path of the output.
        overwrite: Whether an existing file is replaced.

    Raises:
        InputError: As `check_output`; or `overwrite` would replace something that is not a file.
        RocrError: No file was written, the file system refused a step, or the name was taken in the meantime.
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
    """Return the absolute path with every symlink followed, except the last part, which an output replaces."""
    path = Path(path)
    if "\0" in str(path):
        raise InputError(f"The output {str(path)!r} cannot be written: its name holds a zero byte.")
    if path.name in ("", ".."):
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent), path.name)


def _check_utf8(path: AnyPath, final: Path) -> None:
    try:
        str(final).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"The output {path} cannot be written: its path is not UTF-8, and the libraries that read safetensors "
            "files and tokenizers cannot open such a path. Choose another name or folder."
        ) from None


def _check_apart(path: AnyPath, final: Path, source: AnyPath) -> None:
    real_source = Path(os.path.realpath(source))
    if not real_source.exists():
        return
    if final.exists() and final.samefile(real_source):
        raise InputError(f"The output {path} is the input {source}, which is never changed; choose another name.")
    if _within(final, real_source):
        raise InputError(
            f"The output {path} lies inside the input {source}, which is never changed; choose another folder."
        )
    if _within(real_source, final) or _within(_location(source), final):
        raise InputError(f"The output {path} contains the input {source}; choose another folder.")


def _check_replaceable(path: AnyPath, final: Path, overwrite: bool) -> None:
    if not overwrite:
        raise InputError(f"The output {path} exists; choose another name, or pass --overwrite to replace it.")
    for place, kind in ((os.getcwd(), "the current folder"), (os.path.expanduser("~"), "the home folder")):
        if _within(Path(os.path.realpath(place)), final):
            raise InputError(f"The output {path} is or contains {kind}, which is never replaced; choose another name.")


def _within(path: Path, folder: Path) -> bool:
    """Return whether a resolved path is the folder or below it, by comparing the files instead of their names."""
    if not folder.exists():
        return False
    return any(parent.exists() and parent.samefile(folder) for parent in (path, *path.parents))


@contextmanager
def _unfinished(final: Path) -> Iterator[Path]:
    """Yield an unused path beside `final`; on an exception remove it, and turn an OSError about it into RocrError."""
    partial = _sibling(final, "partial")
    try:
        yield partial
    except BaseException as error:
        _remove(partial)
        if isinstance(error, OSError) and _is_about(error, final):
            raise RocrError(_message(error, final)) from error
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
    """Return whether an error concerns the output, and not a file that the code in the context reads."""
    if not isinstance(error.filename, str):
        return error.errno in _DISK_ERRORS
    ours = (f"{final}.partial-", f"{final}.old-")
    return error.filename.startswith(ours) or error.filename in (str(final), str(final.parent))


def _message(error: OSError, final: Path) -> str:
    if error.errno in _NAME_IS_TAKEN and os.path.lexists(final):
        return f"Another process wrote the output {final} in the meantime; it is unchanged. Choose another name."
    return f"The output {final} could not be written, and its parts are removed: {error.strerror or error}."


def _check_free(final: Path) -> None:
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
            f"The output {final} is complete, but its old state could not be removed; delete {aside}: {reason}."
        ) from error


def _link_file(partial: Path, final: Path) -> None:
    """Move a file to an unused name. A hard link is used because, unlike a rename, it never replaces a file."""
    try:
        os.link(partial, final)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        _check_free(final)
        os.rename(partial, final)


def _give_ordinary_modes(folder: Path) -> None:
    """Give new files the permissions of the umask: safetensors makes them readable by their owner only.

    The umask is taken from the folder, which `mkdir` created. A file with several names is a hard link to an input
    and is not changed.
    """
    mode = folder.stat().st_mode & 0o666
    for parent, _, names in os.walk(folder, onerror=_raise):
        for path in (Path(parent, name) for name in names):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_mode & 0o777 != mode:
                path.chmod(mode)


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder, topdown=False, onerror=_raise):  # by default, walk ignores errors
        for path in (Path(parent, name) for name in names):
            if path.is_file() and not path.is_symlink():
                _sync(path)
        _sync(Path(parent))


def _raise(error: OSError) -> None:
    raise error


def _sync(path: Path) -> None:
    """Write the bytes of a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: the file system cannot sync folders
            raise
    finally:
        os.close(descriptor)
