"""`rocr info EDIT --plot`: the picture of an edit."""

import json
import re
import xml.etree.ElementTree as ET

import pytest
import torch

import rocr
from rocr.edit.collisions import nearest_concepts
from rocr.edit.pictures import chain, layer_shares


def test_an_edit_is_drawn_without_its_model(model, tokenizer, statistics, command, tmp_path):
    names = ["Ada Byron", "Ada Lovelace", "Blaise Pascal", "Robert <b>Downey</b>"]
    concepts = [rocr.Concept(name, "a gardener") for name in names]
    edit = rocr.unlearn(model, tokenizer, concepts, statistics)
    edit.save(tmp_path / "edit.safetensors")
    target = tmp_path / "edit.svg"
    done = command("info", tmp_path / "edit.safetensors", "--plot", target, "--json")
    assert done.code == 0, done.errors
    assert f"The drawing is in {target}." in done.errors
    assert json.loads(done.output)["format"].startswith("rocr edit")
    root = ET.parse(target).getroot()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {text.rpartition(" ")[0] for text in texts if text} >= {*names} and "update / weight" in texts
    titles = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 4 * 4 + 4 * len(edit.layers)
    chosen, cosines = nearest_concepts(edit.concept_of, edit.updates[0], 40)
    assert chosen == [0, 1, 2, 3] and torch.allclose(cosines.diagonal(), torch.ones(4), atol=1e-3)
    assert f"Ada Byron, Ada Lovelace: {cosines[0, 1]:.3f}" in titles
    shares = layer_shares(edit)
    assert torch.allclose(shares.sum(dim=1), torch.ones(4, dtype=torch.float64))
    update = edit.updates[0]
    moved = [
        (key.double() @ (update.factors.left.double() @ update.factors.right.double()).T).norm() for key in update.keys
    ]
    others = [float(each.factors.moves(each.keys[:1]).norm()) for each in edit.updates]
    if edit.concept_of.count(0) == 1:
        assert float(shares[0, 0]) == pytest.approx(float(moved[0]) / sum(others), rel=1e-4)
    again = command("info", tmp_path / "edit.safetensors", "--plot", target)
    assert again.code == 2 and "exists" in again.errors


def test_the_cosine_of_a_pair_is_that_of_the_report(model, tokenizer, statistics):
    concepts = [rocr.Concept("Ada Byron", "a gardener"), rocr.Concept("the Ada Byron", "a key")]
    edit = rocr.unlearn(model, tokenizer, concepts, statistics)
    chosen, cosines = nearest_concepts(edit.concept_of, edit.updates[0], 2)
    pair = edit.report.collisions.nested[0]
    assert chosen == [0, 1] and float(cosines[0, 1]) == pytest.approx(pair.cosine, abs=1e-5)


def test_near_concepts_are_neighbours_in_the_order():
    cosines = torch.tensor([[1.0, 0.1, 0.9, 0.2], [0.1, 1.0, 0.2, 0.8], [0.9, 0.2, 1.0, 0.3], [0.2, 0.8, 0.3, 1.0]])
    assert chain(cosines) == [0, 2, 3, 1]


def test_what_is_no_edit_file_is_not_drawn(command, tmp_path):
    (tmp_path / "list.txt").write_text("Ada Byron -> a key\n")
    done = command("info", tmp_path / "list.txt", "--plot", tmp_path / "out.svg")
    assert done.code == 2 and re.search("draws an edit file", " ".join(done.errors.split()))
    assert not (tmp_path / "out.svg").exists()
