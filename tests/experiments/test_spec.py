from pathlib import Path

import pytest
import yaml

from lm.errors import UserError
from lm.experiments import spec
from lm.experiments.space import combinations
from lm.training.metrics import SHOWN
from tests.conftest import ROOT
from tests.support.recipes import CONFIGS, SWEEPS

GOOD = {"recipe": "r.yaml", "settings": {"a.b": [1, 2]}}


def test_the_defaults() -> None:
    found = spec.parse(GOOD, {})
    assert (found.metric, found.maximise, found.at, found.sampler, found.pruner) == (
        "val_loss",
        False,
        "end",
        "tpe",
        "none",
    )
    assert (found.trials, found.seeds, found.steps, found.minutes) == (20, 1, None, None)


def test_what_is_fixed_takes_the_place_of_the_recipes_value() -> None:
    found = spec.parse({**GOOD, "fixed": {"trainer.max_steps": 5}}, {"trainer": {"max_steps": 9, "devices": 1}})
    assert found.recipe == {"trainer": {"max_steps": 5, "devices": 1}}
    assert found.identity != spec.parse(GOOD, {"trainer": {"max_steps": 9, "devices": 1}}).identity


def test_variants_are_named_changes_that_are_all_tried() -> None:
    """Beside other settings, too; a variant's values take the place of those that are fixed."""
    recipe = {"model": {"class_path": "M", "init_args": {"net": {"class_path": "N", "init_args": {"norm": "rms"}}}}}
    variants = {"base": {}, "other": {"model.net.norm": "layer", "c": 3}}
    said = {"recipe": "r.yaml", "fixed": {"c": 2}, "variants": variants}
    found = spec.parse(said, recipe)
    assert found.sampler == "grid" and found.trials > 1000
    assert [one["variant"] for one in combinations(found.settings)] == ["base", "other"]
    assert found.recipe_of({"variant": "base"}) == {**recipe, "c": 2}
    other = found.recipe_of({"variant": "other"})
    assert other["c"] == 3 and other["model"]["init_args"]["net"] == {"class_path": "N", "init_args": {"norm": "layer"}}
    assert found.identity != spec.parse({**said, "variants": {**variants, "third": {"c": 4}}}, recipe).identity

    both = spec.parse({**said, "settings": {"a": [1, 2], "b": {"choices": [5, 6], "when": {"variant": "other"}}}}, {})
    every = list(combinations(both.settings))
    model = {"net": {"norm": "layer"}}
    assert len(every) == 2 + 4 and both.recipe_of(every[-1]) == {"a": 2, "b": 6, "c": 3, "model": model}


def test_a_setting_may_have_two_ranges_under_two_conditions() -> None:
    ranges = {"low": 0.1, "high": 0.2}
    settings = {
        "o": ["A", "B"],
        "o.lr": {**ranges, "when": {"o": "A"}},
        "o.init_args.lr": {**ranges, "when": {"o": "B"}},
    }
    assert len(spec.parse({"recipe": "r.yaml", "settings": settings}, {}).settings) == 3


def test_a_part_of_what_is_chosen_may_vary() -> None:
    """A class by a variant or by what is fixed, one of its settings by a range."""
    varied = {"model.optimizer.init_args.lr": {"low": 0.1, "high": 0.2}}
    variants = {"a": {"model.optimizer": {"class_path": "A"}}, "b": {}}
    found = spec.parse({"variants": variants, "fixed": {"model.optimizer.lr": 3}, "settings": {}}, {})
    assert found.recipe_of({"variant": "a"})["model"]["optimizer"] == {"class_path": "A"}
    found = spec.parse({"variants": variants, "sampler": "tpe", "settings": varied}, {})
    made = found.recipe_of({"variant": "a", "model.optimizer.init_args.lr": 0.1})
    assert made == {"model": {"optimizer": {"class_path": "A", "init_args": {"lr": 0.1}}}}


def test_a_variant_that_changes_nothing_is_part_of_what_a_sweep_is() -> None:
    found = spec.parse({"recipe": "r.yaml", "variants": {"a": {}, "b": {"c": 1}}}, {})
    assert found.identity["variants"] == {"a": "{}", "b": "{'c': 1}"}


def test_whatever_an_evaluation_gives_may_be_the_metric() -> None:
    """Also a classifier's accuracy, and a reward model's margin."""
    for name in ("loss", *SHOWN):
        assert spec.parse({**GOOD, "maximise": f"val/{name}"}, {}).metric == f"val/{name}"


