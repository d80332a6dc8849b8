"""Calls of the libraries that can connect to a hub, with connections switched off unless they are allowed.

transformers, peft, datasets and lm-evaluation-harness may connect without being asked: for code that a configuration
names in another repository, for the base model of an adapter, for missing files. rocr makes every such call in this
module or inside `offline`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from rocr.errors import InputError
from rocr.io.boundary import calling
from rocr.model.check_tokenizer import check_tokenizer_file
from rocr.model.gguf import add_expert_sizes, check_gguf_support, fast_reader, isolated_link
from rocr.model.model_class import auto_class_of
from rocr.model.source import ModelSource

SWITCHES = (
    ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
    ("transformers.utils.hub", "_is_offline_mode"),  # transformers 4 copies the value when it is imported
    ("datasets.config", "HF_HUB_OFFLINE"),
    ("datasets.config", "HF_DATASETS_OFFLINE"),
    ("evaluate.config", "HF_EVALUATE_OFFLINE"),
)
"""Module and name of each variable that tells one of these libraries whether it may connect."""

_DTYPE = "dtype" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56) else "torch_dtype"


@contextmanager
def offline(unless: bool = False) -> Iterator[None]:
    """Prevent connections to a hub inside the context. `local_files_only` alone still resolves the hub's address.

    Import the libraries before: a library that is imported inside the context stays offline afterwards.

    Args:
        unless: Change nothing. With HF_HUB_OFFLINE in the environment, the libraries stay offline.
    """
    if unless:
        yield
        return
    places = [(sys.modules[module], name) for module, name in SWITCHES if hasattr(sys.modules.get(module), name)]
    before = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, True)
    _forget_sessions()
    try:
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)
        _forget_sessions()


def _forget_sessions() -> None:
    """Drop the sessions of huggingface_hub before 1.0, which reads the switch only when it makes a session."""
    from huggingface_hub import utils

    reset = getattr(utils, "reset_sessions", None)
    if reset is not None:
        reset()


@dataclass(frozen=True)
class Loading:
    """Loads the parts of a model with transformers; see `loading`.

    Attributes:
        source: Where the model comes from.
        place: The folder or hub id that transformers is given.
        options: The options of every call of `from_pretrained`.
        advice: What to do about a failure, as a sentence; empty for none.
    """

    source: ModelSource
    place: str
    options: dict[str, Any]
    advice: str

    def config(self) -> Any:
        """Load the model's configuration.

        Raises:
            InputError: transformers cannot load it.
        """
        with self._calling("configuration"):
            config = AutoConfig.from_pretrained(self.place, **self.options)
            if self.source.gguf:
                add_expert_sizes(config, self.options["gguf_file"])
        config.name_or_path = self.source.place
        return config

    def tokenizer(self) -> Any:
        """Load the model's tokenizer.

        Raises:
            InputError: transformers cannot load it, or its rules are refused by `check_tokenizer_file`.
        """
        if self.source.checkpoint_folder is not None:
            check_tokenizer_file(self.source.checkpoint_folder / "tokenizer.json")
        with self._calling("tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(self.place, **self.options)
        tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = self.source.place
        return tokenizer

    def model(self, config: Any, dtype: torch.dtype | str, device: str | None) -> tuple[nn.Module, dict[str, Any]]:
        """Load the model, and return it with transformers' record of missing and mismatched tensors.

        Args:
            config: The configuration, from `config`.
            dtype: The dtype of the weights; "auto" for the one that the configuration names.
            device: A device map of transformers; None for the CPU.

        Raises:
            InputError: The files are not those of a model that transformers can load.
        """
        plain = {} if self.source.gguf else {"use_safetensors": True}  # never a pickle
        with self._calling("model"), no_code_of_generation(unless=self.options["trust_remote_code"]):
            model, found = auto_class_of(config, self.options["trust_remote_code"]).from_pretrained(
                self.place,
                config=config,
                **{_DTYPE: dtype},
                device_map=device,
                output_loading_info=True,
                **plain,
                **self.options,
            )
        model.config.name_or_path = self.source.place
        return model, found

    def skeleton(self, config: Any, with_buffers: bool = False) -> nn.Module:
        """Build the model without its weights; see `build_skeleton`.

        Raises:
            InputError: The configuration is not one of a model that reads text.
        """
        with self._calling("structure"):
            return build_skeleton(config, with_buffers, self.options["trust_remote_code"])

    @contextmanager
    def _calling(self, what: str) -> Iterator[None]:
        try:
            with calling(f"Loading the {what} of {self.source.name}", self.advice):
                yield
        except MemoryError as error:
            raise InputError(f"Loading the {what} of {self.source.name} failed: not enough memory.") from error


@contextmanager
def loading(source: ModelSource, trust_remote_code: bool = False) -> Iterator[Loading]:
    """Yield the means to load parts of a model, without connections unless the source allows downloads.

    Args:
        source: The source, from `find_model`. For a GGUF file, no other file of its folder is read.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        InputError: The source is a GGUF file, and a package that reads it is missing.
    """
    options = {"trust_remote_code": trust_remote_code, "local_files_only": not source.download}
    may_download = source.folder is not None or source.download
    advice = "" if may_download else "Nothing was downloaded; --download allows it."
    with offline(unless=source.download):
        if source.gguf is None or source.folder is None:
            yield Loading(source, source.place, options, advice)
            return
        check_gguf_support()
        with isolated_link(source.folder / source.gguf) as link, fast_reader():
            yield Loading(source, str(link.parent), options | {"gguf_file": str(link)}, advice)


def build_skeleton(config: Any, with_buffers: bool = False, trust_remote_code: bool = False) -> nn.Module:
    """Build a model without its weights: its parameters are on the meta device.

    Args:
        config: The model's configuration.
        with_buffers: Whether buffers are on the CPU with the values that the model's code computes for them; else
            they are on the meta device too.
        trust_remote_code: Whether code that comes with the model may run.
    """
    device: AbstractContextManager[object] = parameters_on_meta() if with_buffers else torch.device("meta")
    # The code of transformers 4 for initial values runs on the meta device too, where some of it fails.
    no_values = getattr(transformers.modeling_utils, "no_init_weights", nullcontext)
    with device, no_values():
        auto_class = auto_class_of(config, trust_remote_code)
        model: nn.Module = auto_class.from_config(config, trust_remote_code=trust_remote_code)
    return model


def skeleton_of_fields(fields: Mapping[str, Any]) -> nn.Module:
    """Build the skeleton of a model of transformers itself from the fields of a config.json; may raise anything."""
    with offline():
        return build_skeleton(AutoConfig.for_model(**fields))


@contextmanager
def no_code_of_generation(unless: bool = False) -> Iterator[None]:
    """Prevent that a model's folder brings a function for `generate`: transformers 4 runs its code unasked.

    Args:
        unless: Change nothing, since the code is trusted.
    """
    name, mixin = "load_custom_generate", transformers.GenerationMixin
    original = getattr(mixin, name, None)
    if unless or original is None:
        yield
        return

    def nothing(*_: Any, **__: Any) -> Any:
        raise OSError("Code of a model is not run.")  # transformers takes it that there is none

    setattr(mixin, name, nothing)
    try:
        yield
    finally:
        setattr(mixin, name, original)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Put parameters that are registered inside the context on the meta device, and leave buffers as they are."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
            # transformers 5 then sets the values of buffers alone; on the meta device that of parameters takes long.
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        original(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def load_dataset(name: str, configuration: str | None, download: bool) -> Any:
    """Load the splits of a dataset from a hub, or from a folder in the layout of a hub's dataset.

    Args:
        name: The id or the folder of the dataset.
        configuration: The configuration of the dataset; None for its default.
        download: Whether the dataset may be downloaded.

    Raises:
        InputError: The package datasets is missing, or the dataset cannot be loaded.
    """
    try:
        import datasets
    except ImportError:
        raise InputError("Hugging Face datasets need the package datasets: pip install 'rocr[datasets]'.") from None
    advice = "" if download else "Without --download only datasets that were downloaded before are found."
    with calling(f"Reading the dataset {name}", advice), offline(unless=download):
        return datasets.load_dataset(name, configuration)
