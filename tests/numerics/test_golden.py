"""Golden digests: recorded digests of results and files, equal on every machine.

Only arithmetic that is exact in any order is pinned, so that no chip, BLAS or LAPACK may differ: whole numbers, powers
of two, and Cholesky factors of diagonal matrices of squares. Whoever changes a digest here changes what rocr computes
or writes, for everybody who compares with an earlier result.
"""

import hashlib
import json

import numpy as np
import pytest
import torch
import transformers

from rocr import Concept, Edit, EditConfig, Probe, Statistics, ops
from rocr.edit.update import LayerUpdate
from rocr.evaluation.forms import build_items
from rocr.model.architecture import find_architecture
from rocr.model.fingerprint import Fingerprint, model_digest, tensor_digest
from rocr.solve.metric import build_metric
from rocr.solve.solve import solve_layer
from rocr.statistics.provenance import Provenance

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GOLDEN = {
    "second moment": "e1a59b18bc5803da84fb3d4ce3f29d3166cccd123bdcae4b0e725f1e38e680d5",
    "nearest float32": "85aefb05b7bbceaa275873daad56e2904ef794ab0847a5816068b0f1405434b6",
    "nearest bfloat16": "742ec4f655364715464d0870e5b27433b47e6d7a1d649d515aed3d6f2b4d9e1a",
    "nearest float16": "99711a3c3abc3ec936be10b06815e2b07623e4bc0ffe184ff4e89916127b85e5",
    "at random bfloat16": "6e69ba6e6f19ee40c604390e2e9c1fba7682b38a63684fe1e0f1877b033753e7",
    "at random float16": "959332156365570d583917e4f3d956e0f46f69f4833cbecfcd61875364db4087",
    "first float32": "7822b67c29e457c176cd59899f737405d7d7827999955030ca312d966025ddbf",
    "first bfloat16": "44d01682a1dd8758c563813d25a62b8ff20893b31e9010f65bdffc8c0ec2ff0d",
    "first float16": "448824efc2873db0eec81a2485a70ac2b74690e21c533746f09ed3cabbfd931e",
    "fingerprint": "2:3a0dd2d1b303156b6b01adfd5c4b276a75b226f7e6dd10032a70eddb34646c2a",
    "fingerprint of 0.1": "9c9b2edc6d64d9f99154749bd539450e3e9380d760572a6ae30a543b2d46e7c1",
    "statistics file": "43027f49de8b3e025e5b40ed3e07484acbe60fd7257f27fcc98b314c2d751dd9",
    "adapter": "a00334bd323be9cc76d0e1d1dad09725a7836aa42f9a943a1fbf52d43e451bfe",
    "options": "dabff92d504e43ce79380fc878d80d1e9db3175baf292e428064e22783c6156d",
    "edited float32": "292682c9c189bb1e9663ae82ac2ef071f86659142ffd5e8903502b779e3c3589",
    "edit file float32": "8698d6116e3f4438780c4bb0faacd3af793ea6ef3194679d0a7fadcde7ed4100",
    "edited bfloat16": "427009bd05579cebdd61ae7ff264be80eb59ce6adb05317ec02f80f435f62c1a",
    "edit file bfloat16": "46ff5310575f7fea2488aea991eae65d7f06108e7935e0cb873eab1ab68e89ec",
    "edited float16": "4f1b86d37b1870d9b31b05ae5e76973d36f2a79c968e0524c8e67e2f864c2299",
    "edit file float16": "3c5215be9bf9142155762f25397468ed6a865d45fc1c2afc87c0eefe58cac35d",
}


@pytest.fixture
def on_every_path(by_simd, instruction_sets):
    """on_every_path(function): what function(backend) gives in torch, in float64 and with every instruction set."""

    def run(function):
        found = {backend: function(backend) for backend in ("torch", "reference")}
        return found | (by_simd(lambda: function("cpp")) if instruction_sets else {})

    return run


@pytest.fixture
def assert_golden(tally):
    """assert_golden(name, found): on every path the digest is the one that was written down."""

    def check(name, found):
        assert found == dict.fromkeys(found, GOLDEN[name])
        tally("golden digests met", len(found))

    return check


