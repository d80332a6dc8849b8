"""Fuzz the readers with coverage as the guide (atheris); a script of test_fuzz_coverage.py.

Arguments: a reader, a folder of seeds, how many inputs. Ends with code 0 if each gave a value or rocr's own error.
"""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["rocr"]):
    import rocr
    import rocr.concepts
    import rocr.evaluation.probes.probe
    import rocr.model.check_folder
    from rocr.errors import RocrError

READERS = {
    "concepts.txt": rocr.load_concepts,
    "concepts.csv": rocr.load_concepts,
    "concepts.jsonl": rocr.load_concepts,
    "probes.jsonl": rocr.load_probes,
    "statistics": rocr.Statistics.load,
    "edit": rocr.Edit.load,
    "config.json": lambda path: rocr.model.check_folder.check_model_folder(path.parent),
    rocr.model.check_folder.INDEX_FILE: lambda path: rocr.model.check_folder.check_model_folder(path.parent),
}


def main(name: str, seeds: str, folder: str, runs: str) -> None:
    """Fuzz one reader; the file lies in `folder`, whose other files are those of a model."""
    path = Path(folder, name)

    def test_one(data: bytes) -> None:
        path.write_bytes(data)
        try:
            READERS[name](path)
        except RocrError as error:
            assert str(error)

    atheris.Setup([sys.argv[0], f"-runs={runs}", "-max_len=4096", "-rss_limit_mb=3000", "-timeout=30", seeds], test_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
