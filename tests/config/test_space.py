"""A search space is checked as a whole: every mistake is one UsageError with place, value and remedy."""

import pytest

from raysweep.config.space import SearchSpace
from raysweep.config.trial import Trial
from raysweep.errors import UsageError

MINIMAL = """\
name: a
model: {path: builtin:pystdlib}
calibration:
  dataset: builtin:pystdlib
sweep:
  - recovery: none
    criterion: wanda
    sparsity: 0.5
  - recovery: reconstruct
    criterion: [magnitude, wanda]
    sparsity: 0.5
    granularity: block
    learning_rate: 1e-3
"""


def refused(text=MINIMAL, *overrides):
    with pytest.raises(UsageError) as caught:
        SearchSpace.from_text(text, overrides, source="a.yaml")
    error = caught.value
    assert error.exit_status == 2
    for jargon in ("pydantic", "validation error", "Traceback", "Literal", "input_value", "NoneType"):
        assert jargon not in str(error)
    return error


def test_a_minimal_space_has_the_defaults_of_the_contract():
    space = SearchSpace.from_text(MINIMAL)
    (model,), (calibration,) = space.models, space.calibrations
    assert (model.revision, model.dtype, model.trust_remote_code) == (None, "auto", False)
    assert (calibration.split, calibration.sampling, calibration.seed) == ("train", "pack", 0)
    assert (space.validation.samples, space.validation.dataset, space.validation.seed) == (16, None, 0)
    assert (space.search.algorithm, space.search.metric, space.search.mode) == (
        "grid",
        "validation_perplexity",
        "min",
    )
    assert space.search.compare_within == ("model", "sparsity", "sparsity_by_name", "pattern", "recovery")
    assert (space.execution.shards, space.execution.threads_per_worker) == ("auto", 1)
    (entry,) = space.evaluation.perplexity
    assert (entry.name, entry.dataset, entry.split, entry.max_windows) == (
        "pystdlib",
        "builtin:pystdlib",
        "test",
        64,
    )
    assert [planned.trial.recovery for planned in space.expand()] == [
        "dense",
        "none",
        "reconstruct",
        "reconstruct",
    ]


