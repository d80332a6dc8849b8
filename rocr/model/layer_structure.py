"""Find the matrix of a decoder layer that is edited by the structure of the layer, where no child is named as an MLP.

A matrix of a layer reads the residual stream if it has hidden size inputs, and writes to it if it has hidden size
outputs. An MLP is a writer whose inputs come from one or two readers only. A mixer, such as attention or a state space,
has more matrices, or convolutions. The matrix that is edited is the last writer that is the end of an MLP, or, in a
layer without an MLP, the last writer, which is the output projection of the mixer.

Only names of modules, sizes and the order of registration are read, so that a model on the meta device has the same
result. Whether a change of the matrix's output arrives in the residual stream is measured later (`rocr.model.gains`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from rocr.errors import InputError
from rocr.model.matrix import Matrix, check_dense, is_matrix
from rocr.model.wrappers import own_modules, unwrapped

MIXTURE_PARTS = ("experts", "router")
"""Children and parameters of a mixture of experts."""


@dataclass(frozen=True)
class LayerStructure:
    """The matrices of a decoder layer.

    Attributes:
        name: The name of the layer in the model's state dict.
        layer: The layer, without wrappers.
        hidden_size: The number of features of the residual stream.
    """

    name: str
    layer: nn.Module
    hidden_size: int

    def matrix(self) -> Matrix:
        """Return the matrix that is edited.

        Raises:
            InputError: The layer has no matrix that writes to the residual stream, its weight is not dense, or the
                layer is a mixture of experts.
        """
        mixture = self.mixture()
        mlps = self.mlps()
        if mixture is not None and len(self.listed_mlps()) < 2:
            raise InputError(
                f"{self.name}.{mixture} is a mixture of experts, which has no single dense down-projection. rocr edits "
                "dense layers."
            )
        writers = mlps or self._writers
        if not writers:
            children = ", ".join(name for name, _ in self.layer.named_children()) or "none"
            raise InputError(
                f"{self.name} has no MLP and no other matrix that returns the hidden size {self.hidden_size}: its "
                f"children are {children}. rocr edits decoder layers with a dense MLP or a mixer that ends in a matrix."
            )
        name = writers[-1]
        found = self._matrices[name]
        matrix = Matrix(f"{self.name}.{name}", found.module, found.outer)
        check_dense(matrix)
        return matrix

    def has_block(self) -> bool:
        """Return whether the layer has a matrix that could be edited, or is a mixture of experts."""
        return bool(self._writers) or self.mixture() is not None

    def has_mlp(self) -> bool:
        """Return whether the layer has an MLP or is a mixture of experts."""
        return bool(self.mlps()) or self.mixture() is not None

    def mixture(self) -> str | None:
        """Return the name of the first part of the layer that is a mixture of experts; None if there is none."""
        for name, module in self._modules.items():
            children = [*module._modules, *module._parameters]
            part = next((part for part in MIXTURE_PARTS if part in children), None)
            if part is not None:
                return name or part
        return None

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return {name: module for name, module, _ in own_modules(self.layer)}

    @cached_property
    def _matrices(self) -> dict[str, Matrix]:
        """The matrices by their name inside the layer, without those of a mixture of experts."""
        mixture = self.mixture()
        return {
            name: Matrix(name, module, outer)
            for name, module, outer in own_modules(self.layer)
            if name and is_matrix(module) and (mixture is None or not _is_inside(name, mixture))
        }

    @property
    def _writers(self) -> list[str]:
        return [name for name, matrix in self._matrices.items() if matrix.features in (self.hidden_size, None)]

    def mlps(self) -> list[str]:
        """Return the names of the matrices at the end of an MLP."""
        return [name for name in self._writers if self._ends_mlp(name)]

    def listed_mlps(self) -> list[str]:
        """Return those of `mlps` in a list of modules: a layer of LongCat has two of them beside its mixture."""
        return [name for name in self.mlps() if any(self._is_list(part) for part in _parents(name))]

    def _is_list(self, name: str) -> bool:
        return isinstance(self._modules[name], nn.ModuleList)

    def _ends_mlp(self, writer: str) -> bool:
        scope = writer
        while scope:
            scope = scope.rpartition(".")[0]
            others = [name for name in self._pool(scope, writer) if name != writer]
            if any(self._reads(name) for name in others):
                return self._feed(others, writer) and not self._has_other_weights(scope, writer)
        return False

    def _pool(self, scope: str, writer: str) -> list[str]:
        """Return the matrices inside a module, without those of its children that read and write on their own."""
        left_out = {
            child
            for child in {_child_of(scope, name) for name in self._matrices if _is_inside(name, scope)}
            if not _is_inside(writer, child) and self._is_complete(child)
        }
        return [name for name in self._matrices if _is_inside(name, scope) and _child_of(scope, name) not in left_out]

    def _is_complete(self, module: str) -> bool:
        """Return whether a module reads from the residual stream and writes to it with different matrices."""
        inside = [name for name in self._matrices if _is_inside(name, module)]
        return any(
            self._reads(reader) for writer in inside if writer in self._writers for reader in inside if reader != writer
        )

    def _reads(self, name: str) -> bool:
        return self._matrices[name].inputs in (self.hidden_size, None)

    def _feed(self, others: Sequence[str], writer: str) -> bool:
        """Return whether matrices are the up-projection of a writer, alone or with a gate, which may be one matrix."""
        inner = self._matrices[writer].inputs
        if not all(self._reads(name) for name in others):
            return False
        sizes = [self._matrices[name].features for name in others]
        if inner is None or None in sizes:
            return len(sizes) <= 2
        return sizes in ([inner], [2 * inner], [inner, inner])

    def _has_other_weights(self, scope: str, writer: str) -> bool:
        """Return whether a module has convolutions or other weights of more than two dimensions, as mixers have."""
        outside = {name for name in self._modules if name and not _is_inside(name, scope)}
        for child in {_child_of(scope, name) for name in self._modules if name and _is_inside(name, scope)}:
            if not _is_inside(writer, child) and self._is_complete(child):
                outside |= {name for name in self._modules if _is_inside(name, child)}
        return any(
            parameter.ndim > 2
            for name, module in self._modules.items()
            if name not in outside
            for parameter in module.parameters(recurse=False)
        )


def structure_of(name: str, layer: nn.Module, hidden_size: int) -> LayerStructure:
    """Return the structure of a decoder layer, which may be inside wrappers."""
    return LayerStructure(name, unwrapped(layer), hidden_size)


def _parents(name: str) -> list[str]:
    """Return the names of the modules around a module, without the layer."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _is_inside(name: str, module: str) -> bool:
    return not module or name == module or name.startswith(f"{module}.")


def _child_of(scope: str, name: str) -> str:
    """Return the name of the child of a module that another module is inside of."""
    start = len(scope) + 1 if scope else 0
    return name[: start + len(name[start:].partition(".")[0])]
