"""Analyses: their laws, small cases worked by hand, and a run looked into from the command line."""

import itertools
import json
import math
import re
import sys

import numpy as np
import pytest
import torch

import lookfar
from lookfar import cli, config, plugins
from lookfar.analysis.assignment import assign
from lookfar.analysis.divergence import divergences
from lookfar.analysis.runs import analyze_run
from lookfar.analysis.traces import trace as trace_model
from lookfar.attention.scheme import build_scheme
from lookfar.attention.trace import trace
from lookfar.batch import consecutive
from lookfar.errors import UserError
from lookfar.sight import Sight
from lookfar.study.analysis_page import write_page
from lookfar.study.pictures import picture
from lookfar.tasks.digits import abacus
from lookfar.tasks.problems import Problems
from lookfar.training.train import train

LN2 = math.log(2)

TINY = """
[model]
width = 16
layers = 2
heads = 2
context = 16
device = "cpu"

[data]
source = "text_file"
path = "{text}"

[training]
updates = 2
batch = 2

[evaluation]
lengths = [16]
tokens = 32
"""


def distributions(*shape, seed=0, sharp=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (sharp * torch.randn(shape, generator=generator, dtype=torch.float64)).softmax(-1)


def attention(weights, scheme="nope", **given):
    """A trace whose softmax gives these weights `[h q k]`: keys are one-hot, queries the logarithms."""
    heads, queries, keys = weights.shape
    built = build_scheme(scheme, heads=heads, head_width=keys, context=keys).double()
    logs = weights.double().clamp(min=1e-30).log()[None] * keys**0.5
    eye = torch.eye(keys, dtype=torch.float64).expand(1, heads, keys, keys)
    return trace(logs, eye, eye, Sight.causal(keys, queries=queries, **given), built)


def looked(name, *traces, length=None, other=None):
    """The rows of an analysis as a dictionary: metric and head -> value."""
    analysis = plugins.build("analysis", plugins.parse(name)[0], length or traces[0].sight.keys)
    for each in traces:
        analysis.look(0, each, other)
    return analysis.conclude()


def value(findings, metric, head=0, **place):
    found = [
        row
        for row in findings.rows
        if (row["metric"], row["head"]) == (metric, head) and all(row[key] == each for key, each in place.items())
    ]
    assert len(found) == 1, f"{len(found)} rows of {metric}"
    return found[0]["value"]


CAUSAL = torch.tensor([[[1, 0, 0, 0], [0.25, 0.75, 0, 0], [0.5, 0.2, 0.3, 0], [0.1, 0.6, 0.1, 0.2]]])
EVEN = torch.ones(4, 4).tril()[None] / torch.arange(1, 5)[:, None]


def test_divergence_of_a_distribution_and_itself_is_0():
    p = distributions(1, 3, 5, 7)
    found = divergences(p, p)
    assert found.diagonal(dim1=1, dim2=2).abs().max() < 1e-15
    assert (found >= 0).all()


def test_divergence_of_what_never_meets_is_ln_2():
    p, r = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4)
    p[..., :2], r[..., 2:] = torch.tensor([0.3, 0.7]), torch.tensor([0.9, 0.1])
    assert divergences(p, r).item() == pytest.approx(LN2, abs=1e-7)


@pytest.mark.parametrize("sharp", [0.1, 3.0, 300.0])
def test_divergence_is_symmetric_and_at_most_ln_2(sharp):
    p, r = distributions(2, 3, 5, 7, sharp=sharp), distributions(2, 4, 5, 7, seed=1, sharp=sharp)
    found = divergences(p, r)
    assert torch.allclose(found, divergences(r, p).transpose(1, 2), atol=1e-15)
    assert (found <= LN2 + 1e-15).all() and (found >= 0).all()


def test_divergence_follows_its_definition_by_relative_entropies():
    p, r = distributions(1, 2, 3, 7, sharp=1.0), distributions(1, 2, 3, 7, seed=1, sharp=1.0)
    for i, j in itertools.product(range(2), range(2)):
        m = (p[:, i] + r[:, j]) / 2
        expected = ((p[:, i] * (p[:, i] / m).log()).sum(-1) + (r[:, j] * (r[:, j] / m).log()).sum(-1)) / 2
        assert torch.allclose(divergences(p, r)[:, i, j], expected, atol=1e-14)
        swapped = ((m * (m / p[:, i]).log()).sum(-1) + (m * (m / r[:, j]).log()).sum(-1)) / 2
        assert not torch.allclose(swapped, expected, atol=1e-3)  # the published code


