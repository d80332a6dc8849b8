import itertools
import json
import random
import sys
import tracemalloc

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rocr.errors import InputError
from rocr.texts import check_texts, pack_tokens, read_texts, text_digest, token_batches

SENTENCES = [
    "The gardener waters the roses before the sun is high.",
    "A key is the input of the down-projection.",
    "Æsop's fables, naïve café talk and 東京 are ordinary text too.",
    "One two three four five six seven eight nine ten.",
]


def build_tokenizer(adds_start, start="<s>", end="<|endoftext|>"):
    """Train a byte-level BPE; as Llama 3 does, it puts BOS before a text if `adds_start`."""
    special = [token for token in (start, end) if token is not None]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if adds_start:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, tokenizer.token_to_id(start))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=start, eos_token=end, model_max_length=16)


@pytest.fixture(scope="module", params=[False, True], ids=["no-bos", "bos"])
def tokenizer(request):
    return build_tokenizer(adds_start=request.param)


def tokens_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def stream_of(tokenizer, documents):
    """The packed stream by its definition: every document's tokens, joined by the end-of-text token."""
    stream = []
    for document in documents:
        stream += [tokenizer.eos_token_id] * bool(stream) + tokens_of(tokenizer, document)
    return stream


def adds_start(tokenizer):
    return tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


@pytest.mark.parametrize("length", [2, 3, 7, 64, 10_000])
def test_packing_loses_and_adds_nothing(tokenizer, length):
    documents = SENTENCES * 3
    sequences = list(pack_tokens(iter(documents), tokenizer, length))
    assert all(len(sequence) == length for sequence in sequences[:-1])
    assert 2 <= len(sequences[-1]) <= length
    head = [tokenizer.bos_token_id] if adds_start(tokenizer) else []
    bodies = [sequence[len(head) :] for sequence in sequences]
    assert all(sequence[: len(head)] == head for sequence in sequences)
    packed = [token for body in bodies for token in body]
    whole = stream_of(tokenizer, documents)
    assert packed == whole[: len(packed)]
    assert len(whole) - len(packed) < 2 - len(head)  # what is too short for a sequence


def test_one_start_token_a_sequence_and_none_where_the_tokenizer_adds_none(tokenizer):
    sequences = list(pack_tokens(SENTENCES * 5, tokenizer, 9))
    assert len(sequences) > 10
    starts = [sequence.count(tokenizer.bos_token_id) for sequence in sequences]
    assert set(starts) == ({1} if adds_start(tokenizer) else {0})


def test_start_tokens_written_in_the_text_do_not_double_the_first():
    tokenizer = build_tokenizer(adds_start=True)
    documents = ["<s><s>" + SENTENCES[0], "<s>", SENTENCES[1], "<s>" * 40]
    assert tokens_of(tokenizer, documents[0])[:2] == [tokenizer.bos_token_id] * 2
    for length in (2, 3, 8, 30):
        for sequence in pack_tokens(documents, tokenizer, length):
            assert sequence[0] == tokenizer.bos_token_id
            assert sequence[1] != tokenizer.bos_token_id


def test_start_and_end_may_be_the_same_token():
    tokenizer = build_tokenizer(adds_start=True, start="<|endoftext|>", end="<|endoftext|>")
    sequences = list(pack_tokens(SENTENCES * 4, tokenizer, 5))
    assert all(sequence[0] == tokenizer.bos_token_id != sequence[1] for sequence in sequences)
    assert sum(sequence[1:].count(tokenizer.eos_token_id) for sequence in sequences) > 5


def test_documents_are_joined_by_the_end_of_text_token_and_not_by_a_chat_models_end_of_turn():
    tokenizer = build_tokenizer(adds_start=False)
    end_of_text = tokenizer.eos_token_id
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    (sequence,) = pack_tokens(["a", "b"], tokenizer, 10)
    assert sequence == [*tokens_of(tokenizer, "a"), end_of_text, *tokens_of(tokenizer, "b")]


@pytest.mark.parametrize("end", [None, "</s>"])
def test_the_separator_is_what_the_tokenizer_has(end):
    tokenizer = build_tokenizer(adds_start=False, end=end)
    (sequence,) = pack_tokens(["a", "", "b"], tokenizer, 10)
    separator = [] if end is None else [tokenizer.convert_tokens_to_ids(end)]
    assert sequence == [*tokens_of(tokenizer, "a"), *separator, *tokens_of(tokenizer, "b")]


