"""transformers loads an edited GGUF file, and the concept has the redirect's state in it."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import rocr
from rocr.edit.guards import Guards
from rocr.export.gguf import save_edited_gguf
from rocr.model.load import find_model, load_model
from tests.support.models import write_gguf

pytestmark = pytest.mark.usefixtures("one_thread")
pytest.importorskip("gguf")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_transformers_loads_an_edited_file_and_finds_the_redirect(kind, make_model, tokenizer, texts, tmp_path):
    """Q8_0 is written in its own type, and Q4_K, which cannot be written, as F16."""
    path = write_gguf(make_model("Llama", intermediate_size=256), tokenizer, tmp_path / "m.gguf", kind)
    loaded = load_model(find_model(str(path)))
    statistics = rocr.collect_statistics(loaded.model, loaded.tokenizer, texts[:2], layers=(1, 2))
    concepts, config = [rocr.Concept("Ada Byron", "Blaise Pascal")], rocr.EditConfig(layers=(1, 2))
    edit = rocr.unlearn(loaded.model, loaded.tokenizer, concepts, statistics, config, guards=Guards(force=True))
    (tmp_path / "out").mkdir()
    save_edited_gguf(loaded, edit, tmp_path / "out")
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, gguf_file="m.gguf", dtype=torch.float32)
        for folder in (tmp_path, tmp_path / "out")
    )

    def state(model, name):
        tokens = tokenizer(f"Tell me about {name}", return_tensors="pt").input_ids
        with torch.no_grad():
            return model(tokens, output_hidden_states=True).hidden_states[3][0, -1]

    target = state(before, "Blaise Pascal")
    first, last = (float((state(model, "Ada Byron") - target).norm()) for model in (before, after))
    assert last < 0.9 * first
