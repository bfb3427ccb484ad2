"""A study expands into runs with stable names, each after what it needs, and a mistake names its key."""

from pathlib import Path

import pytest

from lookfar import config
from lookfar.config import Study
from lookfar.errors import UserError
from lookfar.study.grid import expand, rate_of
from lookfar.study.planned import Planned

RECIPE = Path(__file__).parents[1] / "recipes" / "schedules.toml"
BUDGETS = [
    {"name": "cosine-10", "label": "cosine", "training": {"updates": 10}},
    {"name": "cosine-20", "label": "cosine", "training": {"updates": 20}},
    {"name": "short", "label": "WSD", "training": {"updates": 10, "schedule": "wsd(decay=0.2)", "branch": "long@8"}},
    {
        "name": "long",
        "label": "WSD",
        "training": {"updates": 20, "schedule": "wsd(decay=0.2)", "checkpoint_every": 8, "keep": 3},
    },
    {"name": "wsd_s", "training": {"updates": 20, "schedule": "wsd_s(budgets=[10, 20], decay=0.2)"}},
]


def a_study(*overrides, **study):
    content = {
        "model": {"width": 16, "layers": 1, "heads": 2, "context": 8},
        "training": {"updates": 20, "batch": 4, "warmup": 2},
        "study": study,
    }
    return config.build(content, overrides, Study)


def names(study):
    return [each.name for each in expand(study)]


def of(study, name):
    return next(each for each in expand(study) if each.name == name)


# Names


def test_schemes_and_seeds_alone_keep_their_names():
    assert names(a_study(schemes=["rope", "kerple + dape_v2(kernel=3)"], seeds=[3, 1])) == [
        *("rope-s3", "rope-s1", "kerple+dape_v2-kernel=3-s3", "kerple+dape_v2-kernel=3-s1"),
    ]
    assert [each.notes for each in expand(a_study(schemes=["rope"]))] == [{}]


def test_a_study_of_nothing_is_the_run_of_its_model():
    assert names(a_study("model.scheme=alibi + nope")) == ["alibi-s0"]
    assert names(a_study('model.scheme=["alibi", "rope"]')) == ["alibi+rope-s0"]


def test_a_grid_is_every_combination_with_the_last_key_innermost():
    grid = {"model": {"width": [16, 32]}, "training.rate": [1e-3, 3e-4]}
    found = expand(a_study(schemes=["rope"], seeds=[0, 1], grid=grid))
    assert [each.name for each in found[::2]] == [
        f"rope-width={width}-rate={rate}-s0" for width in (16, 32) for rate in ("0.001", "0.0003")
    ]
    assert [(each.run.model.width, each.run.training.rate, each.run.training.seed) for each in found] == [
        (width, rate, seed) for width in (16, 32) for rate in (1e-3, 3e-4) for seed in (0, 1)
    ]
    assert found[0].notes == {"label": "width=16 · rate=0.001"}


def test_a_value_more_changes_no_name_of_the_others():
    few = names(a_study(grid={"model.width": [16], "training.schedule": ["wsd(decay=0.5)"]}, seeds=[0]))
    many = names(
        a_study(grid={"model.width": [32, 16], "training.schedule": ["wsd(decay=0.5)", "linear"]}, seeds=[2, 0])
    )
    assert few == ["rope-width=16-schedule=wsd-decay=0.5-s0"] and set(few) < set(many)


def test_keys_of_one_last_word_are_written_whole():
    study = a_study(grid={"training.numbering": ["interpolated"], "evaluation.numbering": ["interpolated"]})
    assert names(study) == ["rope-training.numbering=interpolated-evaluation.numbering=interpolated-s0"]


def test_a_long_name_is_cut_and_stays_its_own():
    grid = {"data.path": [f"{'x' * 200}{number}" for number in range(2)]}
    found = names(a_study(grid=grid))
    assert len(set(found)) == 2 and all(len(name) < 200 for name in found)