def test_how_long_a_sweep_goes_on_is_no_part_of_what_it_is() -> None:
    longer = {**GOOD, "trials": 50, "budget": {"minutes": 3}}
    assert spec.parse(GOOD, {}).identity == spec.parse(longer, {}).identity
    assert spec.parse(GOOD, {}).identity != spec.parse(GOOD, {"seed_everything": 2}).identity


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trails": 3}, "trails: did you mean trials?"),
        ({"fixed": 3}, "fixed: found 3, expected settings of the recipe"),
        ({"fixed": {"a.b": 3}}, "settings.a.b undoes fixed.a.b: say it in one place"),
        ({"fixed": {"a.init_args.b": 3}}, "settings.a.b undoes fixed.a.init_args.b"),
        ({"fixed": {"c.d": 3, "c": 1}}, "fixed.c undoes fixed.c.d: leave one out, or put the larger one first"),
        ({"fixed": {"c..d": 3}}, "fixed.c..d: a name has parts with a dot between them"),
        ({"settings": {"a.b": [1, 2], "a": ["X", "Y"]}}, "settings.a undoes settings.a.b"),
        ({"settings": {}}, "settings: nothing varies"),
        ({"variants": ["a"]}, "variants: found ['a'], expected a mapping"),
        ({"variants": {"a": {}}}, "variants: there is one"),
        ({"variants": {"a": {}, "b": 3}}, "variants.b: found 3, expected settings"),
        ({"variants": {"a": {}, "b": {"a.b": 3}}}, "settings.a.b undoes variants.b.a.b"),
        ({"variants": {"a": {}, "b": {"a.init_args.b.c": 3}}}, "settings.a.b undoes variants.b.a.init_args.b.c"),
        ({"variants": {"a": {"": 1}, "b": {}}}, "variants.a.: a name has parts"),
        ({"variants": {"a": {"c": 1}, "b": {"c": 1}}}, "variants.b: it is the same as a: drop one"),
        ({"variants": {"a": {}, "b\n": {"c": 1}}}, "variants.'b\\n': say a name of 1 to 60 characters"),
        ({"variants": {"a": {}, " ": {"c": 1}}}, "variants.' ': say a name"),
        ({"variants": {"a": {}, "b" * 61: {"c": 1}}}, "say a name of 1 to 60 characters"),
        ({"variants": {"a": {}, "b": {"c": 1}}, "settings": {"variant": [1, 2]}}, "settings.variant: no recipe has it"),
        ({"settings": {"variant": [1, 2]}}, "settings.variant: no recipe has it"),
        ({"variants": {"1": {"c": 1}, 1: {"c": 2}}}, "variants: two have one name"),
        ({"variants": {"a": {"c": 1, "d": 2}, "b": {"d": 2, "c": 1}}}, "variants.b: it is the same as a"),
        ({"variants": {"a": {}, "b": {"c": 1}}, "settings": 3}, "settings: nothing varies"),
        ({"settings": 3}, "settings: nothing varies"),
        ({"minimise": "val_los"}, "minimise.val_los: did you mean val_loss?"),
        ({"minimise": "loss", "maximise": "loss"}, "minimise and maximise: say one"),
        ({"sampler": "tpee"}, "sampler.tpee: did you mean tpe?"),
        ({"pruner": 3}, "pruner.3: there are none, median"),
        ({"pruner": "wilcoxon"}, "say seeds"),
        ({"sampler": "grid", "settings": {"a": {"low": 0.0, "high": 1.0}}}, "settings.a has no end of values"),
        ({"trials": 0}, "trials is 0: it must be a whole number, at least 1"),
        ({"trials": True}, "trials is True"),
        ({"trials": 1.5}, "trials is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"at": "noon"}, "at: found noon"),
        ({"at": 0}, "at is 0"),
        ({"at": {"minutes": 0}}, "at.minutes is 0: it must be a number above 0"),
        ({"at": {"hours": 1}}, "at.hours: there are minutes"),
        ({"budget": 3}, "budget: found 3"),
        ({"budget": {"step": 3}}, "budget.step: did you mean steps?"),
    ],
)
def test_bad_input(changes: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as error:
        spec.parse({**GOOD, **changes}, {})
    assert said in str(error.value)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_sweeps_of_this_repository(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = spec.read(path, yaml.safe_load)
    assert (
        found.settings
        and found.recipe["model"]
        and Path(found.said["recipe"]) in {p.relative_to(ROOT) for p in CONFIGS}
    )


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = tmp_path / "sweeps.yaml"
    for text, said in (
        ("3", "it names no recipe"),
        ("recipe: none.yaml\nsettings: {a: [1, 2]}", "sweeps.yaml: recipe none.yaml: there is no such file"),
        ("recipe: [", "it is no YAML"),
        ("recipe: bad.yaml\nsettings: {a: [1, 2]}", "it is no recipe"),
    ):
        sweep.write_text(text)
        (tmp_path / "bad.yaml").write_text("- 1")
        with pytest.raises(UserError, match=said):
            spec.read(sweep, yaml.safe_load)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/r.yaml").write_text("seed_everything: 3")
    (tmp_path / "other/s.yaml").write_text(yaml.safe_dump(GOOD))
    assert spec.read(tmp_path / "other/s.yaml", yaml.safe_load).recipe == {"seed_everything": 3}, "beside the sweep"
