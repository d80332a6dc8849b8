import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rocr.concepts import Concept, check_concepts, load_concepts
from rocr.errors import InputError

VISIBLE = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=5)
NAMES = st.one_of(
    VISIBLE,
    st.text("abcXYé", min_size=1, max_size=5),
    st.text("aAß\u017f\u212a\u0301\u00a0 \u200b|>-#{},\"'\\\ud800", max_size=6),
)
REDIRECTS = st.sampled_from(["Z", "Z y"])
LINES = st.one_of(
    st.builds("{} | {} -> {}".format, NAMES, NAMES, REDIRECTS),
    st.builds("{},{}".format, NAMES, REDIRECTS),
    st.builds(
        lambda *values: json.dumps(dict(zip(("name", "redirect", "aliases"), values, strict=True))),
        st.one_of(NAMES, NAMES, st.none() | st.integers()),
        st.one_of(REDIRECTS, NAMES, st.floats()),
        st.one_of(st.lists(NAMES, max_size=2), NAMES),
    ),
    st.sampled_from(["name,redirect", "", "# x", "[" * 5000, '"', '{"name": "a", "name": "b"}']),
)
FILES = st.one_of(
    st.binary(max_size=200),
    st.lists(LINES, max_size=4).map(lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass")),
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(content=FILES, suffix=st.sampled_from([".txt", ".csv", ".jsonl"]), default=REDIRECTS | NAMES | st.none())
def test_any_bytes_give_an_input_error_or_concepts_that_keep_the_rules(
    tmp_path_factory, tally, content, suffix, default
):
    tally("fuzz executions")
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    path.write_bytes(content)
    try:
        concepts = load_concepts(path, default)
    except InputError as error:
        assert str(error)
        str(error).encode()
    else:
        check_concepts(concepts)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(
        st.builds(Concept, VISIBLE, REDIRECTS, st.lists(VISIBLE, max_size=2).map(tuple)),
        min_size=1,
        max_size=4,
    )
)
def test_concepts_that_keep_the_rules_survive_a_file(tmp_path_factory, tally, concepts):
    tally("fuzz executions")
    path = tmp_path_factory.getbasetemp() / "round_trip.jsonl"
    path.write_text("\n".join(json.dumps(vars(concept)) for concept in concepts))
    try:
        check_concepts(concepts)
    except InputError:
        with pytest.raises(InputError):
            load_concepts(path)
    else:
        assert load_concepts(path) == concepts
