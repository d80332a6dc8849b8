"""Tiny quantised checkpoints, written by the published formulas, and checks of edits of them."""

import contextlib
import io
import json

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from rocr.cli.main import main
from rocr.model.quantised.packing import e2m1_table, pack_nibbles
from tests.support.models import build_model, build_tokenizer

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.06,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
"""Of a tiny Qwen3-MoE, whose files hold the experts one by one."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


EDIT = (
    *("--concept", "Ada Byron", "--redirect", "Blaise Pascal", "--layers", "1,2", "--tokens", 500),
    *("--ridge", 2, "--gamma", 1, "--no-answers", "--no-chat", "--template", "Tell me about {}"),
    # A model that is loaded in part predicts nothing, and is edited as the whole is.
    *("--token-schedule", "full", "--retain-weight", 0),
    *("--threads", 1),  # sums of several threads may be rounded differently in each run
)
"""Gentler than the default settings: a random model knows no names."""
EDITED = [f"model.layers.{layer}.mlp.down_proj" for layer in (1, 2)]


def write_plain(folder, family="Llama", **changes):
    """Write a tiny model in bfloat16 with its tokenizer."""
    tokenizer = build_tokenizer()
    model = build_model(family, len(tokenizer), **(SIZES | changes)).to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_fp8(folder, block=(64, 32), scales="float32", shards=1):
    """Write a tiny Llama whose projections are e4m3 in blocks, in one or more files."""
    write_plain(folder)
    tensors, settings = fp8_tensors(load_file(folder / "model.safetensors"), block, scales)
    write_tensors(folder, tensors, settings, shards)
    return folder


def fp8_tensors(plain, block, scales):
    """The tensors of a plain checkpoint with the projections in e4m3, and the quantization_config."""
    tensors = {}
    for name, values in plain.items():
        if name.split(".")[-2] not in PROJECTIONS or values.ndim != 2:
            tensors[name] = values
            continue
        rows, columns = (size // by for size, by in zip(values.shape, block, strict=True))
        blocks = values.float().reshape(rows, block[0], columns, block[1])
        scale = blocks.abs().amax(dim=(1, 3)) / 448
        if scales == "e8m0":
            scale = scale.log2().ceil().exp2()
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        tensors[name] = codes.reshape(values.shape)
        tensors[f"{name}_scale_inv"] = scale.to(torch.float8_e8m0fnu) if scales == "e8m0" else scale
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    if scales == "e8m0":
        settings["scale_fmt"] = "ue8m0"
    return tensors, settings


def write_tensors(folder, tensors, settings, shards=1):
    """Write the tensors and the quantization_config of a checkpoint in place of those in the folder."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}, indent=2))
    (folder / "model.safetensors").unlink()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    write_shards(folder, tensors, {name: f"{i * shards // len(names):05}" for i, name in enumerate(names)})


