from xml.etree import ElementTree

from lm.experiments import drawings


def test_drawings_are_whole_svg() -> None:
    for text in (
        drawings.scatter("a & b", [(1, 2.0, "<one>"), (10, 3.0, "two")], log_x=True, line=[(1, 2.0), (10, 2.0)]),
        drawings.scatter("texts", [("x", 2.0, "one"), (None, 2.0, "two"), (True, 2.0, "three")]),
        drawings.rows("many", [("x & y", 2.0, "one"), ("z", 3.0, "<two>"), ("z", 2.5, "three")]),
        drawings.bars("shares", {"a": 0.75, "b": 0.0}),
        drawings.parallel("all", ["a", "b"], [([1e-3, "x"], 1.0), ([None, "y"], 2.0)], {"a"}, 1),
    ):
        assert ElementTree.fromstring(text).tag == "figure"


def test_places_on_an_axis() -> None:
    axis = drawings.Axis([1, 10, 100], True, 0, 50)
    assert [axis.at(value) for value in (1, 10, 100)] == [0, 25, 50]
    assert [text for _, text in axis.marks()] == ["1", "3.16", "10", "31.6", "100"]
    assert drawings.Axis([3, 3], False, 0, 50).at(3) == 25
