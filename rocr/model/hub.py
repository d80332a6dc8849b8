"""The one place where libraries are called that could reach a hub.

transformers, peft, datasets and lm-evaluation-harness open connections of their own accord: for code that a
configuration names in another repository, for the base model of an adapter, for files that are missing. Every such
call stands here or inside `offline`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rocr.errors import InputError
from rocr.io.boundary import calling
from rocr.model.check_tokenizer import check_tokenizer_file
from rocr.model.gguf import alone, check_gguf_support, quick_reading
from rocr.model.source import ModelSource

SWITCHES = (
    ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
    ("transformers.utils.hub", "_is_offline_mode"),  # transformers 4 keeps a copy from the time of its import
    ("datasets.config", "HF_HUB_OFFLINE"),
    ("datasets.config", "HF_DATASETS_OFFLINE"),
    ("evaluate.config", "HF_EVALUATE_OFFLINE"),
)
"""Module and name of every variable by which these libraries decide whether they may connect."""


_DTYPE = "dtype" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56) else "torch_dtype"


@contextmanager
def offline(unless: bool = False) -> Iterator[None]:
    """No connections to a hub inside: `local_files_only` alone still looks the hub's address up.

    Libraries that are imported inside remember what they found, so they are imported before.

    Args:
        unless: leave everything as it is. An environment that says HF_HUB_OFFLINE stays offline.
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
    """huggingface_hub before 1.0 decides when a session is made, and keeps it."""
    from huggingface_hub import utils

    reset = getattr(utils, "reset_sessions", None)
    if reset is not None:
        reset()


@dataclass(frozen=True)
class Loading:
    """What transformers can load from a source.

    Attributes:
        source: where the model comes from.
        place: the folder or hub id that transformers is given.
        options: of every call of from_pretrained.
        advice: what to do about a failure; empty: nothing.
    """

    source: ModelSource
    place: str
    options: dict[str, Any]
    advice: str

    def config(self) -> Any:
        """The model's configuration.

        Raises:
            InputError: there is none that transformers can load.
        """
        with self._calling("configuration"):
            config = AutoConfig.from_pretrained(self.place, **self.options)
        config.name_or_path = self.source.place
        return config

    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            InputError: there is none that transformers can load.
        """
        if self.source.folder is not None and self.source.gguf is None:
            check_tokenizer_file(self.source.folder / "tokenizer.json")
        with self._calling("tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(self.place, **self.options)
        tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = self.source.place
        return tokenizer

    def model(self, config: Any, dtype: torch.dtype | str, device: str | None) -> tuple[nn.Module, dict[str, Any]]:
        """The model with its weights, and what transformers says about them: missing and mismatched tensors.

        Args:
            config: from `config`.
            dtype: of the weights; "auto": as the configuration says.
            device: a device map of transformers; None: the CPU.

        Raises:
            InputError: the files are not those of a causal language model that transformers can load.
        """
        plain = {} if self.source.gguf else {"use_safetensors": True}  # never a pickle
        with self._calling("model"):
            model, found = AutoModelForCausalLM.from_pretrained(
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

    def structure(self, config: Any) -> nn.Module:
        """The model as its configuration describes it, with new weights.

        Raises:
            InputError: the configuration is not one of a causal language model.
        """
        with self._calling("structure"):
            model: nn.Module = AutoModelForCausalLM.from_config(
                config, trust_remote_code=self.options["trust_remote_code"]
            )
        return model

    @contextmanager
    def _calling(self, what: str) -> Iterator[None]:
        try:
            with calling(f"Loading the {what} of {self.source.name}", self.advice):
                yield
        except MemoryError as error:
            raise InputError(
                f"Loading the {what} of {self.source.name} failed: the memory does not suffice."
            ) from error


@contextmanager
def loading(source: ModelSource, trust_remote_code: bool = False) -> Iterator[Loading]:
    """Within the context, load parts of a model; no connection is tried unless the source allows downloads.

    Args:
        source: from `find_model`. Of a GGUF file nothing else in its folder is read.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        InputError: the source is a GGUF file, and a package that reads it is missing.
    """
    options = {"trust_remote_code": trust_remote_code, "local_files_only": not source.download}
    may_download = source.folder is not None or source.download
    advice = "" if may_download else "Nothing was downloaded; --download allows it."
    with offline(unless=source.download):
        if source.gguf is None or source.folder is None:
            yield Loading(source, source.place, options, advice)
            return
        check_gguf_support()
        with alone(source.folder / source.gguf) as link, quick_reading():
            yield Loading(source, str(link.parent), options | {"gguf_file": str(link)}, advice)


def build_skeleton(fields: Mapping[str, Any]) -> nn.Module:
    """A model of transformers itself on the meta device, from the fields of a config.json; may raise anything."""
    with offline(), torch.device("meta"):
        config = AutoConfig.for_model(**fields)
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model


def load_dataset(name: str, configuration: str | None, download: bool) -> Any:
    """The splits of a dataset of a hub, or of a folder in its layout.

    Raises:
        InputError: the package datasets is missing, or the dataset cannot be had.
    """
    try:
        import datasets
    except ImportError:
        raise InputError("Hugging Face datasets need the package datasets: pip install 'rocr[datasets]'.") from None
    advice = "" if download else "Without --download only what was downloaded before is looked at."
    with calling(f"Reading the dataset {name}", advice), offline(unless=download):
        return datasets.load_dataset(name, configuration)