@pytest.mark.parametrize("dtype", DTYPES)
def test_second_moments(formula, on_every_path, dtype, assert_golden):
    keys = formula(1, (1700, 130), -8, 8).to(DTYPES[dtype])

    def moment(backend):
        total = ops.accumulate_second_moment(torch.zeros(130, 130), keys, backend=backend)
        return tensor_digest(ops.symmetrize(total))

    whole = keys.double().numpy().astype(np.int64)
    assert hashlib.sha256((whole.T @ whole).astype("<f4").tobytes()).hexdigest() == GOLDEN["second moment"]
    assert_golden("second moment", on_every_path(moment))


def operands(formula, dtype):
    """Two weights and their updates, whose sums float32 holds exactly and 16 bits do not."""
    shapes = ((40, 70), (33, 130))
    weights = [formula(2 + i, shape, -64, 64).to(DTYPES[dtype]) / 64 for i, shape in enumerate(shapes)]
    lefts = [formula(4 + i, (rows, 5), -8, 8) for i, (rows, _) in enumerate(shapes)]
    rights = [formula(6 + i, (5, columns), -8, 8) for i, (_, columns) in enumerate(shapes)]
    return weights, lefts, rights


def updated(formula, dtype, rounding, backend):
    weights, lefts, rights = operands(formula, dtype)
    ops.low_rank_update(weights, lefts, rights, scale=2.0**-13, rounding=rounding, seed=2024, backend=backend)
    return weights


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_updates_rounded_to_nearest(formula, on_every_path, dtype, joint_digest, assert_golden):
    found = on_every_path(lambda backend: joint_digest(updated(formula, dtype, "nearest", backend)))
    assert_golden(f"nearest {dtype}", found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_rank_updates_rounded_at_random(formula, by_simd, dtype, joint_digest, assert_golden):
    # The other backends on the CPU draw from torch's generator, whose stream torch does not promise.
    found = by_simd(lambda: joint_digest(updated(formula, dtype, "stochastic", "cpp")))
    assert_golden(f"at random {dtype}", found)
    parts = [rounded_by_the_book(*each, dtype) for each in enumerate(zip(*operands(formula, dtype), strict=True))]
    assert joint_digest(parts) == GOLDEN[f"at random {dtype}"]


def rounded_by_the_book(index, operands, dtype):
    """The compiled kernels' rounding at random as their comments describe it, in whole numbers of numpy."""
    weight, left, right = operands
    exact = weight.double() + 2.0**-13 * (left.double() @ right.double())
    bits = exact.float().numpy().view(np.uint32)
    random = np.array([row_bits(index, row, bits.shape[1]) for row in range(len(bits))])
    if dtype == "bfloat16":
        halves = (bits + (random & 0xFFFF)) >> 16
    else:  # no number here is subnormal, and a zero stays one
        magnitude = bits & 0x7FFFFFFF
        halves = ((magnitude - 0x38000000 + (random & 0x1FFF)) >> 13) | (bits >> 16 & 0x8000)
        halves = np.where(magnitude == 0, 0, halves)
    return torch.from_numpy(halves.astype(np.uint16).view(np.int16))


def row_bits(index, row, columns, seed=2024):
    """32 bits for each number of a row: MurmurHash3's finaliser, keyed by SplitMix64's."""

    def mix(value):
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    key = mix((mix((mix(seed) + index) % 2**64) + row) % 2**64)
    found = []
    for column in range(columns):
        value = (column ^ key % 2**32) * (key >> 32 | 1) % 2**32
        value = (value ^ value >> 16) * 0x85EBCA6B % 2**32
        value = (value ^ value >> 13) * 0xC2B2AE35 % 2**32
        found.append(value ^ value >> 16)
    return np.array(found, dtype=np.uint32)


@pytest.fixture
def tiny(formula):
    """tiny(dtype): a model whose weights are sixteenths from a formula, not drawn by any library."""

    def build(dtype):
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 64}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=False))
        with torch.no_grad():
            for i, (_, parameter) in enumerate(sorted(model.named_parameters())):
                parameter.copy_(formula(100 + i, parameter.shape, -16, 16) / 16)
        return model.eval().to(DTYPES[dtype])

    return build