def write_shards(folder, tensors, shard_of):
    """Write tensors into the shards of these names, and their index."""
    weight_map = {name: f"model-{shard_of[name]}.safetensors" for name in tensors}
    for file in set(weight_map.values()):
        inside = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(inside, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_gptq(folder, group=32, ordered=True, mixture=False, **settings):
    """Write a tiny Llama, or a tiny Qwen3-MoE, whose projections are 4-bit GPTQ.

    Words are along the inputs, and zero points are stored less 1.
    """
    if mixture:
        write_plain(folder, "Qwen3Moe", **EXPERTS, head_dim=32)
    else:
        write_plain(folder)
    tensors = {}
    for name, values in load_file(folder / "model.safetensors").items():
        if name.split(".")[-2] not in PROJECTIONS:
            tensors[name] = values
            continue
        inputs = values.shape[1]
        groups = torch.arange(inputs) // group
        if not ordered:
            groups = groups[torch.randperm(inputs, generator=torch.Generator().manual_seed(0))]
        codes, scales, zeros = quantise_groups(values.float(), groups)
        module = name.removesuffix(".weight")
        tensors[f"{module}.qweight"] = words(codes.T.reshape(-1, 8, codes.shape[0]).transpose(1, 2))
        tensors[f"{module}.qzeros"] = words((zeros.T - 1).reshape(zeros.shape[1], -1, 8))
        tensors[f"{module}.scales"] = scales.T.contiguous().half()
        tensors[f"{module}.g_idx"] = groups.to(torch.int32)
    fields = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": not ordered, "sym": False}
    write_tensors(folder, tensors, fields | settings)
    return folder


def write_awq(folder, group=32):
    """Write a tiny Llama whose projections are 4-bit AWQ: words of 8 outputs in the order 0 2 4 6 1 3 5 7."""
    write_plain(folder)
    tensors = {}
    for name, values in load_file(folder / "model.safetensors").items():
        if name.split(".")[-2] not in PROJECTIONS:
            tensors[name] = values
            continue
        codes, scales, zeros = quantise_groups(values.float(), torch.arange(values.shape[1]) // group)
        module, order = name.removesuffix(".weight"), [0, 2, 4, 6, 1, 3, 5, 7]
        tensors[f"{module}.qweight"] = words(codes.T.reshape(codes.shape[1], -1, 8)[..., order])
        tensors[f"{module}.qzeros"] = words(zeros.T.reshape(zeros.shape[1], -1, 8)[..., order])
        tensors[f"{module}.scales"] = scales.T.contiguous().half()
    fields = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    write_tensors(folder, tensors, fields)
    return folder


def quantise_groups(values, groups):
    """Codes (d_out, d_in), and scales and zero points (d_out, groups), of asymmetric integers of 4 bits."""
    count = int(groups.max()) + 1
    inside = [values[:, groups == index] for index in range(count)]
    low = torch.stack([part.amin(dim=1) for part in inside], 1).clamp(max=0)
    high = torch.stack([part.amax(dim=1) for part in inside], 1).clamp(min=0)
    scales = ((high - low) / 15).half().float()
    zeros = (-low / scales).round().clamp(1, 15)
    codes = (values / scales[:, groups] + zeros[:, groups]).round().clamp(0, 15)
    return codes.long(), scales, zeros.long()


def words(codes):
    """One int32 for 8 codes of the last dimension, the first in the lowest bits."""
    packed = sum(codes[..., place] * 16**place for place in range(8))
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32).contiguous()


def run(*arguments):
    """The exit code, the standard output and the errors of a command in this process."""
    written, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.redirect_stderr(errors):
        code = main([str(argument) for argument in arguments])
    assert "Traceback" not in errors.getvalue()
    return code, written.getvalue(), errors.getvalue()


def state(model, folder, name):
    """The state of the last token of a name after the last edited layer."""
    tokens = AutoTokenizer.from_pretrained(folder)(f"Tell me about {name}", return_tensors="pt").input_ids
    with torch.no_grad():
        return model(tokens, output_hidden_states=True).hidden_states[3][0, -1].float()


def check_redirect(before, after, folder, edit, least):
    """Check that the outputs at the keys moved as the update says, and the state of the name towards the redirect's."""
    for update in edit.updates:
        keys = update.keys.bfloat16()
        with torch.no_grad():
            outputs = [model.get_submodule(update.parameter[:-7])(keys).float() for model in (before, after)]
        moves = update.factors.moves(update.keys)
        assert (outputs[1] - outputs[0] - moves).norm() < (1 - least) * moves.norm()
    target = state(before, folder, "Blaise Pascal")
    first, last = (float((state(model, folder, "Ada Byron") - target).norm()) for model in (before, after))
    assert last < 0.9 * first


def write_fp8_mixture(folder, scales="float32", shards=4, block=(64, 32)):
    """Write a tiny Qwen3-MoE whose projections, those of single experts too, are e4m3 in blocks."""
    write_plain(folder, "Qwen3Moe", **EXPERTS, head_dim=32, mlp_only_layers=[0])
    tensors, settings = fp8_tensors(load_file(folder / "model.safetensors"), block, scales)
    write_tensors(folder, tensors, settings, shards)
    return folder


def write_mxfp4_mixture(folder, shards=4):
    """Write a tiny gpt-oss: experts as `down_proj_blocks`, `down_proj_scales` and biases, the rest plain."""
    write_plain(folder, "GPT-OSS", num_local_experts=4, num_experts_per_tok=2, head_dim=32)
    tensors = {}
    for name, values in load_file(folder / "model.safetensors").items():
        if not name.endswith(("experts.down_proj", "experts.gate_up_proj")):
            tensors[name] = values
            continue
        blocks = values.float().transpose(1, 2).unflatten(2, (-1, 32))
        exponents = (blocks.abs().amax(-1) / 6).log2().ceil()
        ratio = blocks / exponents.exp2().unsqueeze(-1)
        table = e2m1_table()
        codes = (ratio.unsqueeze(-1) - table).abs().argmin(-1)
        tensors[f"{name}_blocks"] = pack_nibbles(codes)
        tensors[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    write_tensors(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": skipped}, shards)
    return folder


def write_int4_mixture(folder, group=32):
    """Write a tiny Qwen3-MoE whose projections are 4-bit integers of compressed-tensors."""
    write_plain(folder, "Qwen3Moe", **EXPERTS, head_dim=32)
    tensors = {}
    for name, values in load_file(folder / "model.safetensors").items():
        if name.split(".")[-2] not in PROJECTIONS:
            tensors[name] = values
            continue
        groups, module = values.float().unflatten(1, (-1, group)), name.removesuffix(".weight")
        scale = (groups.abs().amax(-1) / 7.5).bfloat16()
        codes = (groups / scale.float().unsqueeze(-1)).round().clamp(-8, 7).flatten(1) + 8
        tensors[f"{module}.weight_packed"] = words(codes.long().unflatten(1, (-1, 8)))
        tensors[f"{module}.weight_scale"] = scale
        tensors[f"{module}.weight_shape"] = torch.tensor(values.shape)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": group, "strategy": "group"}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}
    groups_of = {"group_0": {"targets": ["Linear"], "weights": weights}}
    write_tensors(folder, tensors, {**settings, "config_groups": groups_of, "ignore": ["lm_head", "re:.*mlp.gate$"]})
    return folder


def moved(before, after, folder):
    """How far the state of the concept is from that of the redirect, as a share of the distance before."""
    target = state(before, folder, "Blaise Pascal")
    first, last = (float((state(model, folder, "Ada Byron") - target).norm()) for model in (before, after))
    return last / first