def test_all_pairs_of_heads_are_compared_and_the_best_assignment_is_found():
    ours, theirs = attention(distributions(3, 6, 6)), attention(distributions(3, 6, 6)[[2, 0, 1]])
    findings = looked("divergence", ours, other=theirs)
    pairs = np.array([[value(findings, "divergence", i, other_head=j) for j in range(3)] for i in range(3)])
    assert [pairs[i].argmin() for i in range(3)] == [1, 2, 0]
    assert value(findings, "divergence_min", None, layer=0) == pytest.approx(0, abs=1e-14)
    assert value(findings, "divergence_assigned", None, layer=0) == pytest.approx(0, abs=1e-14)
    assert value(findings, "divergence_assigned", None, layer=None) == pytest.approx(0, abs=1e-14)
    assert pairs[0, 0] > 0.01


def test_the_least_pair_and_the_assignment_differ_where_one_head_serves_all():
    ours = attention(torch.stack([EVEN[0], CAUSAL[0]]))
    theirs = attention(torch.stack([EVEN[0], EVEN[0]]))
    findings = looked("divergence", ours, other=theirs)
    apart = value(findings, "divergence", 1, other_head=0)
    assert value(findings, "divergence_min", None, layer=0) == pytest.approx(0, abs=1e-14)
    assert value(findings, "divergence_assigned", None, layer=0) == pytest.approx(apart / 2)


def test_a_model_does_not_diverge_from_itself_and_its_heads_are_compared():
    weights = distributions(3, 6, 6)
    findings = looked("divergence", attention(weights))
    assert value(findings, "divergence_within", 1, other_head=1) == 0
    assert value(findings, "divergence_within", 0, other_head=1) > 0
    assert not any(row["metric"] == "divergence_min" for row in findings.rows)


def test_a_sink_is_one_more_outcome_of_a_row():
    plain, sunk = attention(EVEN), attention(EVEN, "stable_mask(gamma=0, columns=1000000)")
    findings = looked("divergence", sunk, other=plain)
    assert sunk.swallowed.min() > 0.999
    assert value(findings, "divergence", 0, other_head=0) == pytest.approx(LN2, rel=1e-3)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_an_assignment_costs_the_least(count):
    random = np.random.default_rng(count)
    for _ in range(20):
        costs = random.random((count, count))
        columns = assign(costs)
        least = min(
            sum(costs[row, column] for row, column in enumerate(order))
            for order in itertools.permutations(range(count))
        )
        assert sorted(columns) == list(range(count))
        assert sum(costs[row, column] for row, column in enumerate(columns)) == pytest.approx(least)


def test_an_assignment_of_many_heads_is_found_at_once():
    order = np.random.default_rng(0).permutation(32)
    costs = 1 + np.random.default_rng(1).random((32, 32))
    costs[np.arange(32), order] = 0
    assert assign(costs) == order.tolist()


def test_attended_distance_is_worked_by_hand():
    findings = looked("attended_distance(bins=4)", attention(CAUSAL))
    # rows 1, 2, 3 attend to 1 of 0..1, 0 of 0..2, 1 of 0..3
    assert value(findings, "attended_distance") == pytest.approx((0 / 2 + 2 / 3 + 2 / 4) / 3)
    shares = [value(findings, "distance_share", distance=each / 4) for each in range(4)]
    assert shares == pytest.approx([1 / 3, 0, 2 / 3, 0])
    means = [0.25, 2 * 0.5 + 0.2, 3 * 0.1 + 2 * 0.6 + 0.1]
    assert value(findings, "mean_distance") == pytest.approx(sum(means) / 3)
    assert value(findings, "window_keys") == pytest.approx((2 + 3 + 3) / 3)  # 0.9 of a row, from the query on


def test_of_equal_scores_the_nearest_is_attended():
    assert value(looked("attended_distance", attention(EVEN)), "attended_distance") == 0


def test_entropy_is_worked_by_hand():
    findings = looked("entropy", attention(EVEN))
    assert value(findings, "entropy") == pytest.approx((math.log(2) + math.log(3) + math.log(4)) / 3)
    assert value(findings, "entropy_share") == pytest.approx(1)
    assert value(findings, "effective_keys") == pytest.approx(3)
    assert value(findings, "entropy_at", keys=3) == pytest.approx(math.log(3))
    one = looked("entropy", attention(torch.eye(4)[None]))
    assert value(one, "entropy") == pytest.approx(0, abs=1e-12) and value(one, "effective_keys") == pytest.approx(1)


