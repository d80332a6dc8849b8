"""Statistics, lists, evaluations and interrupted runs that rocr 0.1 wrote: read, and gone on with."""

import hashlib
import importlib.metadata
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import rocr
from tests.support.of_0_1 import BFLOAT16, CLOSE, DATA, EDIT, assert_alike, done, read, run

pytestmark = pytest.mark.usefixtures("one_thread")
PACKAGES = ("rocr", "torch", "transformers")
EXPECTED, REPORT = read("expected.json"), read("output/report.json")
TOKENS = {"": 554, "-first": 242, "-second": 310, "-merged": 552}
"""Of the files of statistics."""


def sha256(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def rewrite(path, change):
    """Change the header and the tensors of a file of rocr's."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["rocr"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file is no mapping)
    change(header, tensors)
    save_file(tensors, path, metadata={"rocr": json.dumps(header)})


class TestStatistics:
    @pytest.mark.parametrize("part", TOKENS)
    def test_what_a_file_says(self, part):
        statistics = rocr.Statistics.load(DATA / f"statistics{part}.safetensors")
        assert statistics.layers == (0, 1)
        assert statistics.tokens == TOKENS[part]
        assert statistics.fingerprint.to_json() == REPORT["fingerprint"]
        assert (statistics.provenance.dtype, statistics.provenance.length) == ("float32", 16)

    @pytest.mark.parametrize(("part", "kind"), [("", "statistics"), ("-merged", "merged")])
    def test_the_moments_of_a_file(self, part, kind):
        statistics = rocr.Statistics.load(DATA / f"statistics{part}.safetensors")
        assert {str(n): sha256(statistics.second_moment(n)) for n in statistics.layers} == EXPECTED[kind]

    def test_two_files_merge_to_the_same_bytes(self):
        first, second, merged = (
            rocr.Statistics.load(DATA / f"statistics-{part}.safetensors") for part in ("first", "second", "merged")
        )
        both = first.merge(second)
        assert (both.tokens, both.text, both.layers) == (merged.tokens, merged.text, merged.layers)
        assert {str(n): sha256(both.second_moment(n)) for n in both.layers} == EXPECTED["merged"]

    @pytest.fixture
    def going_on(self, data, tmp_path):
        """going_on(change): the statistics that today's rocr ends with from the checkpoint, which is changed first."""

        def collect(change=lambda header, tensors: None):
            def of_today(header, tensors):
                """Say the versions of today, since keys that two of them computed are never summed."""
                used = header["identity"]["computed"][-1]
                assert used.keys() == set(PACKAGES)
                used.update({name: importlib.metadata.version(name) for name in PACKAGES[1:]}, rocr=rocr.__version__)
                change(header, tensors)

            shutil.copy("statistics.checkpoint", tmp_path / "out.checkpoint")
            rewrite(tmp_path / "out.checkpoint", of_today)
            arguments = ("--layers", "0,1", "--length", 16, "--batch-tokens", 64, "--out", tmp_path / "out")
            found = run("stats", "model", "--text", "first.txt", "second.txt", *arguments)
            return found, tmp_path / "out"

        return collect

    def test_an_interrupted_collection_goes_on(self, going_on):
        found, out = going_on()
        assert found.code == 0, found.errors
        statistics, expected = rocr.Statistics.load(out), rocr.Statistics.load(DATA / "statistics.safetensors")
        assert (statistics.tokens, statistics.text) == (expected.tokens, expected.text)
        for layer in expected.layers:
            scale = expected.second_moment(layer).abs().max().item()
            torch.testing.assert_close(
                statistics.second_moment(layer), expected.second_moment(layer), rtol=0, atol=CLOSE * scale
            )
        assert not out.with_name("out.checkpoint").exists()

    def test_it_goes_on_from_what_the_checkpoint_holds(self, going_on):
        def add(header, tensors):
            tensors["1"][0, 0] += 554_000

        found, out = going_on(add)
        assert found.code == 0, found.errors
        assert rocr.Statistics.load(out).second_moment(1)[0, 0].item() == pytest.approx(1000, rel=0.1)

    def test_the_checkpoint_of_another_collection_is_refused(self, going_on):
        found, out = going_on(lambda header, tensors: header["identity"].update(layers=[0]))
        assert found.code == 2
        assert not out.exists()


class TestInfo:
    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("statistics.safetensors", "rocr statistics 1"),
            ("statistics-merged.safetensors", "rocr statistics 1"),
            ("statistics.checkpoint", "rocr checkpoint 1"),
            (EDIT, "rocr edit 1"),
            (BFLOAT16, "rocr edit 1"),
            ("output", "rocr edit 1"),
            ("output/report.json", "rocr report 1"),
            ("reverted", "rocr report 1"),
        ],
    )
    def test_info(self, data, name, kind):
        assert done("info", name)["format"] == kind

    def test_info_of_a_report_is_the_report(self, data):
        assert done("info", "output/report.json") == REPORT

    def test_info_of_statistics_and_edits(self, data):
        assert done("info", "statistics.safetensors")["tokens"] == 554
        assert [concept["name"] for concept in done("info", "output")["concepts"]] == ["Ada Byron", "Robert Downey Jr."]


