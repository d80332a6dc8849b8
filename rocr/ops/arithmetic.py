"""A context with torch's default arithmetic, so that the state set by a caller does not change a result.

Autocast, TF32 and other reduced precisions, the default dtype and device, inference mode, gradients and the flushing
of denormal numbers affect all computations of a thread or of the process. Every public function of rocr runs inside
`plain_arithmetic`, which sets all of them and restores them at the end.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from rocr.io.signals import end_interrupted_contexts

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

AUTOCAST_DEVICES = tuple(
    filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "xla", "privateuseone"))
)
"""Device types for which this version of torch supports autocast."""

PRECISIONS = (
    *(("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn")),
    *(("mkldnn", "all"), ("mkldnn", "matmul"), ("mkldnn", "conv"), ("mkldnn", "rnn")),
)
"""Settings of the precision of float32 products in torch 2.9 and later. A setting of "none" inherits from "all"."""

REDUCED_SUMS = (
    "cublas_allow_fp16_reduced_precision_reduction",
    "cublas_allow_bf16_reduced_precision_reduction",
    "cublas_allow_fp16_accumulation",
    "cpu_allow_fp16_reduced_precision_reduction",
    "math_sdp_allow_fp16_bf16_reduction",
)
"""Flags that allow sums of 16-bit products in less than float32. Older versions of torch do not have all of them."""


class plain_arithmetic:
    """Context manager and decorator in which torch computes with its default settings, without gradients.

    Autocast, reduced precisions, inference mode, gradients and the flushing of denormals are off; the default dtype is
    float32 and the default device the CPU. All settings are restored at the end, also after an exception. The autocast
    cache of weights is cleared, since weights may have changed. Code that trains enables gradients inside the context.

    Flags of the process apply to all threads; they are set while any thread is inside the context. In a function that
    torch.compile traces, only gradients are switched off.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> None:
        try:
            _FLAGS.hold(self)
            self._set_thread()
        except BaseException:
            self.restore()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def __call__(self, function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        """Decorate a function, which must not be a generator."""

        @functools.wraps(function)
        def plain(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            if torch.compiler.is_compiling():
                with torch.no_grad():
                    return function(*args, **kwargs)
            context = plain_arithmetic()
            try:
                with context:
                    return function(*args, **kwargs)
            except BaseException as error:
                context.restore()  # a signal may arrive between the end of the function and the context's own exit
                end_interrupted_contexts(error)
                raise

        return plain

    def _set_thread(self) -> None:
        """Set the state of this thread."""
        casting = [device for device in AUTOCAST_DEVICES if torch.is_autocast_enabled(device)]
        if casting:
            self._undo.append(torch.clear_autocast_cache)
        for device in casting:
            self._undo.append(functools.partial(torch.set_autocast_enabled, device, True))
            torch.set_autocast_enabled(device, False)
        if torch.is_inference_mode_enabled():
            self._enter(torch.inference_mode(False))
        # After inference mode, since leaving it enables gradients.
        self._undo.append(functools.partial(torch._C._set_grad_enabled, torch.is_grad_enabled()))
        torch._C._set_grad_enabled(False)
        if torch._C._len_torch_function_stack() and torch.get_default_device().type != "cpu":
            self._enter(torch.device("cpu"))
        if sys.float_info.min / 2 == 0:
            self._undo.append(functools.partial(torch.set_flush_denormal, True))
            torch.set_flush_denormal(False)

    def _enter(self, context: Any) -> None:
        context.__enter__()
        self._undo.append(functools.partial(context.__exit__, None, None, None))

    def restore(self) -> None:
        """Restore the settings that the context found. A second call has no effect."""
        try:
            self._put_back()
        finally:
            # Completes a restoration that was interrupted; otherwise nothing is left to do.
            self._put_back()

    def _put_back(self) -> None:
        while self._undo:
            self._undo.pop()()
        _FLAGS.release(self)


def writing(*tensors: Tensor) -> AbstractContextManager[object]:
    """Return a context in which tensors can be changed in place: inference mode if one of them was created in it."""
    return torch.inference_mode() if any(tensor.is_inference() for tensor in tensors) else nullcontext()


@dataclass(frozen=True)
class _Flag:
    """A flag of the process.

    Attributes:
        read: Returns the value, or None if other flags override it.
        write: Sets the value.
        plain: Returns the value for full precision, given the current one.
    """

    read: Callable[[], Any]
    write: Callable[[Any], object]
    plain: Callable[[Any], Any]


class _Flags:
    """The flags of the process, shared by threads. The last holder restores the values that the first one found."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flags = _flags()
        self._holders: set[plain_arithmetic] = set()
        self._found: list[Any] | None = None

    def hold(self, holder: plain_arithmetic) -> None:
        """Set the flags until the holder releases them."""
        with self._lock:
            self._holders.add(holder)
            if self._found is None:
                self._found = [flag.read() for flag in self._flags]
            for flag in self._flags:
                value = flag.read()  # read again, since an earlier flag may have set it
                plain = flag.plain(value)
                if value != plain:
                    flag.write(plain)

    def release(self, holder: plain_arithmetic) -> None:
        """Restore the flags unless there is another holder. A second call has no effect."""
        with self._lock:
            self._holders.discard(holder)
            if self._holders or self._found is None:
                return
            for flag, value in zip(self._flags, self._found, strict=True):
                if value is not None and flag.read() != value:
                    flag.write(value)
            self._found = None


def _flags() -> tuple[_Flag, ...]:
    """Return the flags of this version of torch. A flag precedes those that are set along with it."""
    getters = torch._C
    found = [
        _Flag(torch.get_default_dtype, torch.set_default_dtype, lambda _: torch.float32),
        _Flag(_unless_mixed(torch.get_float32_matmul_precision), torch.set_float32_matmul_precision, _highest),
        _Flag(_unless_mixed(getters._get_cudnn_allow_tf32), getters._set_cudnn_allow_tf32, _off),
    ]
    if hasattr(getters, "_get_fp32_precision_getter"):
        for place in PRECISIONS:
            read = functools.partial(getters._get_fp32_precision_getter, *place)
            found.append(_Flag(read, functools.partial(getters._set_fp32_precision_setter, *place), _ieee))
    for name in REDUCED_SUMS:
        if hasattr(getters, f"_get_{name}"):
            write = getattr(getters, f"_set_{name}")
            found.append(_Flag(getattr(getters, f"_get_{name}"), functools.partial(_write_parts, write), _off))
    return tuple(found)


def _unless_mixed(read: Callable[[], Any]) -> Callable[[], Any]:
    """Let a getter return None where torch raises an error, since the flag contradicts those of `PRECISIONS`."""

    def reading() -> Any:
        try:
            return read()
        except RuntimeError:
            return None

    return reading


def _highest(value: str | None) -> str | None:
    return value and "highest"


def _ieee(value: str) -> str:
    return value if value == "none" else "ieee"


def _off(value: Any) -> Any:
    """Return False. The second element of a pair allows split sums, which does not reduce the precision; it stays."""
    if value is None:
        return None
    return (False, *value[1:]) if isinstance(value, tuple) else False


def _write_parts(write: Callable[..., object], value: Any) -> None:
    write(*value) if isinstance(value, tuple) else write(value)


_FLAGS = _Flags()  # one instance, since the flags belong to the process