def test_mass_on_the_first_token_is_worked_by_hand():
    findings = looked("sink_mass", attention(CAUSAL))
    assert value(findings, "first_token_mass") == pytest.approx((0.25 + 0.5 + 0.1) / 3)
    assert value(findings, "own_mass") == pytest.approx((0.75 + 0.3 + 0.2) / 3)
    assert value(findings, "even_mass") == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    assert not any(row["metric"] == "sink_mass" for row in findings.rows)


def test_a_sink_takes_its_mass_from_all_tokens():
    scheme = "stable_mask(gamma=0, columns=5)"  # row t has 4 - t pseudo-scores of 0
    found = attention(EVEN, scheme)
    expected = [(4 - t) / (4 - t + 1) for t in range(4)]  # the exponentials of the scores of a row sum to 1
    assert found.swallowed[0, 0].tolist() == pytest.approx(expected)
    findings = looked("sink_mass", found)
    assert value(findings, "sink_mass") == pytest.approx(sum(expected[1:]) / 3)
    first = sum((1 - expected[t]) / (t + 1) for t in (1, 2, 3)) / 3
    assert value(findings, "first_token_mass") == pytest.approx(first)


def test_the_curve_of_alibi_is_its_slopes():
    findings = looked("bias_curves", attention(distributions(2, 9, 9), "alibi"))
    for head, slope in enumerate((2**-4, 2**-8)):
        for distance in (0, 1, 2, 8):
            assert value(findings, "bias", head, distance=distance) == pytest.approx(-slope * distance)
    assert not looked("bias_curves", attention(distributions(2, 9, 9))).rows


def test_a_bias_of_more_than_the_distance_has_several_curves():
    rows = looked("bias_curves", attention(distributions(2, 16, 16), "fire")).rows
    assert {row["query"] for row in rows} == {3, 7, 15}
    assert {row["distance"] for row in rows if row["query"] == 3} == {0, 1, 2, 3}


def test_spreads_leave_out_what_a_whole_row_shares():
    found = attention(CAUSAL.clamp(min=1e-3), "alibi")
    findings = looked("score_maps", found)
    expected = [torch.tensor([-(2**-8) * j for j in range(t + 1)]).std(correction=0).item() for t in (1, 2, 3)]
    assert value(findings, "bias_spread") == pytest.approx(sum(expected) / 3, rel=1e-6)
    assert not any(row["metric"] == "map_spread" for row in findings.rows) and not findings.arrays
    shifted = found.before[0, 0, 1:] + torch.arange(3.0)[:, None] * 100
    row = [shifted[t - 1, : t + 1].std(correction=0).item() for t in (1, 2, 3)]
    assert value(findings, "score_spread") == pytest.approx(sum(row) / 3)


def test_a_map_is_told_by_what_it_changes():
    heads, tokens = 2, 8
    built = build_scheme("cope(positions=4)", heads=heads, head_width=tokens, context=tokens).double()
    torch.manual_seed(0)
    torch.nn.init.normal_(built.maps[0].embedding)
    queries = torch.randn(1, heads, tokens, tokens, dtype=torch.float64)
    found = trace(queries, queries, queries, Sight.causal(tokens), built)
    findings = looked("score_maps", found)
    change = (found.after - found.before)[0].detach()
    for distance in (0, 1, 5):
        expected = change.diagonal(-distance, 1, 2).mean(-1)
        for head in range(heads):
            assert value(findings, "map_change", head, distance=distance) == pytest.approx(expected[head].item())
    before, after = findings.arrays["scores_before/0"], findings.arrays["scores_after/0"]
    lower = torch.ones(tokens, tokens).tril().bool().numpy()
    assert np.isnan(before[:, ~lower]).all()
    assert np.allclose((after - before)[:, lower], change.numpy()[:, lower], atol=1e-5)


