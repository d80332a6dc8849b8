import json

import pytest
import torch
from safetensors.torch import load_file

from rocr.errors import InputError
from rocr.model.load import find_model, load_model
from rocr.model.load_partial import can_load_partially, load_partial
from rocr.model.quantised.checkpoint import quantised_weights, scheme_of
from rocr.model.weight_files import find_weight_files
from tests.support.quantised import quantise_groups, write_awq, write_fp8, write_gptq, write_plain

NAME = "model.layers.1.mlp.down_proj"
WRITERS = {
    "fp8": write_fp8,
    "fp8 e8m0": lambda folder: write_fp8(folder, scales="e8m0"),
    "gptq": write_gptq,
    "gptq in the order of activations": lambda folder: write_gptq(folder, ordered=False),
    "awq": write_awq,
}


def weight_in(folder):
    """The quantised down-projection of layer 1."""
    return next(weight for weight in quantised_weights(find_weight_files(folder)) if weight.module == NAME)


@pytest.mark.parametrize("scales", ["float32", "e8m0"])
def test_fp8_is_read_as_transformers_reads_it(scales, tmp_path):
    source = find_model(str(write_fp8(tmp_path, scales=scales, shards=3)))
    assert can_load_partially(source, 2)
    whole, part = load_model(source).model, load_partial(source, 2).model
    for name, parameter in part.named_parameters():
        if parameter.device.type != "meta":
            assert torch.equal(parameter, whole.get_parameter(name)), name


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_values_that_do_not_change_keep_their_bytes(write, tmp_path):
    write(tmp_path)
    weight = weight_in(tmp_path)
    parts = weight.parts()
    for role, values in weight.scheme.write(weight.read((128, 256)), parts).items():
        assert torch.equal(values.view(torch.uint8), parts[role].view(torch.uint8)), role


@pytest.mark.parametrize("ordered", [True, False])
def test_gptq_and_awq_are_read_by_their_formulas(ordered, tmp_path):
    folders = [tmp_path / name for name in ("gptq", "awq")]
    for folder, write in zip(folders, (lambda f: write_gptq(f, ordered=ordered), write_awq), strict=True):
        folder.mkdir()
        write(folder)
        groups = load_file(folder / "model.safetensors").get(f"{NAME}.g_idx", torch.arange(256) // 32).long()
        plain = tmp_path / "plain"
        plain.mkdir(exist_ok=True)
        values = load_file(write_plain(plain) / "model.safetensors")[f"{NAME}.weight"].float()
        codes, scales, zeros = quantise_groups(values, groups)
        expected = (codes - zeros[:, groups]) * scales[:, groups]
        assert torch.equal(weight_in(folder).read((128, 256)), expected)


def test_mxfp4_is_read_as_transformers_reads_it_and_written_again():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (4, 64, 3, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 130, (4, 64, 3), generator=generator, dtype=torch.uint8)
    parts = {"weight": blocks, "scale": scales}
    scheme = scheme_of({"quant_method": "mxfp4"})
    values = scheme.read(parts)
    assert torch.equal(values, convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    written = scheme.write(values, parts)
    assert torch.equal(written["weight"], blocks) and torch.equal(written["scale"], scales)


def test_an_fp8_block_grows_only_where_a_value_overflows():
    scheme = scheme_of({"quant_method": "fp8", "weight_block_size": [2, 2]})
    parts = {"weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "scale": torch.full((2, 2), 0.01)}
    values = scheme.read(parts)
    values[0, 0] = 9.0  # above 448 * 0.01
    written = scheme.write(values, parts)
    assert written["scale"][0, 0] > 0.01 and torch.equal(written["scale"].flatten()[1:], parts["scale"].flatten()[1:])
    assert scheme.read({**parts, **written})[0, 0] == pytest.approx(9.0, rel=0.07)


def test_bits_that_cross_words_are_an_error(tmp_path):
    write_gptq(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["bits"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="GPTQ: it has 3 bits"):
        weight_in(tmp_path).read((128, 256))


def test_another_shape_is_an_error(tmp_path):
    write_awq(tmp_path)
    with pytest.raises(InputError, match="has the shape"):
        weight_in(tmp_path).read((256, 128))
