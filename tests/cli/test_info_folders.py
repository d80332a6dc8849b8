"""`rocr info` of an output folder, and of a file that it does not know."""

import json
import subprocess
import sys


def test_a_folder_is_summed_up_without_torch(files):
    script = (
        "import sys; from rocr.cli.main import main; code = main(['info', sys.argv[1]]); "
        "sys.exit(code or ('torch' in sys.modules and 'torch was imported'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(files.edited)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for words in ("made from", "Ada Byron -> Blaise Pascal", "ridge 1,", "model.safetensors", "edited/report.json"):
        assert words in done.stdout.replace("\n", "")
    assert "fingerprint" not in done.stdout and len(done.stdout.splitlines()) < 45


def test_json_of_a_folder_is_its_edit(files, command):
    document = json.loads(command("info", files.edited, "--json").output)
    assert document["format"].startswith("rocr edit") and document["config"]["ridge"] == 1.0


def test_a_damaged_report_is_refused_in_one_sentence(files, command, tmp_path):
    report = json.loads((files.edited / "report.json").read_text(encoding="utf-8"))
    for name, value in (("concepts", 3), ("concepts", [{}]), ("config", {}), ("layers", [1]), ("versions", None)):
        (tmp_path / "report.json").write_text(json.dumps({**report, name: value}), encoding="utf-8")
        done = command("info", tmp_path)
        assert done.code == 2 and "report.json is damaged" in done.errors.replace("\n", ""), (name, done.errors)


def test_a_file_of_another_kind_is_named_as_such(command, tmp_path):
    for content in ("Ada Byron\n", "", "Ada Byron | the countess -> Blaise Pascal\n" * 9):
        (tmp_path / "people.list").write_text(content, encoding="utf-8")
        done = command("info", tmp_path / "people.list")
        assert done.code == 2 and "A list of concepts is named .txt, .csv or .jsonl" in done.errors
        assert "header" not in done.errors
