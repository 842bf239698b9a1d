"""The learning rate of each step, in exact numbers: warm-up, constant, line, cosine, lr_end."""

import math
from dataclasses import replace

import pytest

import loop
from inputs.options import RECIPES

POCKET = replace(RECIPES["pocket"][1], learning_rate=0.5, max_train_steps=12, lr_warmup_steps=0)


def rates(**changes) -> list[float]:
    """Of every step of a run, from 0."""
    config = replace(POCKET, **changes)
    return [loop.learning_rate(step, config) for step in range(config.max_train_steps)]


def test_constant_is_the_rate_itself_to_the_last_step():
    assert rates(lr_scheduler="constant") == [0.5] * 12


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine"])
def test_warm_up_rises_in_equal_steps_never_zero_and_ends_at_the_whole_rate(scheduler):
    found = rates(lr_scheduler=scheduler, lr_warmup_steps=4)
    assert found[:5] == [0.125, 0.25, 0.375, 0.5, 0.5]


def test_warm_up_then_constant():
    assert rates(lr_scheduler="constant", lr_warmup_steps=4)[4:] == [0.5] * 8


def test_cosine_without_an_end_falls_towards_zero():
    """Exact where the cosine is: whole at step 0, half in the middle, a quarter at two thirds."""
    found = rates(lr_scheduler="cosine", lr_end=0.0)
    assert found[0] == 0.5
    assert found[4] == pytest.approx(0.375, rel=1e-12)  # cos(60 degrees) is 1/2
    assert found[6] == pytest.approx(0.25, rel=1e-12)
    assert found[8] == pytest.approx(0.125, rel=1e-12)
    assert found[11] == pytest.approx(0.25 * (1 + math.cos(math.pi * 11 / 12)), rel=1e-12)
    assert found == sorted(found, reverse=True) and len(set(found)) == 12


def test_linear_falls_in_equal_steps_from_the_whole_rate_to_its_end_and_stays_there():
    found = rates(lr_scheduler="linear", lr_end=0.2, max_train_steps=14, lr_schedule_steps=12)
    assert found[:12] == pytest.approx([0.5 - 0.4 * step / 12 for step in range(12)], rel=1e-12)
    assert found[12:] == [0.5 * 0.2] * 2
    warm = rates(lr_scheduler="linear", lr_end=0.0, lr_warmup_steps=4)
    assert warm[4:] == pytest.approx([0.5 * (8 - step) / 8 for step in range(8)], rel=1e-12)


def test_a_schedule_of_its_own_length_falls_as_a_run_of_that_length_and_stays_at_its_end():
    usual = {"lr_scheduler": "cosine", "lr_end": 0.2, "lr_warmup_steps": 3}
    short = rates(**usual)
    long = rates(**usual, max_train_steps=20, lr_schedule_steps=12)
    assert long[:12] == short  # to the bit
    assert long[12:] == [0.5 * 0.2] * 8
    assert rates(**usual | {"lr_end": 0.0}, max_train_steps=14, lr_schedule_steps=12)[12:] == [0, 0]


def test_a_schedule_no_longer_than_its_warm_up_has_the_whole_rate_once():
    found = rates(lr_scheduler="cosine", lr_end=0.2, lr_warmup_steps=4, lr_schedule_steps=2)
    assert found == [0.125, 0.25, 0.375, 0.5, 0.5] + [0.1] * 7


@pytest.mark.parametrize("length", [1, 6, 40])
def test_a_constant_rate_has_no_end(length):
    assert rates(lr_scheduler="constant", lr_schedule_steps=length) == [0.5] * 12


def test_cosine_ends_at_its_share_of_the_rate_one_step_after_the_last():
    """0.2 of it: the step after the last would have exactly that."""
    found = rates(lr_scheduler="cosine", lr_end=0.2)
    assert found[0] == 0.5
    assert found[4] == pytest.approx(0.5 * (0.2 + 0.8 * 0.75), rel=1e-12)
    assert found[6] == pytest.approx(0.5 * (0.2 + 0.8 * 0.5), rel=1e-12)
    assert found[11] == pytest.approx(0.5 * (0.2 + 0.4 * (1 + math.cos(math.pi * 11 / 12))))
    config = replace(POCKET, lr_scheduler="cosine", lr_end=0.2)
    assert loop.learning_rate(12, config) == 0.1


def test_an_end_of_one_is_constant():
    assert rates(lr_scheduler="cosine", lr_end=1.0) == pytest.approx([0.5] * 12, rel=1e-15)


def test_the_cosine_spans_what_is_left_after_warm_up():
    """Four steps of warm-up: the other eight begin at the whole rate and pass half of it midway."""
    found = rates(lr_scheduler="cosine", lr_end=0.0, lr_warmup_steps=4)[4:]
    assert found[0] == 0.5
    assert found[4] == pytest.approx(0.25, rel=1e-12)
    assert found[7] == pytest.approx(0.25 * (1 + math.cos(math.pi * 7 / 8)), rel=1e-12)


@pytest.mark.parametrize("warmup", [12, 20])
def test_a_run_that_is_all_warm_up_never_leaves_it(warmup):
    found = rates(lr_scheduler="cosine", lr_warmup_steps=warmup)
    assert found == [0.5 * (step + 1) / warmup for step in range(12)]


def test_a_run_of_one_step_has_the_whole_rate():
    for scheduler in ("constant", "cosine"):
        assert rates(lr_scheduler=scheduler, max_train_steps=1) == [0.5]


def test_more_steps_stretch_the_cosine():
    """Where no run has begun: one that has keeps its schedule (keep/identity.py)."""
    config = replace(POCKET, lr_scheduler="cosine", lr_end=0.0)
    assert loop.learning_rate(6, config) < loop.learning_rate(
        6, replace(config, max_train_steps=24)
    )


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_every_recipe_begins_and_ends_above_zero_and_reaches_its_own_rate(recipe):
    config = RECIPES[recipe][1]
    found = [loop.learning_rate(step, config) for step in range(config.max_train_steps)]
    assert max(found) == config.learning_rate and min(found) > 0
