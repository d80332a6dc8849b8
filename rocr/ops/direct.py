"""Kernels called past torch's dispatcher, where nothing listens there: its way costs more than a small launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from rocr.ops.checks import is_plain


def call_directly(
    operator: Callable[..., Any], function: Callable[..., None], written: list[Tensor], *rest: Any
) -> None:
    """Call the function that an operator of torch was made from, or that operator where the call is to be traced.

    Args:
        operator: torch.library.custom_op of the function.
        function: changes the tensors of its first argument in place.
        written: that argument.
        rest: the others.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or not all(map(is_plain, written)):
        operator(written, *rest)
        return
    function(written, *rest)
    for tensor in written:
        # As the operator does: autograd is to know that what it saved has changed.
        torch.autograd.graph.increment_version(tensor)