@pytest.mark.parametrize(
    ("old", "new", "where", "said"),
    [
        (
            "sparsity: 0.5\n  - ",
            "sparcity: 0.5\n  - ",
            "a.yaml:8: sweep[0].sparcity",
            "did you mean 'sparsity'",
        ),
        ("name: a", "nmae: a", "a.yaml:1: nmae", "did you mean 'name'"),
        ("model: {path", "model: {paht", "a.yaml:2: model.paht", "did you mean 'path'"),
        ("  dataset: ", "  datset: ", "a.yaml:4: calibration.datset", "did you mean 'dataset'"),
        ("criterion: wanda", "criterion: wandda", "a.yaml:7: sweep[0].criterion", "did you mean 'wanda'"),
        (
            "[magnitude, wanda]",
            "[magnitude, obd]",
            "a.yaml:10: sweep[1].criterion[1]",
            "magnitude | random",
        ),
        (
            "granularity: block",
            "granularity: layer",
            "a.yaml:12: sweep[1].granularity",
            "matrix | subblock | block | window:K",
        ),
        ("sparsity: 0.5\n  - ", "sparsity: 1\n  - ", "a.yaml:8: sweep[0].sparsity", "from 0 to below 1"),
        ("sparsity: 0.5\n  - ", "sparsity: -0.1\n  - ", "a.yaml:8: sweep[0].sparsity", "-0.1"),
        ("sparsity: 0.5\n  - ", "sparsity: half\n  - ", "a.yaml:8: sweep[0].sparsity", "'half' (text)"),
        ("sparsity: 0.5\n  - ", "sparsity: '0.5'\n  - ", "a.yaml:8: sweep[0].sparsity", "'0.5' (text)"),
        ("sparsity: 0.5\n  - ", "sparsity: true\n  - ", "a.yaml:8: sweep[0].sparsity", "true"),
        ("sparsity: 0.5\n  - ", "sparsity: .nan\n  - ", "a.yaml:8: sweep[0].sparsity", "nan"),
        ("sparsity: 0.5\n  - ", "sparsity: []\n  - ", "a.yaml:8: sweep[0].sparsity", "empty list"),
        ("sparsity: 0.5\n  - ", "sparsity: [[0.5]]\n  - ", "a.yaml:8: sweep[0].sparsity[0]", "a list"),
        ("sparsity: 0.5\n  - ", "pattern: 4:4\n  - ", "a.yaml:8: sweep[0].pattern", "keeps 4 of 4"),
        ("sparsity: 0.5\n  - ", "pattern: [1:2, 5:4]\n  - ", "a.yaml:8: sweep[0].pattern[1]", "keeps 5 of 4"),
        ("sparsity: 0.5\n  - ", "pattern: 24\n  - ", "a.yaml:8: sweep[0].pattern", "N:M"),
        ("sparsity: 0.5\n  - ", "\n  - ", "a.yaml:6: sweep[0].sparsity", "sparsity is missing"),
        ("learning_rate: 1e-3", "learning_rate: 0", "a.yaml:13: sweep[1].learning_rate", "above 0"),
        ("learning_rate: 1e-3", "learning_rate: .inf", "a.yaml:13: sweep[1].learning_rate", "inf"),
        ("learning_rate: 1e-3", "learning_rate: 1e999", "a.yaml:13: sweep[1].learning_rate", "inf"),
        ("learning_rate: 1e-3", "learning_rate: fast", "a.yaml:13: sweep[1].learning_rate", "'fast' (text)"),
        ("    learning_rate: 1e-3\n", "", "a.yaml:9: sweep[1].learning_rate", "learning_rate is missing"),
        ("recovery: none", "recovery: dense", "a.yaml:6: sweep[0].recovery", "dense"),
        ("recovery: none", "recovery: null", "a.yaml:6: sweep[0].recovery", "none | reconstruct"),
        ("  - recovery: none\n    criterion", "  - criterion", "a.yaml:6: sweep[0].recovery", "missing"),
        ("name: a\n", "name: ../a\n", "a.yaml:1: name", "letters, digits"),
        ("name: a\n", "name: .hidden\n", "a.yaml:1: name", "letters, digits"),
        ("name: a\n", "name: 'a b'\n", "a.yaml:1: name", "letters, digits"),
        ("name: a\n", f"name: {'a' * 101}\n", "a.yaml:1: name", "100 characters"),
        ("name: a\n", "name: 2026\n", "a.yaml:1: name", "2026"),
        ("name: a\n", 'name: "a\\n"\n', "a.yaml:1: name", "letters, digits"),
        ("model: {path: builtin:pystdlib}", "model: builtin:pystdlib", "a.yaml:2: model", "keys: path"),
        ("model: {path: builtin:pystdlib}\n", "", "a.yaml:1: model", "missing"),
        ("path: builtin:pystdlib}", "dtype: auto}", "a.yaml:2: model.path", "missing"),
        ("path: builtin:pystdlib}", "path: {choice: [a]}}", "a.yaml:2: model.path", "a mapping"),
        ("path: builtin:pystdlib}", "path: 12}", "a.yaml:2: model.path", "quotes"),
        ("path: builtin:pystdlib}", "path: x, dtype: [auto, int8]}", "a.yaml:2: model.dtype[1]", "bfloat16"),
    ],
)
def test_mistakes_are_refused_with_their_place(old, new, where, said):
    assert old in MINIMAL
    error = refused(MINIMAL.replace(old, new, 1))
    assert error.where == where
    assert said in str(error)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("calibration.num_samples=0", "whole number from 1"),
        ("calibration.num_samples=true", "whole number from 1"),
        ("calibration.num_samples=1.5", "whole number from 1"),
        ("calibration.num_samples=many", "'many' (text)"),
        ("calibration.num_samples=null", "null"),
        ("calibration.num_samples=99999999999999999999", "whole number from 1"),
        ("calibration.sequence_length=1", "whole number from 2"),
        ("calibration.seed=-1", "whole number from 0"),
        ("calibration.seed=[]", "empty list"),
        ("calibration.sampling=packed", "did you mean 'pack'"),
        ("validation.samples=-1", "whole number from 0"),
        ("validation.samples=[1, 2]", "a list"),
        ("validation.samples=0", "search.metric"),
        ("validation.config=x", "without a dataset"),
        ("evaluation.perplexity=[]", "empty list"),
        ("evaluation.perplexity={}", "a mapping"),
        ("evaluation.task=[hellaswag]", "did you mean 'tasks'"),
        ("evaluation.tasks=hellaswag", "a list of task names"),
        ("evaluation.tasks=[a, b, a]", "task 'a' is named twice"),
        ("evaluation.tasks_on=best", "kept | all"),
        ("execution.task_batch_size=0", "whole number from 1"),
        ("evaluation.perplexity=[{name: x, dataset: y}]", "sequence_length"),
        ("evaluation.perplexity=[{name: a/b, dataset: y, sequence_length: 8}]", "letters, digits"),
        ("evaluation.perplexity=[{name: x, dataset: y, sequence_length: 8, max_window: 3}]", "'max_windows'"),
        (
            "evaluation.perplexity=[{name: x, dataset: y, sequence_length: 8}, "
            "{name: x, dataset: z, sequence_length: 8}]",
            "used twice",
        ),
        ("search.algorithm=annealing", "grid | random"),
        ("search.algorithm=random", "num_samples"),
        ("search.num_samples=3", "does not apply"),
        ("search.metric=perplexity", "did you mean 'validation_perplexity'"),
        ("search.metric=speed", "validation_perplexity"),
        ("search.compare_within=[sparsty]", "did you mean 'sparsity'"),
        ("search.compare_within=sparsity", "a list of column names"),
        ("execution.shards=0", "auto, or a whole number from 1"),
        ("execution.shards=two", "auto, or a whole number from 1"),
        ("execution.shards=true", "auto, or a whole number from 1"),
        ("execution.keep=some", "none | best | all"),
        ("execution.activation_store=tape", "auto | device | host | disk"),
        ("execution=3", "keys"),
        ("sweep=[]", "no trial at all"),
        ("sweep=null", "no trial at all"),
        ("sweep={}", "a list of groups"),
        ("sweep.0=null", "keys"),
        ("sweep.0.seed=-1", "whole number from 0"),
        ("sweep.0.sparsity={uniform: [0.1, 0.5]}", "search.algorithm is 'grid'"),
        ("sweep.1.epochs=0", "whole number from 1"),
        ("sweep.1.warmup_fraction=1.5", "from 0 to 1"),
    ],
)
def test_overrides_are_checked_like_the_file(override, said):
    error = refused(MINIMAL, override)
    assert said in str(error)
    assert override.split("=")[0].split(".")[0] in error.where or "search.metric" in error.where


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n", "just text\n", "3\n"])
def test_documents_that_are_no_mapping(text):
    assert "keys" in str(refused(text))


