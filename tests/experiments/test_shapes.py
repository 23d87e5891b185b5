"""The schematic pictures tell what the classes and the loop do."""
import inspect
import json

import pytest

import train
from experiments import costs, shapes
from experiments.plots import PRODUCTS
from experiments.shapes import HOOKS, SIDE, STEP, overriding, shape_of


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    return {method: shape_of(method) for method in PRODUCTS}


def test_shapes_count_what_each_method_trains(found):
    assert {method: row["trained"] for method, row in found.items()} == {
        "full": 128 * 128, "lora": 8 * 256, "dora": 8 * 256 + 128, "adalora": 12 * 257,
        "dash": 8 * 256 + 8, "dual": 2 * 4 * 256, "loha": 2 * 4 * 256, "hira": 8 * 256}
    assert all(row["trained"] == costs.parameters(method, SIDE, SIDE, 8)
               for method, row in found.items())


def test_shapes_have_the_rank_that_each_form_allows(found):
    assert {method: row["rank"] for method, row in found.items()} == {
        "full": 128, "lora": 8, "dora": 128, "adalora": 8, "dash": 8 + 8, "dual": 128,
        "loha": 4 * 4, "hira": 128}


def test_shapes_draw_the_factors_as_wide_as_they_are(found):
    assert found["adalora"]["factors"] == {"P lam Q": {"columns": 12, "kept": 8, "trained": True}}
    assert found["dash"]["factors"] == {
        "B A": {"columns": 8, "kept": 8, "trained": True},
        "U coords Vt": {"columns": 8, "kept": 8, "trained": False}}     # W0's own
    assert [sizes["columns"] for sizes in found["dual"]["factors"].values()] == [4, 4]


@pytest.mark.parametrize("hook", HOOKS)
def test_every_method_with_a_hook_of_its_own_is_named_under_it(hook):
    assert overriding(hook) == list(HOOKS[hook])


def test_the_step_has_the_order_of_the_loop():
    calls = {"loss": "task.loss(", "backward": "backward()", "extra_loss": "extra_loss(",
             "clip": "clip_grad_norm_(", "optimizer.step": "optimizer.step()",
             "on_step": "on_step(", "zero_grad": "zero_grad()"}
    loop, place = inspect.getsource(train.fit), 0
    for name in STEP:
        place = loop.index(calls[name], place) + 1


@pytest.mark.slow
def test_both_pictures_are_written_with_their_numbers_and_come_out_the_same(tmp_path, found):
    for folder in ("once", "again"):
        shapes.main(["--out", str(tmp_path / folder)])
    for name in ("shapes.png", "shapes.json", "step.png", "step.json"):
        once, again = ((tmp_path / folder / name).read_bytes() for folder in ("once", "again"))
        assert once == again
    assert json.loads((tmp_path / "once" / "shapes.json").read_text())["methods"] == found
