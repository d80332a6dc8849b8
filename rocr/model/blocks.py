"""Find the blocks of decoder layers: the weights that an edit changes together.

A layer with a dense MLP has one block, its down-projection. A layer with a mixture of experts has one block for each
routed and each shared expert. They are found by running the model on a few tokens, without knowledge of its code.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from rocr.errors import InputError
from rocr.io.dtypes import is_supported
from rocr.model.architecture import Architecture
from rocr.model.block import Block
from rocr.model.capture import run_through
from rocr.model.gated_keys import FORM_TOLERANCE, GatedKeys, gated_keys_hook
from rocr.model.tensor_parallel import is_sharded, whole
from rocr.model.wrappers import own_modules

PROBED_TOKENS = 32
"""Number of tokens that the model is run on to find the blocks of a mixture."""


@dataclass(frozen=True)
class LayerBlocks:
    """The blocks of one decoder layer.

    Attributes:
        layer: The decoder layer.
        name: The name of `module` in the model's state dict.
        module: The module whose output the blocks' outputs add up to: the down-projection of a dense MLP, or the
            mixture of experts.
        blocks: The blocks. Those of a mixture are sorted by parameter and expert.
        is_mixture: Whether `module` is a mixture of experts.
    """

    layer: int
    name: str
    module: nn.Module
    blocks: tuple[Block, ...]
    is_mixture: bool = False

    @property
    def only(self) -> Block:
        """The block of a dense layer."""
        (block,) = self.blocks
        return block

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the blocks, each once, in the order of the blocks."""
        return list({id(block.parameter): block.parameter for block in self.blocks}.values())

    @property
    def widths(self) -> tuple[int, ...]:
        """The number of inputs d_in of each block."""
        return tuple(block.weight.shape[1] for block in self.blocks)

    def index_of(self, keys: GatedKeys) -> int:
        """Return the index of the block that gated keys belong to, read with `parameters`."""
        return self._first_of[keys.weight] + keys.expert

    @cached_property
    def _first_of(self) -> list[int]:
        """For each of `parameters`, the index of its first block."""
        first: dict[int, int] = {}
        for i, block in enumerate(self.blocks):
            first.setdefault(id(block.parameter), i)
        return list(first.values())

    @property
    def device(self) -> torch.device:
        """The device of the first block."""
        return self.blocks[0].parameter.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first block."""
        return self.blocks[0].parameter.dtype

    def columns(self, chosen: Sequence[int]) -> list[slice]:
        """Return the columns of each chosen block in the wide key of these blocks."""
        return column_slices(self.blocks[block].weight.shape[1] for block in chosen)

    def outputs(self, keys: Tensor, held: Sequence[int]) -> Tensor:
        """Return the sum of the outputs (n, d_out) of some blocks at wide keys (n, sum of d_in), in float32."""
        pairs = zip(held, self.columns(held), strict=True)
        parts = [keys[:, place] @ whole(self.blocks[block].weight).to(keys).T for block, place in pairs]
        return torch.stack(parts).sum(dim=0) if len(parts) > 1 else parts[0]

    def norm(self, held: Sequence[int]) -> float:
        """Return the Frobenius norm of the weights of some blocks."""
        norms = [float(whole(self.blocks[block].weight).float().norm()) for block in held]
        return norms[0] if len(norms) == 1 else math.sqrt(math.fsum(norm * norm for norm in norms))

    def arranged(self, keys: Tensor, held: Sequence[int], wanted: Sequence[int]) -> Tensor:
        """Return wide keys of other blocks: the columns of blocks that `keys` does not hold are zero.

        Args:
            keys: (n, sum of d_in) wide keys of the blocks `held`.
            held: Indices of blocks.
            wanted: Indices of the blocks of the result. Blocks that are not wanted are left out.
        """
        widths = self.widths
        return arranged(keys, *({block: widths[block] for block in blocks} for blocks in (held, wanted)))


def column_slices(widths: Iterable[int]) -> list[slice]:
    """Return the columns of blocks with these widths that stand side by side."""
    ends = list(itertools.accumulate(widths, initial=0))
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def arranged(values: Tensor, held: Mapping[int, int], wanted: Mapping[int, int]) -> Tensor:
    """Return a wide matrix with the columns of other blocks; those of blocks that it does not hold are zero.

    Args:
        values: (n, sum of the widths of `held`).
        held: For each block of the matrix its width, in the order of the columns.
        wanted: The same for the result. Blocks that are not wanted are left out.
    """
    if list(held) == list(wanted):
        return values
    from_columns = dict(zip(held, column_slices(held.values()), strict=True))
    found = values.new_zeros(len(values), sum(wanted.values()))
    for block, place in zip(wanted, column_slices(wanted.values()), strict=True):
        if block in from_columns:
            found[:, place] = values[:, from_columns[block]]
    return found


def layer_blocks(architecture: Architecture, layer: int) -> LayerBlocks:
    """Return the blocks of one layer; see `find_blocks`."""
    return find_blocks(architecture, [layer])[layer]


def find_blocks(architecture: Architecture, layers: Iterable[int]) -> Mapping[int, LayerBlocks]:
    """Find the blocks of some layers. Those of mixtures are found in one run of the model, and kept.

    Args:
        architecture: The architecture of the model. Mixtures that are not loaded get blocks by the shapes of their
            parameters, without shared experts.
        layers: The decoder layers.

    Raises:
        InputError: A layer has neither a dense MLP nor a mixture whose experts can be read.
    """
    found = {layer: architecture.found_blocks.get(layer) for layer in layers}
    mixtures = {}
    for layer in [layer for layer, known in found.items() if known is None]:
        mixture = architecture.mixture(layer)
        if mixture is None:
            block = architecture.down_projection(layer)
            found[layer] = LayerBlocks(layer, block.name, block.module, (block,))
        else:
            mixtures[layer] = mixture
    unloaded = {layer for layer, (_, module) in mixtures.items() if _is_unloaded(module)}
    for layer in unloaded:
        found[layer] = _by_shape(architecture, layer, *mixtures[layer])
    running = {layer: mixture for layer, mixture in mixtures.items() if layer not in unloaded}
    if running:
        for layer, blocks in _by_running(architecture, running).items():
            found[layer] = architecture.found_blocks[layer] = blocks
    return {layer: blocks for layer, blocks in found.items() if blocks is not None}


def _is_unloaded(module: nn.Module) -> bool:
    return any(parameter.device.type == "meta" for parameter in module.parameters())


def _by_running(architecture: Architecture, mixtures: Mapping[int, tuple[str, nn.Module]]) -> dict[int, LayerBlocks]:
    """Run the model on a few tokens and find the weights whose products reach the outputs of mixtures.

    A mixture whose output is changed after the sum over the experts, by a norm, is looked at again without its outer
    module, or is edited at the one matrix that it ends in.
    """
    vocabulary = int(architecture.embedding.weight.shape[0])  # type: ignore[index, union-attr, operator]
    tokens = (torch.arange(PROBED_TOKENS) * 7919 % vocabulary)[None]
    candidates = {layer: _Candidates.of(*mixture) for layer, mixture in mixtures.items()}
    read: dict[int, list[GatedKeys]] = {}
    outputs: dict[int, Tensor] = {}

    def receive(layer: int, output: Tensor, keys: list[GatedKeys]) -> None:
        read.setdefault(layer, []).extend(keys)
        outputs[layer] = output

    with ExitStack() as stack:
        for layer, (_, module) in mixtures.items():
            hook = gated_keys_hook(module, candidates[layer].parameters, partial(receive, layer))
            stack.enter_context(hook)
        run_through(architecture, max(mixtures), tokens)
    found, inner = {}, {}
    for layer, (name, module) in mixtures.items():
        blocks = candidates[layer].blocks(layer, read.get(layer, []))
        last = _last_matrix(blocks, read.get(layer, []), outputs.get(layer))
        experts = candidates[layer].experts_inside()
        if any(block.expert is not None for block in blocks) or candidates[layer].has_listed(blocks):
            found[layer] = LayerBlocks(layer, name, module, blocks, is_mixture=True)
        elif last is not None:
            found[layer] = LayerBlocks(layer, last.name, last.module, (last,))
        elif experts is not None:
            inner[layer] = experts
        else:
            raise candidates[layer].unreadable()
    return found | (_by_running(architecture, inner) if inner else {})


def _last_matrix(blocks: Sequence[Block], read: Sequence[GatedKeys], output: Tensor | None) -> Block | None:
    """Return the only block if its result is the output of the whole mixture."""
    if len(blocks) != 1 or output is None:
        return None
    result = torch.zeros_like(output)
    for keys in read:
        result[keys.tokens] += blocks[0].module(keys.inputs).reshape(len(keys.tokens), -1)
    difference = (result - output).norm() / output.norm().clamp(min=1e-30)
    return blocks[0] if float(difference) <= FORM_TOLERANCE else None


@dataclass(frozen=True)
class _Candidates:
    """The matrices of a mixture, one or several in each parameter, of which some are blocks.

    Attributes:
        name: The name of the mixture.
        places: The name and the module of each parameter, and its name in the module.
        parameters: The parameters.
        modules: The modules of the mixture by name.
    """

    name: str
    places: list[tuple[str, nn.Module, str]]
    parameters: list[nn.Parameter]
    modules: Mapping[str, nn.Module]

    @classmethod
    def of(cls, name: str, mixture: nn.Module) -> _Candidates:
        """Return the parameters of a mixture with two or more dimensions."""
        modules = {f"{name}.{child}" if child else name: module for child, module, _ in own_modules(mixture)}
        found = [
            (module_name, module, attribute, parameter)
            for module_name, module in modules.items()
            for attribute, parameter in module.named_parameters(recurse=False)
            if parameter.ndim >= 2
        ]
        return cls(name, [place[:3] for place in found], [place[3] for place in found], modules)

    def blocks(self, layer: int, read: Sequence[GatedKeys]) -> tuple[Block, ...]:
        """Return the blocks: all experts of each parameter that was read, and the like of other experts in a list.

        Raises:
            InputError: The weights are not plain.
        """
        kinds = {keys.weight: keys for keys in read}
        found: dict[tuple[str, int], Block] = {}
        for index, keys in sorted(kinds.items()):
            name, _, attribute = self.places[index]
            for like in self._alike(name, attribute):
                parameter = getattr(self.modules[like], attribute)
                self._check_plain(f"{like}.{attribute}", parameter)
                for expert in range(keys.experts):
                    held = expert if keys.experts > 1 or parameter.ndim > 2 else None
                    block = Block(layer, like, self.modules[like], keys.transposed, attribute, held, keys.experts)
                    found[like, expert] = block
        return tuple(found.values())

    def has_listed(self, blocks: Sequence[Block]) -> bool:
        """Return whether two blocks are of one list of experts."""
        return any(len(self._alike(block.name, block.attribute)) > 1 for block in blocks)

    def experts_inside(self) -> tuple[str, nn.Module] | None:
        """Return the name and the module of the experts inside the mixture; None if the mixture itself holds them."""
        for (name, module, _), parameter in zip(self.places, self.parameters, strict=True):
            if parameter.ndim == 3 and name != self.name:
                return name, module
        return None

    def unreadable(self) -> InputError:
        """Return the error of a mixture whose experts cannot be read."""
        return InputError(
            f"The experts of {self.name}, a {type(self.modules[self.name]).__name__}, cannot be read: no product "
            f"with one of its weights ({self._shapes()}) reaches its output as a gate times the result. A fused "
            "kernel may compute it, or the output is changed in another way. Edit other layers (layers, --layers)."
        )

    def _alike(self, name: str, attribute: str) -> list[str]:
        """Return the names of the modules at the same place in all elements of the list of experts around a module."""
        parts = name.split(".")
        for i in reversed(range(len(parts))):
            if parts[i].isdecimal() and isinstance(self.modules.get(".".join(parts[:i])), nn.ModuleList):
                before, after = ".".join(parts[:i]), parts[i + 1 :]
                names = [".".join([before, str(j), *after]) for j in range(len(self.modules[before]))]  # type: ignore[arg-type]
                return [like for like in names if isinstance(getattr(self.modules.get(like), attribute, None), Tensor)]
        return [name]

    def _check_plain(self, name: str, parameter: nn.Parameter) -> None:
        if not is_supported(parameter.dtype) or type(parameter.data) is not Tensor or is_sharded(parameter):
            raise InputError(
                f"{name} holds {parameter.dtype} of shape {tuple(parameter.shape)} as {type(parameter.data).__name__}: "
                "only plain float32, bfloat16 and float16 weights of experts in one process can be edited. Load the "
                "model with such weights."
            )

    def _shapes(self) -> str:
        shown = [
            f"{'.'.join([*name.removeprefix(self.name).split('.')[1:], attribute])} {tuple(parameter.shape)}"
            for (name, _, attribute), parameter in zip(self.places, self.parameters, strict=True)
        ]
        return ", ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")


def _by_shape(architecture: Architecture, layer: int, name: str, mixture: nn.Module) -> LayerBlocks:
    """Return the routed experts of a mixture that is not loaded: those of its last parameter with a fitting shape.

    The parameter holds all experts, or that of one of them stands for a list of modules.
    """
    width = architecture.hidden_size
    candidates = _Candidates.of(name, mixture)
    last_first = list(zip(candidates.places, candidates.parameters, strict=True))[::-1]
    for (module_name, module, attribute), parameter in last_first:
        if parameter.ndim == 3 and width in parameter.shape[1:]:
            transposed = bool(getattr(module, "is_transposed", parameter.shape[1] != width))
            blocks = [
                Block(layer, module_name, module, transposed, attribute, expert, len(parameter))
                for expert in range(len(parameter))
            ]
            return LayerBlocks(layer, name, mixture, tuple(blocks), is_mixture=True)
    for (module_name, _, attribute), parameter in last_first:
        listed = candidates._alike(module_name, attribute)
        if len(listed) > 1 and len(parameter) == width:
            blocks = [Block(layer, each, candidates.modules[each], False, attribute) for each in listed]
            return LayerBlocks(layer, name, mixture, tuple(blocks), is_mixture=True)
    raise InputError(f"{name} has no parameter of experts with {width} outputs: {candidates._shapes()}.")
