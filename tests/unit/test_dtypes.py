import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rocr.io.dtypes import STORED_DTYPES, SUPPORTED_DTYPES, SUPPORTED_KINDS, dtype_name, is_supported, torch_dtype
from rocr.io.safetensors_layout import read_layout

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("kind", "name"), STORED_DTYPES.items())
def test_a_stored_dtype_has_the_name_that_safetensors_gives_it(kind, name, tmp_path):
    dtype = torch_dtype(name)
    assert isinstance(dtype, torch.dtype) and dtype_name(dtype) == name
    save_file({"a": torch.zeros(3, dtype=dtype)}, tmp_path / "file")
    stored = read_layout(tmp_path / "file")["a"]
    assert (stored.kind, stored.dtype) == (kind, dtype)


def test_weights_of_three_dtypes_are_supported():
    supported = {torch_dtype(name) for name in STORED_DTYPES.values() if is_supported(torch_dtype(name))}
    assert supported == {torch.float32, torch.bfloat16, torch.float16}
    assert sorted(SUPPORTED_KINDS.values()) == sorted(SUPPORTED_DTYPES)


def test_the_names_are_known_without_torch():
    code = "import sys, rocr.io.dtypes; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
