"""A concept taken out of a text encoder: its embedding moves onto the redirect's, and those of other prompts stay."""

import re
from pathlib import Path

import pytest
import torch
import transformers

import rocr
from rocr import EditConfig
from rocr.config import IMAGE_TEMPLATES
from rocr.keys.variants import spelling_variants
from tests.unit.test_encoders import CONCEPT, closing, prompts  # noqa: F401 (fixtures)

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("one_thread")]

OTHERS = ["a photo of a red castle", "a view of a sea and Mona Klee", "a drawing of a quiet river and Dora Marsh"]
CLIP = {"hidden_size": 64, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 4,
        "initializer_factor": 0.3, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip


def clip(vocabulary):
    """A CLIP text model in which a token's own meaning outweighs its place, as in a trained one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=vocabulary, **CLIP)).eval()
    with torch.no_grad():
        encoder.embeddings.position_embedding.weight *= 0.1
        for layer in encoder.encoder.layers:
            layer.self_attn.out_proj.weight *= 0.3
            layer.mlp.fc1.weight *= 20
            layer.mlp.fc2.weight *= 0.1
    return encoder


def t5(vocabulary):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.T5Config(
            vocab_size=vocabulary, d_model=64, d_kv=16, d_ff=2048, num_layers=12, num_heads=4, pad_token_id=1,
            eos_token_id=1, feed_forward_proj="gated-gelu", initializer_factor=0.3,
        )  # fmt: skip
        encoder = transformers.T5EncoderModel(config).eval()
    with torch.no_grad():
        for block in encoder.encoder.block:
            block.layer[1].DenseReluDense.wo.weight *= 10
    return encoder


@torch.no_grad()
def embedding(encoder, tokenizer, text):
    return encoder(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]


@pytest.mark.parametrize(("make", "layers", "gamma"), [(clip, [0, 1], 300.0), (t5, [1, 3], 10.0)])
def test_the_embedding_of_a_name_moves_onto_the_redirects(make, layers, gamma, closing, prompts):  # noqa: F811
    encoder = make(len(closing))
    texts = [text + "<end>" * (24 if make is clip else 0) for text in prompts if CONCEPT.name not in text]
    painting = [f"a painting by {name}" for name in (CONCEPT.name, CONCEPT.redirect)]
    before = {text: embedding(encoder, closing, text) for text in (*painting, *OTHERS)}
    collected = rocr.collect_statistics(encoder, closing, texts, layers)
    config = EditConfig(layers=layers, gamma=gamma, templates=IMAGE_TEMPLATES)
    edit = rocr.unlearn(encoder, closing, [CONCEPT], collected, config)
    name, redirect = painting
    now = embedding(encoder, closing, name)
    first = before[name] - before[redirect]
    left = (now - before[redirect]).norm() / first.norm()
    moved = [float((embedding(encoder, closing, each) - before[each]).norm() / before[each].norm()) for each in OTHERS]
    assert left < 0.5
    assert max(moved) < 0.02
    edit.revert(encoder)
    without = EditConfig(layers=layers, gamma=gamma, templates=IMAGE_TEMPLATES, closing_keys=False)
    rocr.unlearn(encoder, closing, [CONCEPT], collected, without)
    assert (embedding(encoder, closing, name) - before[redirect]).norm() / first.norm() > left


@pytest.mark.parametrize(("make", "layers", "gamma"), [(clip, [0, 1], 300.0), (t5, [1, 3], 10.0)])
def test_variants_of_a_name_are_moved_where_they_are_asked_for(make, layers, gamma, closing, prompts):  # noqa: F811
    """By default an encoder has none, since other prompts move more."""
    encoder = make(len(closing))
    texts = [text + "<end>" * (24 if make is clip else 0) for text in prompts if CONCEPT.name not in text]
    misspelt = [f"a painting by {name}" for name in spelling_variants(CONCEPT.names, None, 0)[1:]]
    target = embedding(encoder, closing, f"a painting by {CONCEPT.redirect}")[-1]

    def distance():
        return sum(float((embedding(encoder, closing, text)[-1] - target).norm()) for text in misspelt)

    collected = rocr.collect_statistics(encoder, closing, texts, layers)
    left, recorded = [], []
    for variants in (None, "none", "spelling"):
        config = EditConfig(layers=layers, gamma=gamma, templates=IMAGE_TEMPLATES, variants=variants)
        edit = rocr.unlearn(encoder, closing, [CONCEPT], collected, config, guards=rocr.Guards(force=True))
        left.append(distance())
        recorded.append((edit.config.variants, "variants" in edit.report.by_count))
        edit.revert(encoder)
    assert left[0] == left[1] > 1.05 * left[2]
    assert recorded == [("none", False), ("none", False), ("spelling", False)]


def test_an_image_generator_no_longer_sees_a_concept(closing, prompts, tmp_path, monkeypatch):  # noqa: F811
    diffusers = pytest.importorskip("diffusers")
    encoder = clip(len(closing))
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=encoder, tokenizer=closing, unet=unet, scheduler=diffusers.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip

    def embed(text):
        return pipeline.encode_prompt(text, "cpu", 1, False)[0][0].detach()

    painting = [f"a painting by {name}" for name in (CONCEPT.name, CONCEPT.redirect)]
    before = {text: embed(text) for text in (*painting, *OTHERS)}
    page = Path(__file__).parents[2] / "docs" / "text-encoders.md"
    block = re.search(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[1]
    defined = {"pipeline": pipeline, "prompts": [text for text in prompts if CONCEPT.name not in text]}
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(page), "exec"), defined)
    assert (tmp_path / "edited" / "text_encoder" / "model.safetensors").is_file()
    name, redirect = painting
    left = (embed(name) - before[redirect]).norm() / (before[name] - before[redirect]).norm()
    moved = [float((embed(each) - before[each]).norm() / before[each].norm()) for each in OTHERS]
    assert left < 0.5
    assert max(moved) < 0.02
    images = pipeline(name, num_inference_steps=1, output_type="np", height=16, width=16).images
    assert images.shape[0] == 1
    defined["edit"].revert(pipeline.text_encoder)
    assert torch.equal(embed(name), before[name])