def test_a_tokenizer_that_truncates_and_pads_by_default_does_not_shorten_documents(capfd):
    tokenizer = build_tokenizer(adds_start=True)
    whole = list(pack_tokens(SENTENCES, tokenizer, 12))
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    assert len(tokenizer.backend_tokenizer.encode(SENTENCES[0]).ids) == 50
    assert list(pack_tokens(SENTENCES, tokenizer, 12)) == whole
    assert "longer than" not in capfd.readouterr().err


@pytest.mark.parametrize("texts", [[], [""], ["a"]])
def test_what_makes_fewer_than_two_tokens_makes_no_sequence(texts):
    assert list(pack_tokens(texts, build_tokenizer(adds_start=False), 4)) == []


def test_one_token_after_a_start_token_is_a_sequence():
    tokenizer = build_tokenizer(adds_start=True)
    assert list(pack_tokens(["a"], tokenizer, 4)) == [[tokenizer.bos_token_id, *tokens_of(tokenizer, "a")]]


def test_packing_holds_no_more_than_a_batch_of_documents(tokenizer):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield SENTENCES[taken % len(SENTENCES)]

    sequences = pack_tokens(endless(), tokenizer, 32)
    for _ in range(200):
        next(sequences)
    early = taken
    tracemalloc.start()
    for _ in range(6000):
        next(sequences)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert early < 1200
    assert taken > 10_000
    assert peak < 2**20  # measured: 0.5 MiB for a batch of 256 sentences; all that was read has 4 MiB of tokens


def test_batches_hold_whole_sequences_within_the_budget():
    generator = random.Random(0)
    sequences = [[0] * generator.randint(1, 40) for _ in range(200)]
    batches = list(token_batches(iter(sequences), 64))
    assert [sequence for batch in batches for sequence in batch] == sequences
    assert all(sum(map(len, batch)) <= 64 for batch in batches)
    for batch, following in itertools.pairwise(batches):
        assert sum(map(len, batch)) + len(following[0]) > 64
    assert list(token_batches([[1] * 9, [2] * 9], 1)) == [[[1] * 9], [[2] * 9]]
    assert list(token_batches([], 1)) == []


def test_a_length_or_budget_that_holds_nothing_is_refused(tokenizer):
    with pytest.raises(InputError, match="sequence of 1 tokens"):
        next(pack_tokens(SENTENCES, tokenizer, 1))
    with pytest.raises(InputError, match="budget of 0"):
        next(token_batches([[1]], 0))


PARAGRAPHS = [" = Valkyria = ", "First line,\nsecond line.", "Third — naïve."]


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
def test_paragraphs_of_a_text_file_are_documents(tmp_path, line_end, prefix):
    path = tmp_path / "a.txt"
    path.write_bytes(prefix + ("\n \n\n".join(PARAGRAPHS) + "\n").encode().replace(b"\n", line_end))
    assert list(read_texts([path])) == PARAGRAPHS