def test_the_values_of_a_contradiction_are_named():
    error = refused(MINIMAL, "sweep.1.pattern=[unstructured, 1:4]")
    assert "sparsity 0.5 contradicts pattern 1:4" in str(error)
    assert "0.75" in error.allowed


def test_foreign_data_needs_an_evaluation():
    error = refused(MINIMAL.replace("dataset: builtin:pystdlib", "dataset: my.parquet"))
    assert "evaluation.perplexity" in error.where
    assert "dataset: my.parquet" in error.remedy
    text = MINIMAL.replace("dataset: builtin:pystdlib", "dataset: my.parquet")
    entry = "{name: x, dataset: my.parquet, sequence_length: 64}"
    assert SearchSpace.from_text(text, [f"evaluation.perplexity=[{entry}]"]).evaluation.names == ["x"]


def test_too_many_trials_are_refused_at_once():
    seeds = "[" + ", ".join(map(str, range(400))) + "]"
    error = refused(MINIMAL, f"sweep.1.seed={seeds}", f"calibration.seed={seeds}")
    assert "combinations" in error.what
    assert "100000" in error.allowed


def test_a_stored_space_is_equal_when_it_is_read_again(tmp_path):
    overrides = [
        "model.path=[a, b]",
        "calibration.seed=[3, 1]",
        "sweep.1.learning_rate={loguniform: [1e-5, 1e-2]}",
        "sweep.1.batch_size={choice: [1, 4]}",
        "sweep.1.max_grad_norm=[null, 1.0]",
        "search={algorithm: random, num_samples: 3}",
    ]
    space = SearchSpace.from_text(MINIMAL, overrides)
    path = tmp_path / "space.yaml"
    path.write_text(space.resolved_yaml())
    again = SearchSpace.from_yaml(path)
    assert again == space
    assert again.expand() == space.expand()
    assert again.resolved_yaml() == space.resolved_yaml()
    assert SearchSpace.from_dict(space.to_dict()) == space