def test_maps_keep_the_mass_of_rows_when_they_shrink():
    weights = distributions(2, 10, 10)
    found = attention(weights)
    whole = looked("attention_maps(cells=10)", found).arrays["attention_maps/0"]
    assert np.allclose(whole, found.given[0].numpy(), atol=1e-7)
    small = looked("attention_maps(cells=4)", found).arrays["attention_maps/0"]  # cells of 3, 3, 3 and 1 token
    assert small.shape == (2, 4, 4) and np.allclose(small.sum(-1), 1, atol=1e-6)
    assert np.allclose(small[:, 1, 0], whole[:, 3:6, :3].sum(-1).mean(-1), atol=1e-7)


@pytest.mark.parametrize("name", lookfar.names("analysis"))
def test_pieces_of_rows_give_what_the_whole_gives(name):
    torch.manual_seed(0)
    config = lookfar.ModelConfig(
        vocabulary=50,
        width=16,
        heads=2,
        layers=2,
        context=16,
        scheme=("kerple + dape_v2 + stable_mask", "cope"),
        window=(None, 5),
        dtype="float64",
        device="cpu",
    )
    model, tokens = lookfar.Decoder(config).eval(), torch.randint(0, 50, (1, 13))
    found = []
    for rows in (None, 4):
        analysis = plugins.build("analysis", plugins.Term(name), 13)
        for layer, each in trace_model(model, tokens, rows=rows):
            analysis.look(layer, each)
        found.append(analysis.conclude())
    assert len(found[0].rows) == len(found[1].rows) and found[0].rows + list(found[0].arrays)

    def key(row):
        return json.dumps({name: each for name, each in row.items() if name != "value"}, sort_keys=True)

    for one, other in zip(sorted(found[0].rows, key=key), sorted(found[1].rows, key=key), strict=True):
        assert key(one) == key(other) and one["value"] == pytest.approx(other["value"], abs=1e-10)
    for name, array in found[0].arrays.items():
        assert np.allclose(array, found[1].arrays[name], equal_nan=True, atol=1e-6)


def test_padding_is_not_counted():
    weights, documents = distributions(1, 6, 6), torch.tensor([[-1, -1, 0, 0, 0, 0]])
    padded = attention(weights, documents=documents, positions=consecutive(documents))
    alone = attention(weights[:, 2:, 2:])
    for name in ("entropy", "sink_mass", "attended_distance"):
        one, other = looked(name, padded), looked(name, alone, length=6)
        assert [row["value"] for row in one.rows] == pytest.approx([row["value"] for row in other.rows])
        assert {row["count"] for row in one.rows if row["metric"] in ("entropy", "own_mass")} <= {3}


def test_a_picture_is_a_png_of_the_ramp():
    address = picture(np.array([[0.0, 1.0], [0.5, np.nan]]), ("#000000", "#ffffff"))
    assert address.startswith("data:image/png;base64,iVBORw0KGgo")


