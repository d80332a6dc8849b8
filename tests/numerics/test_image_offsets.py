"""Models that keep an offset of positions from their last prompt, as Qwen2-VL does, compute the same after it."""

import pytest
import torch

from rocr import Concept, EditConfig
from rocr.evaluation.scoring import score_answers, tokenize_questions
from rocr.keys.plan import plan_keys
from rocr.keys.read import read_states
from rocr.model.architecture import find_architecture
from rocr.model.generate import ask
from tests.support.vision import image_processor, qwen2_5_vl

pytestmark = pytest.mark.usefixtures("one_thread")
ROUNDING = 5e-6  # as in test_prefix_cache.py
PEOPLE = [Concept(f"{first} {last}", "Blaise Pascal") for first in ("Ada", "Robert", "x") for last in ("Byron", "Rose")]


@pytest.fixture(scope="module")
def model(tokenizer):
    return qwen2_5_vl(tokenizer)


@pytest.fixture
def no_minimum(monkeypatch):
    """Share every prefix, however short."""
    monkeypatch.setattr("rocr.keys.batches.MIN_SAVED_TOKENS", 1)


def read_an_image(model):
    """Run a prompt with an image of 16 patches, which moves the positions after it."""
    pytest.importorskip("PIL")
    from tests.support.vision import image

    processor = image_processor("Qwen2VLImageProcessor", patch_size=4, min_pixels=64, max_pixels=4096)
    inputs = processor(images=image(0), return_tensors="pt")
    config = model.config
    count = int(inputs["image_grid_thw"].prod()) // 4
    tokens = [5, config.vision_start_token_id, *[config.image_token_id] * count, config.vision_end_token_id, 7]
    ids = torch.tensor([tokens])
    with torch.no_grad():
        model(input_ids=ids, mm_token_type_ids=(ids == config.image_token_id).int(), **inputs)
    assert model.model.rope_deltas is not None and bool(model.model.rope_deltas.any())


def test_keys_do_not_depend_on_the_prompt_before(model, tokenizer, no_minimum):
    architecture = find_architecture(model)
    reading = plan_keys(tokenizer, PEOPLE, EditConfig(layers=(1, 3))).keys
    expected = read_states(architecture, reading, 3, 1, share=False)
    for prompt in (read_an_image, lambda each: ask(each, tokenizer, ["Who is Ada?", "And who is it?"], 3)):
        prompt(model)
        offset = model.model.rope_deltas.clone()
        found = read_states(architecture, reading, 3, 1)
        for name in ("hidden", "keys"):
            mine, theirs = getattr(found, name), getattr(expected, name)
            assert (mine - theirs).norm() < ROUNDING * theirs.norm(), name
        assert torch.equal(model.model.rope_deltas, offset), "a later prompt of the caller may need it"


def test_scores_do_not_depend_on_the_prompt_before(model, tokenizer):
    answers = [["Ada", " rain falls"], ["Blaise Pascal", " it"]]
    texts = ["What is known about the roses? It is", "What is known about the sun? It is"]
    questions = tokenize_questions(tokenizer, texts, answers)

    def scores():
        found = {}
        score_answers(model, questions, found.__setitem__)
        return [score.nll for index in sorted(found) for score in found[index]]

    model.model.rope_deltas = None
    expected = scores()
    read_an_image(model)
    assert len(expected) == 4 and scores() == pytest.approx(expected, rel=1e-5)