@pytest.fixture
def golden_statistics():
    moments = {layer: torch.diag(torch.tensor([0.0, 6.0]).repeat(24)) for layer in (0, 1)}
    versions = {"rocr": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}
    mark = Fingerprint("a" * 64, 1, "b" * 64, "golden")
    return Statistics(moments, 4096, "c" * 64, mark, Provenance("float32", 512, 1, {"rms_norm_eps": 1e-6}, 9, versions))


@pytest.fixture
def golden_edit(formula, golden_statistics):
    """Three concepts' edit of two layers, solved from given keys and residuals; every number in it is exact.

    With γ = 1.5 and a mean square of 3, M⁻¹ is diag(1, 4, 1, 4 ...); keys that share no input, of the squared lengths
    3, 15 and 63 under M, and λ = 1 make K M Kᵀ + λI = diag(4, 16, 64).
    """
    config = EditConfig(
        layers=(0, 1), gamma=1.5, ridge=1.0, relative_ridge=False, retain_weight=0.0, least_closed=0.0, variants="none"
    )
    keys = torch.zeros(3, 48)
    keys[0, [0, 2, 1]] = torch.tensor([1.0, 1.0, 2.0])
    keys[1, [4, 6, 8, 5]] = torch.tensor([3.0, 2.0, 1.0, -2.0])
    keys[2, [10, 12, 14, 11]] = torch.tensor([7.0, 3.0, 1.0, 4.0])
    updates = []
    for layer in config.layers:
        residuals = formula(50 + layer, (3, 32), -4, 4)
        metric = build_metric(golden_statistics.second_moment(layer), config)
        solution = solve_layer(keys, residuals, metric, config.ridge)
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        updates.append(LayerUpdate(layer, name, solution.factors, keys.clone(), residuals, system=solution.system))
    concepts = [Concept("Ada Byron", "Pascal", ("the countess",)), Concept("Émile", "東京"), Concept("C", "a key")]
    return Edit(concepts, config, golden_statistics.fingerprint, updates, [0, 1, 2])


def weights_of(model):
    return [parameter for _, parameter in sorted(model.named_parameters())]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_edited_and_reverted(
    tiny, golden_edit, dtype, tmp_path, contents_digest, by_simd, joint_digest, assert_golden
):
    model = tiny(dtype)
    first = joint_digest(weights_of(model))

    def edited():
        golden_edit.apply(model, allow_fingerprint_mismatch=True)
        found = joint_digest(weights_of(model))
        golden_edit.save(tmp_path / "edit", overwrite=True)
        golden_edit.revert(model)
        assert joint_digest(weights_of(model)) == first
        return found, contents_digest(tmp_path / "edit")

    assert_golden(f"first {dtype}", {"": first})
    weights, contents = zip(*by_simd(edited).values(), strict=True)
    assert_golden(f"edited {dtype}", dict(enumerate(weights)))
    assert_golden(f"edit file {dtype}", dict(enumerate(contents)))


def test_the_fingerprint_of_a_model(tiny, assert_golden):
    architectures = {dtype: find_architecture(tiny(dtype)) for dtype in DTYPES}
    assert_golden("fingerprint", {dtype: model_digest(found, 1) for dtype, found in architectures.items()})
    old = {dtype: model_digest(found, 1, like="of 0.1") for dtype, found in architectures.items()}
    assert_golden("fingerprint of 0.1", old)


def test_a_statistics_file(golden_statistics, tmp_path, contents_digest, assert_golden):
    golden_statistics.save(tmp_path / "statistics")
    again = Statistics.load(tmp_path / "statistics")
    again.save(tmp_path / "again")
    assert_golden("statistics file", {name: contents_digest(tmp_path / name) for name in ("statistics", "again")})


def test_an_adapter(golden_edit, tmp_path, contents_digest, assert_golden):
    golden_edit.export_lora(tmp_path / "adapter")
    assert_golden("adapter", {"": contents_digest(tmp_path / "adapter" / "adapter_model.safetensors")})


def test_how_options_are_drawn(assert_golden):
    probes = [Probe(f"Person {i}", f"What is {i}?", f"answer {i}", tuple("uvwxyz")) for i in range(20)]
    items = build_items(probes, ("mcp",), seed=3)
    asked = json.dumps([[item.message, item.correct] for item in items])
    assert_golden("options", {"": hashlib.sha256(asked.encode()).hexdigest()})
