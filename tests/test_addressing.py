import pytest
from conftest import build

import jdelta
from jdelta.hosts.adapting import adapt


@pytest.fixture(scope="module")
def distilbert():
    return list(adapt(build("distilbert", "FlaxDistilBertModel", {"n_layers": 11}, _do_init=False)).structure().modules)


@pytest.fixture(scope="module")
def roberta():
    config = {"num_hidden_layers": 11}
    return list(adapt(build("roberta", "FlaxRobertaModel", config, _do_init=False)).structure().modules)


def test_end_match_of_one_layer_is_not_that_of_layer_ten(distilbert):
    assert jdelta.match(distilbert, ["0.attention.out_lin"]) == ["transformer.layer.0.attention.out_lin"]


def test_end_match_means_every_layer(distilbert):
    expected = [f"transformer.layer.{i}.attention.out_lin" for i in range(11)]
    assert jdelta.match(distilbert, ["attention.out_lin"]) == expected


def test_regex_starts_at_a_dot(roberta):
    assert jdelta.match(roberta, [r"[r](\d)+\.output.dense"]) == [f"encoder.layer.{i}.output.dense" for i in range(11)]


def test_end_match_of_attention_output_is_only_that(roberta):
    expected = [f"encoder.layer.{i}.attention.output.dense" for i in range(11)]
    assert jdelta.match(roberta, ["attention.output.dense"]) == expected


def test_end_match_needs_a_dot_boundary():
    assert jdelta.match(["x.attn", "x.c_attn", "attn"], ["attn"]) == ["x.attn", "attn"]


def test_regex_must_reach_the_end_of_the_name():
    assert jdelta.match(["a.q.b", "a.q"], ["[r]q"]) == ["a.q"]


def test_regex_that_matches_in_the_middle_too_still_counts_at_the_end():
    # OpenDelta looks at the first match only and misses this one.
    assert jdelta.match(["q.a.q"], ["[r]q"]) == ["q.a.q"]


def test_regex_choice():
    names = ["h.0.attn", "h.1.attn", "h.2.attn"]
    assert jdelta.match(names, [r"[r][02]\.attn"]) == ["h.0.attn", "h.2.attn"]


def test_order_is_that_of_the_names_and_each_is_given_once():
    assert jdelta.match(["b.q", "a.v", "a.q"], ["q", "v", "a.q"]) == ["b.q", "a.v", "a.q"]


def test_exclusion_covers_what_is_below():
    names = ["0", "0.attn", "0.attn.q", "1.attn", "1.attn.q"]
    assert jdelta.match(names, ["q"], exclude=["0.attn"]) == ["1.attn.q"]
    assert jdelta.match(names, ["q"], exclude=["[r]1"]) == ["0.attn.q"]


def test_a_pattern_that_matches_nothing_shows_the_closest(roberta):
    with pytest.raises(ValueError, match=r"no module ends with 'qeury'\. Closest: ….query \(11 modules\)"):
        jdelta.match(roberta, ["qeury"])
    with pytest.raises(ValueError, match=r"exclude: no module ends with 'valeu'\. Closest: ….value"):
        jdelta.match(roberta, ["query"], exclude=["valeu"])


def test_an_invalid_regex_says_so():
    with pytest.raises(ValueError, match=r"'\[r\]\(\\\\d' is not a valid regular expression"):
        jdelta.match(["a"], [r"[r](\d"])


@pytest.mark.parametrize("pattern", ["", "[r]"])
def test_an_empty_pattern_is_an_error(pattern):
    with pytest.raises(ValueError, match="empty pattern"):
        jdelta.match(["a"], [pattern])


def test_a_bare_string_is_a_type_error_that_says_what_to_write():
    with pytest.raises(TypeError, match=r"Write \['query'\]"):
        jdelta.match(["query"], "query")
    with pytest.raises(TypeError, match="a pattern is a string, got 3"):
        jdelta.match(["query"], [3])