class TestLists:
    @pytest.mark.parametrize("kind", ["txt", "csv", "jsonl"])
    def test_concepts(self, kind):
        assert rocr.load_concepts(DATA / f"concepts.{kind}") == [
            rocr.Concept("Ada Byron", "Blaise Pascal", ("the countess", "Ada")),
            rocr.Concept("Robert Downey Jr.", "a gardener", ("Downey",)),
        ]

    def test_redirects_are_a_list_of_concepts(self):
        found = rocr.load_concepts(DATA / "redirects.jsonl")
        assert [(c.name, c.redirect) for c in found] == [
            ("Ada Byron", "a gardener"),
            ("Robert Downey Jr.", "Blaise Pascal"),
            ("Grace Hopper", "a gardener"),
        ]

    def test_redirects_are_chosen_alike(self, data, tmp_path):
        arguments = (
            "--probes",
            "probes.jsonl",
            "--among",
            "Blaise Pascal",
            "a gardener",
            "--out",
            tmp_path / "out.jsonl",
        )
        done("redirects", "model", *arguments)
        assert rocr.load_concepts(tmp_path / "out.jsonl") == rocr.load_concepts("redirects.jsonl")

    def test_probes(self):
        probes = rocr.load_probes(DATA / "probes.jsonl")
        assert [(p.subject, p.form, p.split) for p in probes] == [
            ("Ada Byron", "qa", "forget"),
            ("Robert Downey Jr.", "qa", "forget"),
            ("Grace Hopper", "fb", "retain"),
        ]
        assert probes[0].distractors == ("Rome", "a key", "rain")
        assert probes[0].cloze == "Ada Byron was born in ___."
        assert {variant: wording.answer for variant, wording in probes[0].wordings.items()} == {
            **dict.fromkeys(("misspelt", "abbreviated", "described"), "London"),
            "translated": "Londres",
        }

    def test_a_folder_of_probes(self):
        probes = rocr.load_probes(DATA / "probes")
        assert [(p.subject, p.form, p.split, p.answer) for p in probes] == [
            ("Ada Byron", "qa", "forget", "programs"),
            ("Ada Byron", "fb", "retain", "air"),
        ]


class TestEvaluations:
    def test_a_report_says_the_same(self, data, tmp_path):
        done(
            *("eval", "model", "--probes", "probes.jsonl", "--edit", EDIT, "--known", 0),
            *("--text", "first.txt", "second.txt", "--utility", "utility.jsonl", "--out", tmp_path / "out.json"),
        )
        assert_alike(json.loads((tmp_path / "out.json").read_text(encoding="utf-8")), read("evaluation.json"))

    def test_a_comparison_says_the_same(self, data, tmp_path):
        done(
            *("compare", "model", "--probes", "probes.jsonl", "--targets", "Ada Byron", "--redirect", "Blaise Pascal"),
            *("--methods", "original,in-context,rocr", "--forms", "qa,fb", "--text", "first.txt", "--tokens", 200),
            *("--out", tmp_path / "out.json"),
        )
        found, expected = json.loads((tmp_path / "out.json").read_text(encoding="utf-8")), read("comparison.json")
        # The default settings of rocr have changed; its row has the same fields.
        mine, before = found["results"].pop(), expected["results"].pop()
        assert mine["method"] == before["method"] == "rocr" and before.keys() <= mine.keys()
        assert_alike(found, expected)

    @pytest.fixture
    def going_on(self, data, tmp_path):
        """going_on(*more): `rocr eval` with the journal, in which the second score is 1."""
        lines = (data / "evaluation.json.journal-before").read_text(encoding="utf-8").splitlines()
        number, ((_, accuracy, extraction),) = json.loads(lines[2])
        assert number == 0, "the first question of the first probe"
        lines[2] = json.dumps([number, [[0.0, accuracy, extraction]]])
        (tmp_path / "out.json.journal-before").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return lambda *more: run("eval", "model", "--probes", "probes.jsonl", *more, "--out", tmp_path / "out.json")

    def test_an_interrupted_evaluation_goes_on_from_its_journal(self, going_on, tmp_path):
        found = going_on()
        assert found.code == 0, found.errors
        items, expected = found.json["evaluation"]["items"], read("evaluation.json")["before"]["items"]
        assert items[0]["score"] == 1.0
        assert_alike(items[1:], expected[1:])
        assert not (tmp_path / "out.json.journal-before").exists()

    def test_the_journal_of_another_evaluation_is_refused(self, going_on, tmp_path):
        assert going_on("--forms", "qa").code == 2
        assert (tmp_path / "out.json.journal-before").exists()
