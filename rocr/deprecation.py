"""Old names of arguments and settings, which are accepted with a DeprecationWarning that gives the new name."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from rocr.errors import InputError

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Class = TypeVar("Class", bound=type)


@dataclass(frozen=True)
class Renamed:
    """The new name of an argument or a setting.

    Attributes:
        name: The new name.
        values: For each old value that was renamed, the new one.
    """

    name: str
    values: Mapping[str, str] = field(default_factory=dict)

    def new_value(self, old: Any) -> Any:
        """Return the new spelling of a value."""
        return self.values.get(old, old) if isinstance(old, str) else old

    def old_value(self, new: Any) -> Any:
        """Return the old spelling of a value."""
        return next((old for old, value in self.values.items() if value == new), new)


def renamed_arguments(**new_names: str) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Let a function accept old names of keyword arguments.

    Args:
        **new_names: For each old name, the new one.

    Returns:
        A decorator. The decorated function warns of an old name, and raises InputError where both names are given.
    """

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @functools.wraps(function)
        def accepting_old_names(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            for old in new_names.keys() & kwargs.keys():
                new = new_names[old]
                if new in kwargs:
                    raise InputError(
                        f"{function.__name__} was given {old!r} and {new!r}, which is its new name: give only {new!r}."
                    )
                _warn(f"argument {old!r} of {function.__name__}", Renamed(new), stacklevel=3)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return accepting_old_names

    return decorate


def renamed_fields(renamed: Mapping[str, Renamed]) -> Callable[[Class], Class]:
    """Let a dataclass accept old names of its fields as keyword arguments, and return them as attributes.

    Where both names of a field are given, the old one counts, since `dataclasses.replace` passes every field that
    it is not told to replace.

    Args:
        renamed: For each old name, the field.

    Returns:
        A decorator for the class, which warns of an old name.
    """

    def decorate(kind: Class) -> Class:
        init = kind.__init__  # type: ignore[misc]

        @functools.wraps(init)
        def accepting_old_names(self: Any, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **with_new_names(kwargs, renamed, f"field {{!r}} of {kind.__name__}"))

        kind.__init__ = accepting_old_names  # type: ignore[misc]
        for old, new in renamed.items():
            read = functools.partial(_read, kind.__name__, old, new)
            setattr(kind, old, property(read, doc=f"The old name of `{new.name}`."))
        return kind

    return decorate


def with_new_names(
    values: Mapping[str, Any], renamed: Mapping[str, Renamed], what: str | None = None
) -> dict[str, Any]:
    """Return values by name under the new names. A warning points to the caller of the calling function.

    Args:
        values: Values by name, old or new. Where both names are given, the old one counts.
        renamed: For each old name, the new one.
        what: What to call a value in the warning, with `{!r}` for its old name. None: do not warn.
    """
    found = {name: value for name, value in values.items() if name not in renamed}
    for old in (name for name in values if name in renamed):
        new = renamed[old]
        if what is not None:
            _warn(what.format(old), new, stacklevel=4)
        found[new.name] = new.new_value(values[old])
    return found


def _read(kind: str, old: str, new: Renamed, instance: Any) -> Any:
    _warn(f"field {old!r} of {kind}", new, stacklevel=3)
    return new.old_value(getattr(instance, new.name))


def _warn(what: str, new: Renamed, stacklevel: int) -> None:
    values = ", ".join(f"{value!r} for {old!r}" for old, value in new.values.items())
    with_values = f", with the values {values}" if values else ""
    warnings.warn(f"The {what} is now called {new.name!r}{with_values}.", DeprecationWarning, stacklevel=stacklevel)
