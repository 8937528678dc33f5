import pytest

from lm.errors import UserError
from lm.experiments import space
from lm.experiments.space import Setting


def test_a_recipe_with_other_settings() -> None:
    recipe = {"model": {"class_path": "M", "init_args": {"optimizer": {"class_path": "A", "init_args": {"lr": 1}}}}}
    chosen = {"model.init_args.optimizer.init_args.lr": 2, "model.clip_norm": 3, "trainer.max_steps": 4}
    made = space.recipe_with(recipe, chosen)
    assert made["model"]["init_args"] == {"optimizer": {"class_path": "A", "init_args": {"lr": 2}}, "clip_norm": 3}
    assert made["trainer"] == {"max_steps": 4} and recipe["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 1
    whole = {"class_path": "B", "init_args": {"x": 1}}
    assert space.recipe_with(recipe, {"model.optimizer": whole})["model"]["init_args"]["optimizer"] == whole


def test_combinations_leave_out_what_a_condition_switches_off() -> None:
    settings = (
        Setting.of("a", ["x", "y"]),
        Setting.of("b", {"low": 1, "high": 5, "step": 2, "when": {"a": "y"}}),
    )
    assert list(space.combinations(settings)) == [{"a": "x"}, *({"a": "y", "b": b} for b in (1, 3, 5))]
    assert list(space.combinations((Setting.of("a", {"low": 0.0, "high": 1.0}),))) == []


def test_corners_have_every_choice_and_both_ends() -> None:
    settings = (
        Setting.of("a", ["x", "y"]),
        Setting.of("b", {"low": 1, "high": 5, "when": {"a": "y"}}),
        Setting.of("c", {"choices": [7, 8, 9], "when": {"b": 5}}),
    )
    y = {"a": "y", "b": 5}
    assert space.corners(settings) == [{"a": "x"}, {"a": "y", "b": 1}, {"a": "y", "b": 1}, y | {"c": 7}] + [
        y | {"c": c} for c in (7, 8, 9)
    ]


def test_choices_may_be_classes() -> None:
    kinds = [{"class_path": "A"}, {"class_path": "B", "init_args": {"x": 1}}, None, "C"]
    setting = Setting.of("a", kinds)
    assert [setting.value(label) for label in setting.labels] == kinds
    assert all(isinstance(label, space.PLAIN) for label in setting.labels)


def test_short_names() -> None:
    names = [
        "model.init_args.optimizer.init_args.lr",
        "model.init_args.net.init_args.dropout",
        "data.init_args.dropout",
    ]
    assert list(space.short_names(names).values()) == ["lr", "net.dropout", "data.dropout"]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (3, "found 3, expected a list of choices or low and high"),
        ([1], "leaves no choice"),
        ([1, 2, 1], "is there twice"),
        ({"low": 1, "hihg": 2}, "a.hihg: did you mean high?"),
        ({"low": 1}, "it has no high"),
        ({"low": 1, "high": 1}, "a range of one value, 1"),
        ({"low": 2, "high": 1}, "low 2 is above high 1"),
        ({"low": 0, "high": 1, "log": True}, "log needs it above 0"),
        ({"low": "1e-4", "high": 1}, "a.low: found 1e-4, expected a number"),
        ({"low": float("nan"), "high": 1}, "a.low: found nan, expected a number"),
        ({"low": True, "high": 3}, "a.low: found True, expected a number"),
        ({"low": 0, "high": 1, "log": "yes"}, "expected true or false"),
        ({"low": 0, "high": 1, "step": 2}, "step is 2"),
        ({"choices": [1, 2], "low": 1}, "and no range beside it"),
        ({"choices": 3}, "choices: found 3, expected a list"),
        ({"choices": [1, 2], "when": 3}, "when: found 3, expected a mapping"),
    ],
)
def test_what_is_no_setting(found: object, said: str) -> None:
    with pytest.raises(UserError, match="settings.a") as error:
        Setting.of("a", found)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("when", "said"), [({"c": 1}, "c: "), ({"b": 1}, "b: "), ({"aa": 1}, "did you mean a?"), ({"a": 9}, "a is never 9")]
)
def test_a_condition_on_what_is_not_there(when: dict[str, int], said: str) -> None:
    with pytest.raises(UserError) as error:
        space.check_conditions((Setting.of("a", [1, 2]), Setting.of("b", {"choices": [1, 2], "when": when})))
    assert said in str(error.value)