def test_runs_are_named_and_come_with_every_seed_and_scheme():
    runs = [{"name": "a"}, {"name": "b", "training.rate": 0.5}]
    assert names(a_study(runs=runs, seeds=[0, 1])) == ["a-s0", "a-s1", "b-s0", "b-s1"]
    assert names(a_study(runs=runs, schemes=["rope", "alibi"])) == [
        "rope-a-s0",
        "rope-b-s0",
        "alibi-a-s0",
        "alibi-b-s0",
    ]
    assert of(a_study(runs=runs), "b-s0").run.training.rate == 0.5
    assert of(a_study(runs=runs, schemes=["rope", "alibi"]), "alibi-b-s0").notes == {"label": "alibi · b"}


# Branches and costs


def test_a_branch_comes_after_its_trunk_of_the_same_seed():
    found = expand(a_study(runs=BUDGETS, seeds=[0, 1]))
    places = {each.name: place for place, each in enumerate(found)}
    for seed in (0, 1):
        short = found[places[f"short-s{seed}"]]
        assert short.after == f"long-s{seed}" and places[short.after] < places[short.name]
        assert short.run.training.branch == f"long-s{seed}@8"


def test_a_branch_is_off_the_run_of_its_own_scheme_and_point():
    study = a_study(runs=BUDGETS[2:4], schemes=["rope", "alibi"], grid={"model.width": [16, 32]})
    trunks = {each.name: each.after for each in expand(study) if each.after}
    assert len(trunks) == 4 and all(after == name.replace("short", "long") for name, after in trunks.items())


def test_what_budgets_cost_is_counted_as_by_hand():
    study = a_study(runs=BUDGETS)
    assert of(study, "cosine-20-s0").notes["spent"] == {10: 10, 20: 30}
    assert of(study, "long-s0").notes["spent"] == of(study, "short-s0").notes["spent"] == {10: 10, 20: 22}
    assert of(study, "wsd_s-s0").notes == {"label": "wsd_s", "spent": {10: 10, 20: 20}}


def test_the_recipe_costs_what_its_schedules_are_known_to_cost():
    study = config.read(RECIPE, (), Study)
    spent = {each.notes["label"]: each.notes["spent"] for each in expand(study)}
    assert spent == {
        "oracle cosine": {100: 100, 200: 300, 400: 700},
        "WSD": {100: 100, 200: 220, 400: 460},
        "WSD-S": {100: 100, 200: 200, 400: 400},
        "cyclic cosine": {100: 100, 200: 200, 400: 400},
    }


# Rates chosen by validation


def test_rates_are_tried_on_a_seed_of_their_own_with_one_budget_for_all():
    study = a_study(schemes=["rope", "alibi"], seeds=[0, 4], choose_rate=[1e-3, 3e-3], choose_updates=7)
    found = expand(study)
    assert [each.name for each in found[:4]] == ["rope-rate=0.001-trial", "rope-rate=0.003-trial", "rope-s0", "rope-s4"]
    trials = [each for each in found if "candidate" in each.notes]
    assert {(each.run.training.seed, each.run.training.updates) for each in trials} == {(1000, 7)}
    assert {(each.run.lengths, each.run.evaluation.split) for each in trials} == {((8,), "valid")}
    assert of(study, "alibi-s4").needs == {"alibi-rate=0.001-trial", "alibi-rate=0.003-trial"}


def test_seeds_that_join_later_leave_the_seed_of_the_trials():
    def trial(*seeds, **told):
        return expand(a_study(seeds=seeds, choose_rate=[1e-3, 3e-3], **told))[0].run.training.seed

    assert trial(0) == trial(0, 1) == trial(7, 3, 999)
    assert trial(0, 1000, 1001) == 1002  # a seed of its own
    assert trial(0, 1, choose_seed=1) == 1


def row(rate, value):
    return {"metric": "loss", "value": value, "candidate": rate}