def run(monkeypatch, capsys, *arguments):
    """The exit code of a command, and what it printed on stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["lookfar", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    out, err = capsys.readouterr()
    return left.value.code or 0, out, err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of 2 updates, by name."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text("".join(f"line {number} of a text\n" for number in range(400)), encoding="utf-8")
    (folder / "tiny.toml").write_text(TINY.format(text=folder / "text.txt"), encoding="utf-8")
    changes = {
        "mixed": ["model.scheme=kerple + dape_v2 + stable_mask"],
        "nope": ["model.scheme=nope"],
        "learned": ["model.scheme=learned"],
        "heads": ["model.heads=4"],
        "layers": ["model.layers=1"],
        "words": ["data.tokenizer=bpe", "data.vocabulary=300"],
        "squeezed": ["evaluation.numbering=interpolated"],
    }
    for name, settings in changes.items():
        train(config.read(folder / "tiny.toml", settings), folder / name)
    return folder


@pytest.fixture(scope="module")
def compared(trained):
    """The folder of an analysis of one run against another."""
    output = trained / "both"
    analyze_run(trained / "mixed", against=trained / "nope", inputs=2, output=output)
    write_page(output)
    return output


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_every_analysis_of_two_runs_leaves_its_rows(compared):
    rows = rows_of(compared)
    metrics = {row["metric"] for row in rows}
    assert metrics >= {"entropy", "bias", "distance_share", "sink_mass", "divergence", "divergence_min", "map_change"}
    keys = {
        "run",
        "scheme",
        "seed",
        "context",
        "data",
        "protocol",
        "length",
        "metric",
        "layer",
        "head",
        "value",
        "count",
    }
    assert all(keys <= row.keys() and row["protocol"] == "analysis" for row in rows)
    assert {row["run"] for row in rows} == {"mixed", "nope"} and {row["length"] for row in rows} == {16, 32}
    assert all(math.isfinite(row["value"]) and row["count"] > 0 for row in rows)
    assert all(0 <= row["value"] <= LN2 for row in rows if row["metric"].startswith("divergence"))
    assert all(row["against"] == "nope" for row in rows if row["metric"] == "divergence")
    assert not any(row["metric"] == "sink_mass" and row["run"] == "nope" for row in rows)


def test_arrays_lie_beside_the_rows(compared):
    with np.load(compared / "arrays.npz") as arrays:
        assert arrays["16/attention_maps/0"].shape == (2, 16, 16)
        assert {"32/scores_before/1", "32/scores_after/1"} <= set(arrays.files)
        assert not np.allclose(arrays["32/scores_before/1"], arrays["32/scores_after/1"], equal_nan=True)
    with np.load(compared / "arrays_of_other.npz") as arrays:
        assert {name.split("/")[1] for name in arrays.files} == {"attention_maps"}


def test_the_page_is_whole_and_offline(compared):
    page = (compared / "index.html").read_text(encoding="utf-8")
    links = re.findall(r'(?:href|src)="([^"]+)"', page.partition("<script>window")[0])
    figures = [link for link in links if link.startswith("figures/")]
    assert len(figures) >= 3 * 10
    assert all((compared / link).stat().st_size > 1000 for link in figures)
    for place in re.findall(r'<script type="application/json">(.*?)</script>', page):
        assert json.loads(place)["$schema"]
    assert not [link for link in links if link.startswith(("http", "//"))]


def test_a_run_against_itself_has_nothing_apart(trained):
    rows = analyze_run(trained / "mixed", against=trained / "mixed", lengths=[16], inputs=1, output=trained / "self")
    least = [row["value"] for row in rows if row["metric"] in ("divergence_min", "divergence_assigned")]
    assert least == pytest.approx([0] * len(least), abs=1e-12)
    assert {row["run"] for row in rows} == {f"{trained.name}/mixed"}


def test_the_command_analyses_a_run(trained, monkeypatch, capsys):
    arguments = ("--length", 16, "--inputs", 1, "--analysis", "entropy", "--analysis", "attention_maps(cells=8)")
    code, out, err = run(monkeypatch, capsys, "analyze", trained / "nope", *arguments)
    assert code == 0, err
    assert str(trained / "nope" / "analysis" / "index.html") in out
    assert {row["metric"] for row in rows_of(trained / "nope" / "analysis")} >= {"entropy", "inputs"}
    figures = {each.stem for each in (trained / "nope" / "analysis" / "figures").glob("*.png")}
    assert figures == {"entropy", "attention_maps_0_16"}
    lookfar.load(trained / "nope")  # still a run


def test_a_run_is_looked_at_in_the_numbers_in_which_it_is_measured(trained, monkeypatch):
    given, states = [], lookfar.Decoder.states

    def note(self, tokens, **settings):
        given.append(settings["positions"][0].tolist())
        return states(self, tokens, **settings)

    monkeypatch.setattr(lookfar.Decoder, "states", note)
    context = config.read(trained / "tiny.toml").model.context
    analyze_run(
        trained / "squeezed", lengths=[2 * context], inputs=1, wanted=["entropy"], output=trained / "squeezed_2"
    )
    assert given == [[place / 2 for place in range(2 * context)]]


def test_another_text_can_be_looked_at(trained):
    (trained / "other.txt").write_text("nothing of the run " * 20)
    rows = analyze_run(trained / "nope", text=trained / "other.txt", lengths=[16], output=trained / "other")
    assert {row["data"].partition("@")[0] for row in rows} == {"other.txt"}


@pytest.fixture(scope="module")
def of_task(trained):
    """The folder of runs that are trained on additions, by name."""
    changes = {
        "adding": [],
        "by_digits": ["model.scheme=learned", "training.numbering=abacus(largest=12)"],
        "copying": ["task.name=copy"],
    }
    text = (
        '[task]\nname = "addition"\nlengths = [1, 2, 3]\nexamples = 4\n[evaluation]\nlengths = [2, 4]\n'
        '[model]\nwidth = 16\nlayers = 2\nheads = 2\ncontext = 30\ndevice = "cpu"\n'
        "[training]\nupdates = 2\nbatch = 2\n"
    )
    (trained / "task.toml").write_text(text)
    for name, settings in changes.items():
        train(config.read(trained / "task.toml", settings), trained / name)
    return trained


def test_a_run_of_a_task_is_looked_at_on_problems_that_it_was_not_trained_on(of_task):
    rows = analyze_run(of_task / "adding", inputs=3)
    problems = Problems("addition", lengths=[1, 2, 3])
    inputs = {row["problems"]: row for row in rows if row["metric"] == "inputs"}
    assert inputs.keys() == {3, 4} and inputs[3]["value"] == inputs[4]["value"] == 3
    for length, row in inputs.items():
        sizes = [len(each.encoded.tokens) - 1 for each in problems.measured(length, 256)]
        assert row["length"] == max(size for size in sizes if sizes.count(size) >= 3)
        assert row["data"] == "addition" and row["context"] == problems.tokens(3) - 1
    model = lookfar.load(of_task / "adding")
    masses = []
    shown = [each.encoded.tokens[:-1] for each in problems.measured(4, 256)]
    for tokens in [each for each in shown if len(each) == inputs[4]["length"]][:3]:
        for layer, found in trace_model(model, torch.from_numpy(tokens)[None]):
            if layer == 1:
                masses.append(found.weights[0, 0, 1:, 0].double().mean().item())
    mass = [row for row in rows if row["metric"] == "first_token_mass" and (row["layer"], row["head"]) == (1, 0)]
    assert mass[1]["length"] == inputs[4]["length"] and mass[1]["value"] == pytest.approx(sum(masses) / 3, abs=1e-6)
    page = write_page(of_task / "adding" / "analysis").read_text()
    assert "problems of length 3 and 4, in" in page


def test_a_run_whose_digits_are_numbered_is_looked_at_in_those_numbers(of_task, monkeypatch):
    given, states = [], lookfar.Decoder.states

    def note(self, tokens, **settings):
        given.append((tokens[0].tolist(), settings["positions"][0].tolist()))
        return states(self, tokens, **settings)

    monkeypatch.setattr(lookfar.Decoder, "states", note)
    analyze_run(of_task / "by_digits", lengths=[2], inputs=2, wanted=["entropy"])
    spelled = Problems("addition", lengths=[1, 2, 3]).vocabulary.pieces
    assert len(given) == 2
    for tokens, positions in given:
        assert positions == abacus([spelled[token] for token in tokens]).tolist() and max(positions) >= 2


def test_two_runs_of_a_task_are_compared_and_of_two_tasks_refused(of_task):
    rows = analyze_run(of_task / "adding", against=of_task / "by_digits", lengths=[2], inputs=1, wanted=["divergence"])
    assert any(row["metric"] == "divergence" and row["against"] == "by_digits" for row in rows)
    with pytest.raises(UserError, match="are of different tasks"):
        analyze_run(of_task / "adding", against=of_task / "copying")
    with pytest.raises(UserError, match="are of different tasks"):
        analyze_run(of_task / "nope", against=of_task / "copying")


def test_what_a_task_cannot_be_looked_at_on_is_told(of_task):
    with pytest.raises(UserError, match=r"reads its problems alone; leave .*text.txt out"):
        analyze_run(of_task / "adding", text=of_task / "text.txt")
    with pytest.raises(UserError, match="addition has no problem of length 0"):
        analyze_run(of_task / "adding", lengths=[0])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nope", "--against", "words"), "different tokens"),
        (("nope", "--against", "heads"), "Layer 0 has 2 score heads"),
        (("nope", "--against", "layers"), "has 2 layers"),
        (("nope", "--against", "nowhere"), "is not a run"),
        (("learned", "--length", "17"), "17 tokens are more than the 16 positions"),
        (("nope", "--length", "100000"), "fewer than one input of 100,000"),
        (("nope", "--analysis", "entropi"), "Did you mean 'entropy'?"),
        (("nope", "--analysis", "entropy(bins=3)"), "no setting 'bins'"),
        (("nope", "--text", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, sentence, trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    code, out, err = run(monkeypatch, capsys, "analyze", *arguments)
    assert code == 2 and sentence in err and "Traceback" not in err and not out


def test_a_page_needs_an_analysis(tmp_path):
    with pytest.raises(UserError, match="no analysis"):
        write_page(tmp_path)
