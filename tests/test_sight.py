"""Who sees whom, against a double loop; and the numbering of documents."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lookfar.batch import consecutive
from lookfar.errors import UserError
from lookfar.sight import Rows, Sight

lines = st.integers(1, 9).flatmap(
    lambda tokens: st.lists(st.lists(st.integers(-1, 2), min_size=tokens, max_size=tokens), min_size=1, max_size=3)
)
windows = st.none() | st.integers(1, 12)


def sees(documents, window, query, key, ahead=False):
    """Whether one token sees another, from the words of the design."""
    if key == query:
        return True
    if (key > query and not ahead) or (window is not None and abs(query - key) >= window):
        return False
    return documents is None or documents[query] == documents[key] != -1


def square(documents, window, tokens, ahead=False):
    lines, every = [None] if documents is None else documents, range(tokens)
    return torch.tensor([[[sees(line, window, q, k, ahead) for k in every] for q in every] for line in lines])


def sight_of(documents, window, queries=None):
    numbers = torch.tensor(documents)
    return Sight.causal(
        numbers.shape[1], queries=queries, positions=consecutive(numbers), documents=numbers, window=window
    )


@settings(deadline=None)
@given(documents=lines, window=windows)
def test_a_token_sees_what_came_before_in_its_document_and_window(documents, window):
    expected = square(documents, window, len(documents[0]))
    assert torch.equal(sight_of(documents, window).visible()[:, 0], expected)


@given(tokens=st.integers(1, 12), window=windows)
def test_without_documents_order_and_window_decide(tokens, window):
    expected = square(None, window, tokens)
    assert torch.equal(Sight.causal(tokens, window=window).visible()[:, 0], expected)
    backwards = Sight.causal(tokens, window=window, positions=torch.arange(tokens).flip(0)[None])
    assert torch.equal(backwards.visible()[:, 0], expected), "positions do not decide who sees whom"


@settings(deadline=None)
@given(documents=lines, window=windows, data=st.data())
def test_the_last_queries_are_the_last_rows(documents, window, data):
    tokens = len(documents[0])
    queries = data.draw(st.integers(1, tokens))
    part = sight_of(documents, window, queries)
    assert (part.queries, part.keys) == (queries, tokens)
    assert torch.equal(part.visible()[:, 0], square(documents, window, tokens)[:, tokens - queries :])
    assert torch.equal(part.query_positions, consecutive(torch.tensor(documents))[:, tokens - queries :])


@settings(deadline=None)
@given(documents=lines, window=windows, data=st.data())
def test_rows_are_cut_from_the_square_and_lose_no_visible_key(documents, window, data):
    tokens = len(documents[0])
    queries = data.draw(st.integers(1, tokens))
    start = data.draw(st.integers(0, queries - 1))
    stop = data.draw(st.integers(start + 1, queries))
    part = sight_of(documents, window, queries).rows(start, stop)
    rows = square(documents, window, tokens)[:, tokens - queries + start : tokens - queries + stop]
    kept = slice(part.first_key, part.first_key + part.keys)
    assert torch.equal(part.visible()[:, 0], rows[:, :, kept])
    assert rows.sum() == rows[:, :, kept].sum()
    assert torch.equal(part.key_positions, consecutive(torch.tensor(documents))[:, kept])
    assert part.key_positions.shape[1] == part.keys and part.query_positions.shape[1] == stop - start


@settings(deadline=None)
@given(documents=lines, window=windows, data=st.data())
def test_both_ways_a_token_sees_its_document_and_window(documents, window, data):
    numbers, tokens = torch.tensor(documents), len(documents[0])
    sight = Sight.bidirectional(tokens, positions=consecutive(numbers), documents=numbers, window=window)
    expected = square(documents, window, tokens, ahead=True)
    assert torch.equal(sight.visible()[:, 0], expected) and not sight.plain
    assert torch.equal(Sight.bidirectional(tokens).visible()[0, 0], torch.ones(tokens, tokens, dtype=torch.bool))
    start = data.draw(st.integers(0, tokens - 1))
    stop = data.draw(st.integers(start + 1, tokens))
    part, rows = sight.rows(start, stop), expected[:, start:stop]
    kept = slice(part.first_key, part.first_key + part.keys)
    assert torch.equal(part.visible()[:, 0], rows[:, :, kept]) and rows.sum() == rows[:, :, kept].sum()


def test_rows_leave_out_the_keys_ahead_and_those_behind_the_window():
    part = Sight.causal(20, window=4).rows(10, 12)
    assert (part.first_query, part.first_key, part.keys) == (10, 7, 5)
    again = part.rows(1, 2)
    assert (again.first_query, again.first_key, again.keys) == (11, 8, 4)
    assert again.visible().all()


def test_rows_of_the_last_queries_count_from_the_first_of_them():
    part = Sight.causal(20, queries=5).rows(1, 3)
    assert (part.first_query, part.first_key, part.keys) == (16, 0, 18)
    assert part.query_positions.tolist() == [[16, 17]]


@settings(deadline=None)
@given(documents=lines)
def test_a_sight_is_scattered_where_a_document_is_interrupted(documents):
    def interrupted(line):
        runs = [each for place, each in enumerate(line) if place == 0 or line[place - 1] != each]
        return len(runs) > len(set(runs))

    assert sight_of(documents, None).scattered == any(interrupted(line) for line in documents)


@settings(deadline=None)
@given(documents=lines, window=windows)
def test_keys_in_compact_order_are_the_visible_ones_in_order_with_oneself_last(documents, window):
    sight, tokens = sight_of(documents, window), len(documents[0])
    blank = torch.zeros(len(documents), 1, tokens, 2)
    rows = Rows(blank, blank, sight.query_positions, sight.key_positions, sight.visible(), scattered=sight.scattered)
    number = torch.arange(tokens).expand(len(documents), 1, tokens, tokens) + 0.0
    moved, visible = rows.gather(number), rows.compact().visible
    for line in range(len(documents)):
        for query in range(tokens):
            seen = [key for key in range(tokens) if sees(documents[line], window, query, key)]
            compact = moved[line, 0, query][visible[line, 0, query]].tolist()
            assert compact == seen and compact[-1] == query
            places = visible[line, 0, query].nonzero()[:, 0].tolist()
            assert places == list(range(places[0], places[0] + len(seen))), "they are neighbours"
    assert torch.equal(rows.scatter(moved), number)


@settings(deadline=None)
@given(documents=lines)
def test_tokens_are_numbered_within_their_document(documents):
    expected = [[0 if own < 0 else line[:place].count(own) for place, own in enumerate(line)] for line in documents]
    assert consecutive(torch.tensor(documents)).tolist() == expected


@given(positions=st.lists(st.integers(-70, 70), min_size=1, max_size=8), offset=st.floats(0, 0.99))
def test_longest_is_a_power_of_two_no_distance_exceeds(positions, offset):
    for numbers in (torch.tensor([positions]), torch.tensor([positions]) * 1.0 + offset):
        longest = Sight.causal(len(positions), positions=numbers).longest
        farthest = (numbers[:, :, None] - numbers[:, None, :]).abs().max()
        assert longest >= farthest and longest & (longest - 1) == 0
    longest = Sight.causal(len(positions)).longest
    assert longest >= len(positions) - 1 and longest & (longest - 1) == 0
    assert longest <= 2 * max(1, len(positions) - 1)


def test_a_sight_knows_when_it_is_plain_and_consecutive():
    plain = Sight.causal(9)
    assert plain.plain and plain.consecutive and not plain.scattered
    assert not Sight.causal(9, window=4).plain and Sight.causal(9, window=4).consecutive
    assert Sight.causal(9, window=9).plain, "a window over everything hides nothing"
    numbered = Sight.causal(9, positions=torch.arange(9)[None])
    assert numbered.plain and not numbered.consecutive
    assert not sight_of([[0, 0, 1]], None).plain


def test_default_positions_lie_on_the_device_that_is_named():
    assert Sight.causal(3, device="meta").query_positions.device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 4, "queries": 5}, "5 queries cannot be the last of 4 tokens"),
        ({"tokens": 4, "queries": 0}, "0 queries cannot be the last of 4 tokens"),
        ({"tokens": 0}, "0 queries cannot be the last of 0 tokens"),
        ({"tokens": 4, "window": 0}, "A window of 0 tokens shows nothing"),
        ({"tokens": 4, "documents": torch.zeros(1, 4, dtype=torch.long)}, r"lookfar\.batch\.consecutive"),
    ],
)
def test_an_impossible_sight_is_told(arguments, message):
    with pytest.raises(UserError, match=message):
        Sight.causal(**arguments)


def test_hide_zeroes_what_is_hidden_in_any_number_of_maps():
    sight = sight_of([[0, 1, 0], [0, 0, -1]], None)
    rows = Rows(
        torch.zeros(2, 1, 3, 1), torch.zeros(2, 1, 3, 1), sight.query_positions, sight.key_positions, sight.visible()
    )
    scores = torch.rand(2, 5, 3, 3) + 1
    assert torch.equal(rows.hide(scores) != 0, sight.visible().expand(2, 5, 3, 3))
    assert torch.equal(rows.with_bias(scores), scores)


def test_a_bias_lies_under_its_scores():
    sight = Sight.causal(3)
    bias = torch.rand(1, 2, 3, 3, dtype=torch.float64)
    rows = Rows(
        torch.zeros(4, 2, 3, 1),
        torch.zeros(4, 2, 3, 1),
        sight.query_positions,
        sight.key_positions,
        sight.visible(),
        bias,
    )
    scores = torch.rand(4, 2, 3, 3)
    both = rows.with_bias(scores)
    assert both.dtype == scores.dtype and torch.equal(both[:, :2], scores)
    assert torch.equal(both[:, 2:], bias.float().expand(4, -1, -1, -1))


def test_sight_is_steady_where_distances_count_tokens():
    documents = torch.tensor([[0, 0, 0, 1, 1, -1, -1]])
    assert Sight.causal(7).steady and Sight.causal(7, positions=torch.arange(3, 10)[None]).steady
    assert Sight.causal(7, documents=documents, positions=consecutive(documents)).steady
    assert not Sight.causal(7, positions=torch.tensor([[0, 1, 2, 4, 5, 6, 7]])).steady
    assert not Sight.causal(7, positions=torch.arange(7.0)[None]).steady
    interrupted = torch.tensor([[0, 0, 1, 0, 1, 1, 1]])
    assert not Sight.causal(7, documents=interrupted, positions=consecutive(interrupted)).steady
    assert not Sight.slots(5, 2).steady
    assert Sight.causal(7, documents=documents, positions=consecutive(documents)).rows(2, 5).steady


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("window", [None, 1, 2, 5])
@pytest.mark.parametrize("queries", [1, 3, 8])
def test_spans_hold_all_keys_that_are_seen_and_no_other(queries, window, ahead):
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1], [-1, -1, 0, 0, 0, 0, 0, 0], [0, 0, 2, 2, 2, -1, -1, -1]])
    for told in ({}, {"documents": documents, "positions": consecutive(documents)}):
        sight = replace(Sight.causal(8, queries=queries, window=window, **told), ahead=ahead)
        for part in (sight, sight.rows(queries // 2, queries)):
            first, last = part.spans()
            keys = torch.arange(part.keys)
            within = (keys >= first[..., None]) & (keys <= last[..., None])
            assert torch.equal(within, part.visible()[:, 0])