def test_a_dictionary_is_read_like_a_file():
    data = {
        "name": "a",
        "model": {"path": "builtin:pystdlib"},
        "calibration": {"dataset": "builtin:pystdlib", "seed": (0, 1)},
        "sweep": [{"recovery": "none", "criterion": "wanda", "sparsity": (0.5, 0.6)}],
    }
    assert len(SearchSpace.from_dict(data).expand()) == 1 + 2 * 2
    with pytest.raises(UsageError, match="sweep\\[0\\].sparsity\\[1\\]"):
        SearchSpace.from_dict(data, ["sweep.0.sparsity=[0.5, x]"])
    with pytest.raises(UsageError) as caught:
        SearchSpace.from_dict(
            {**data, "sweep": [{"recovery": "none", "criterion": "wanda", "sparsity": "1e-1x"}]}
        )
    assert caught.value.where == "sweep[0].sparsity"


def test_numbers_that_yaml_1_1_readers_leave_as_text():
    data = {
        "name": "a",
        "model": {"path": "builtin:pystdlib"},
        "calibration": {"dataset": "builtin:pystdlib"},
        "sweep": [{**Trial(recovery="none", criterion="wanda", sparsity=0.5).identity(), "sparsity": "5e-1"}],
    }
    assert SearchSpace.from_dict(data).expand()[1].trial.sparsity == 0.5


def test_another_name():
    space = SearchSpace.from_text(MINIMAL)
    assert space.with_name("b").name == "b"
    assert space.with_name("b").expand() == space.expand()
    with pytest.raises(UsageError, match="--name"):
        space.with_name("../b")


def test_the_protocol_names_what_is_measured_and_not_where_it_lies():
    entry = "{name: x, dataset: my.parquet, split: %s, sequence_length: 64}"
    protocols = [
        SearchSpace.from_text(MINIMAL, [f"evaluation.perplexity=[{entry % split}]"]).evaluation_protocol()
        for split in ("test", "other")
    ]
    assert protocols[0] == protocols[1]
    assert protocols[0]["perplexity"] == [{"name": "x", "sequence_length": 64}]
    assert protocols[0]["validation"] == {"samples": 16, "seed": 0, "sequence_length": 64}
    more = SearchSpace.from_text(MINIMAL, ["validation.samples=8"]).evaluation_protocol()
    assert more != SearchSpace.from_text(MINIMAL).evaluation_protocol()


def test_tasks_of_every_trial_are_part_of_the_protocol_and_those_of_kept_ones_are_not():
    plain = SearchSpace.from_text(MINIMAL).evaluation_protocol()
    kept = SearchSpace.from_text(MINIMAL, ["evaluation.tasks=[a, b]"])
    assert kept.evaluation.tasks == ("a", "b")
    assert kept.evaluation_protocol() == plain
    of_all = SearchSpace.from_text(MINIMAL, ["evaluation.tasks=[a, b]", "evaluation.tasks_on=all"])
    assert of_all.evaluation_protocol() == plain | {"tasks": ["a", "b"]}
    assert SearchSpace.from_text(kept.resolved_yaml()).evaluation == kept.evaluation


def test_frequent_slips_are_told_what_to_write(make_space):
    with pytest.raises(UsageError, match="write 60 % as 0.6"):
        make_space(sweep=[{"recovery": "none", "criterion": "wanda", "sparsity": 60}])
    with pytest.raises(UsageError, match="a tab indents this line"):
        SearchSpace.from_text("name: x\nsweep:\n\t- recovery: none\n")