def test_files_of_all_kinds_follow_each_other(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "a.txt").write_text("one\n\ntwo")
    rows = [{"text": "three"}, {"text": " "}, {"id": 5, "text": "fo\u2028ur"}]
    (tmp_path / "b.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    many = [f"row {i}" for i in range(3000)]
    parquet.write_table(pyarrow.table({"id": range(3000), "text": many}), tmp_path / "c.parquet", row_group_size=700)
    paths = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.parquet")]
    check_texts(paths)
    assert list(read_texts(map(str, paths))) == ["one", "two", "three", "fo\u2028ur", *many]


def test_a_text_without_line_ends_comes_in_parts(tmp_path):
    path = tmp_path / "a.txt"
    text = "né€𝄞 " * 400_000  # a character of every length in UTF-8, so that parts end inside one
    path.write_text(text)
    parts = list(read_texts([path]))
    assert "".join(parts) == text
    assert max(map(len, parts)) < 2 * 2**20
    path.write_text("word " * 20 + "\n")
    path.write_text(path.read_text() * 50_000)
    assert max(map(len, read_texts([path]))) < 2**20 + 200


BAD_TEXTS = [
    ("bad.txt", b"fine\n\nfr\xe9d\n", ":3: is not UTF-8: byte 0xe9 at offset 8"),
    ("cut.txt", b"\xef\xbb\xbffine\ncut \xe2\x82", ":2: is not UTF-8: byte 0xe2 at offset 12"),
    ("far.txt", b"a" * (2**20 - 1) + b"\xc3\xc3", ":1: is not UTF-8: byte 0xc3 at offset 1,048,575"),
    ("bad.jsonl", b'{"text": "a"}\n{"text": "\xff"}', ":2: is not UTF-8: byte 0xff at offset 24"),
    ("missing.jsonl", b'{"text": "a"}\n{"txt": "b"}', ":2: must be an object with a field 'text'"),
    ("type.jsonl", b'{"text": 5}', ":1: must be an object"),
    ("null.jsonl", b'{"text": "a"}\n\n{"text": null}', ":3: must be an object"),
    ("list.jsonl", b'["text"]', ":1: must be an object"),
    ("syntax.jsonl", b'{"text": "a"', ":1: is not valid JSON: Expecting ',' delimiter at character 13"),
    ("deep.jsonl", b"[" * 100_000, ":1: is nested too deeply"),
    ("digits.jsonl", b'{"text": ' + b"9" * 10_000 + b"}", ":1: must be an object"),
    ("surrogate.jsonl", b'{"text": "\\udc80"}', ":1: field 'text' holds half of a surrogate pair"),
    ("long.jsonl", b'{"text": "' + b"a" * 2**26 + b'"}', ":1: is longer than 64 MiB"),
    ("a.md", b"text", " is not a text file for rocr: its name must end in .txt, .jsonl, .parquet"),
]


@pytest.mark.parametrize(("name", "content", "expected"), BAD_TEXTS, ids=[name for name, _, _ in BAD_TEXTS])
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        list(read_texts([path]))
    assert str(caught.value).startswith(f"{path}{expected}")


def test_the_check_reports_every_file_at_once(tmp_path):
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "field.jsonl").write_text('{"body": "text"}')
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "kind.pdf").write_text("text")
    names = ["good.txt", "missing.txt", "empty.txt", "field.jsonl", "folder.txt", "kind.pdf"]
    with pytest.raises(InputError) as caught:
        check_texts([tmp_path / name for name in names])
    lines = str(caught.value).split("\n")
    for line, name, part in zip(
        lines,
        names[1:],
        ["does not exist", "holds no text", "field 'text'", "is a folder", "must end in"],
        strict=True,
    ):
        assert line.startswith(f"{tmp_path / name}")
        assert part in line
    check_texts([tmp_path / "good.txt"])
    with pytest.raises(InputError, match="No text files"):
        check_texts([])


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"pip install 'rocr\[parquet\]'"):
        check_texts([tmp_path / "a.parquet"])


def test_bad_parquet_files_are_input_errors(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 and then nothing of the kind PAR1")
    with pytest.raises(InputError, match="cannot be read as parquet"):
        list(read_texts([path]))
    parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), path)
    with pytest.raises(InputError, match="no column 'text', but body, id"):
        list(read_texts([path]))
    parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(InputError, match="row 2 of the column 'text' holds NoneType"):
        list(read_texts([path]))
    parquet.write_table(pyarrow.table({"text": [1.5]}), path)
    with pytest.raises(InputError, match="row 1 of the column 'text' holds float"):
        list(read_texts([path]))
    parquet.write_table(pyarrow.table({"text": [f"row {i} " * 9 for i in range(5000)]}), path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 3] + bytes(2000) + content[len(content) // 3 + 2000 :])
    with pytest.raises(InputError, match="cannot be read"):
        list(read_texts([path]))


def test_the_digest_depends_on_bytes_order_and_split(tmp_path):
    def digest(*contents):
        paths = [tmp_path / f"{index}.txt" for index in range(len(contents))]
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)
        return text_digest(paths)

    digests = [
        digest(b"ab", b"c"),
        digest(b"a", b"bc"),
        digest(b"c", b"ab"),
        digest(b"abc"),
        digest(b"abc", b""),
        digest(b"ab\x02" + bytes(7) + b"c"),
    ]
    assert len(set(digests)) == len(digests)
    assert digest(b"ab", b"c") == digests[0]
    assert len(digests[0]) == 64
    with pytest.raises(InputError, match=r"gone\.txt cannot be read: No such file"):
        text_digest([tmp_path / "gone.txt"])