def test_the_rate_of_the_lowest_loss_is_taken():
    planned = Planned("a-s0", a_study().model_copy(), candidates=("a", "b", "c"))
    assert rate_of(planned, {"a": [row(1e-3, 2.0)], "b": [row(3e-3, 1.5)], "c": [row(1e-2, None)]}) == 3e-3
    assert rate_of(planned, {"a": [row(1e-3, 2.0)], "b": [row(3e-4, 2.0)]}) == 3e-4  # the lower of two alike
    assert rate_of(planned, {"a": [row(1e-3, float("nan"))], "b": [row(3e-3, 9.0)]}) == 3e-3
    with pytest.raises(UserError, match="No rate of a-s0 could be measured"):
        rate_of(planned, {"a": [row(1e-3, None)]})


# Mistakes


@pytest.mark.parametrize(
    ("study", "told"),
    [
        ({"grid": {"training": {"ratee": [1]}}}, r"There is no setting 'training.ratee'. Did you mean 'rate'"),
        ({"grid": {"training.rate": 0.1}}, r"study.grid.training.rate \(0.1\) must be a list"),
        ({"grid": {"training.rate": []}}, r"study.grid.training.rate"),
        ({"grid": {"training.rate": [-1.0]}}, r"rope-rate=-1-s0: training.rate = -1.0 is not possible"),
        ({"grid": {"model.width": [15]}}, r"rope-width=15-s0: .*heads \(2\) must divide width \(15\)"),
        ({"grid": {"training.seed": [1]}}, "varied by study.seeds"),
        ({"grid": {"model.scheme": ["alibi"]}, "schemes": ["rope"]}, "varied by study.schemes"),
        ({"grid": {"model.width": [16, 16]}}, "twice"),
        ({"grid": {"training.rate": [1e-3]}, "runs": [{"name": "a", "training.rate": 1.0}]}, "set by the run 'a'"),
        ({"runs": [{"name": "a"}, {"name": "a"}]}, "a-s0 twice"),
        ({"runs": [{"name": "a/b"}]}, "not possible"),
        ({"runs": [{"label": "a"}]}, r"study.runs.0.name' is missing"),
        ({"runs": [{"name": "a", "training.updaets": 3}]}, "a-s0: There is no setting 'training.updaets'"),
        ({"runs": [{"name": "a", "trianing": {"updates": 3}}]}, "a-s0: There is no setting 'trianing'"),
        ({"runs": [{"name": "a", "training.schedule": "wsdd"}]}, "a-s0: .*Did you mean 'wsd'"),
        ({"runs": [{"name": "a", "training.branch": "bb@8"}, {"name": "b"}]}, "names no run of the study.*'b'"),
        ({"runs": [{"name": "a", "training.branch": "b"}, {"name": "b"}]}, "and update, as 'wsd@800'"),
        ({"runs": [*BUDGETS[2:3], {**BUDGETS[3], "training": {"schedule": "wsd"}}]}, "no checkpoint of update 8; give"),
        ({"runs": [*BUDGETS[2:4], {"name": "c", "label": "WSD"}]}, "c-s0 and long-s0 share the label 'WSD'"),
        (
            {"runs": [{**BUDGETS[2], "data.tokenizer": "bpe"}, BUDGETS[3]]},
            "short-s0: A branch of long-s0 goes on in its",
        ),
        ({"runs": [{**BUDGETS[2], "model.width": 32}, BUDGETS[3]]}, "short-s0: A branch of long-s0 has its model"),
        ({"choose_rate": [1e-3]}, "study.choose_rate"),
        ({"choose_updates": 3}, "set study.choose_rate"),
        ({"choose_rate": [1e-3, 1.0], "grid": {"training.rate": [1e-3]}}, "study.choose_rate chooses it"),
        ({"choose_rate": [1e-3, 1.0], "runs": BUDGETS[2:4]}, "a branch has the rate of its run"),
    ],
    ids=str,
)
def test_a_mistake_names_its_key(study, told):
    with pytest.raises(UserError, match=told):
        expand(a_study(**study))


def test_branches_in_a_circle_are_refused():
    stable = {"schedule": "constant", "updates": 20, "checkpoint_every": 1, "keep": 20}
    runs = [
        {"name": "a", "training": {**stable, "branch": "b@8"}},
        {"name": "b", "training": {**stable, "branch": "a@8"}},
    ]
    with pytest.raises(UserError, match="in the end"):
        expand(a_study(runs=runs))
