"""Goals: they name cases that are measured, and are compared rightly."""

from __future__ import annotations

import pytest

from bench.gpu.case import cases
from bench.gpu.goals import CHECKS, GOALS, METRICS, Goal, Measurements, judge, judge_all
from bench.gpu.plan import OPS

CEILINGS = [
    {"kind": "ceiling", "name": "copy", "value": 4e12, "unit": "bytes/s"},
    {"kind": "ceiling", "name": "bf16", "value": 8e14, "unit": "FLOP/s"},
]

TWICE = Goal("gram", "a case", "against plain torch", at_least=2.0)


@pytest.fixture(scope="module")
def timed_cases():
    return {(op, case.name): case for op in OPS for case in cases(op, "full")}


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: f"{goal.op}, {goal.case}, {goal.metric}")
def test_every_goal_is_of_a_case_that_is_measured(goal, timed_cases):
    case = timed_cases[goal.op, goal.case]
    if goal.metric in CHECKS:
        assert case.checked and case.asynchronous
        return
    assert case.timed and goal.metric in METRICS
    needed = {
        "against plain torch": bool(case.plain),
        "against published": case.published is not None,
        "of bare matmuls": case.bare is not None,
        "of the ceiling": case.flops > 0 and case.bytes > 0,
        "of copy bandwidth": case.bytes > 0,
    }
    assert needed[goal.metric]


def test_goals_are_unique_and_bound_one_side():
    assert len({(goal.op, goal.case, goal.metric) for goal in GOALS}) == len(GOALS)
    for goal in GOALS:
        given = (goal.at_least, goal.at_most, goal.by_bound)
        assert sum(bound is not None for bound in given) == 1


@pytest.mark.parametrize(
    ("ours", "outcome", "measured"), [(1.0, "met", 2.0), (1.01, "missed", 2.0 / 1.01)]
)
def test_times_as_fast_as_the_fastest_plain_form(timing, ours, outcome, measured):
    rows = Measurements(
        [
            timing(median_seconds=ours),
            timing(median_seconds=3.0, role="plain torch", form="slow"),
            timing(median_seconds=2.0, role="plain torch", form="fast"),
            timing(median_seconds=0.1, role="less exact", form="faster"),
            timing(median_seconds=0.1, role="plain torch", form="elsewhere", case="another case"),
        ]
    )
    verdict = judge(TWICE, rows)
    assert (verdict.outcome, verdict.backend) == (outcome, "triton")
    assert verdict.measured == pytest.approx(measured)


def test_the_fastest_kernel_counts(timing):
    rows = Measurements(
        [
            timing(median_seconds=1.0),
            timing(median_seconds=0.5, form="cuda"),
            timing(median_seconds=0.2, form="torch"),
            timing(median_seconds=1.2, role="plain torch", form="plain"),
        ]
    )
    verdict = judge(TWICE, rows)
    assert (verdict.backend, verdict.outcome) == ("cuda", "met")


@pytest.mark.parametrize(("bare", "outcome"), [(1.0, "met"), (0.99, "missed")])
def test_at_most(timing, bare, outcome):
    goal = Goal("gram", "a case", "of bare matmuls", at_most=1.05)
    rows = Measurements(
        [timing(median_seconds=1.05), timing(median_seconds=bare, role="bare", form="products")]
    )
    assert judge(goal, rows).outcome == outcome


@pytest.mark.parametrize(
    ("flops", "moved", "share", "bound", "outcome"),
    [
        (8e14 * 0.71, 1.0, 0.71, 0.7, "met"),
        (8e14 * 0.69, 1.0, 0.69, 0.7, "missed"),
        (1.0, 4e12 * 0.81, 0.81, 0.8, "met"),
        (8e14 * 0.71, 4e12 * 0.79, 0.79, 0.8, "missed"),
    ],
)
def test_the_bound_depends_on_what_bounds_the_op(timing, flops, moved, share, bound, outcome):
    goal = Goal("gram", "a case", "of the ceiling", by_bound={"matmul": 0.7, "copy": 0.8})
    rows = Measurements([*CEILINGS, timing(flops=flops, bytes=moved)])
    verdict = judge(goal, rows)
    assert verdict.measured == pytest.approx(share)
    assert (verdict.wanted, verdict.outcome) == (bound, outcome)


def test_the_better_of_two_measurements_is_the_ceiling(timing):
    goal = Goal("gram", "a case", "of copy bandwidth", at_least=0.8)
    lower = {**CEILINGS[0], "value": 1e12}
    rows = Measurements([*CEILINGS, lower, timing(bytes=2e12)])
    assert judge(goal, rows).measured == pytest.approx(0.5)


def test_what_was_not_measured_is_said_to_be_so(timing, check):
    copy = Goal("gram", "a case", "of copy bandwidth", at_least=0.8)
    assert judge(TWICE, Measurements([])).outcome == "not measured"
    assert judge(TWICE, Measurements([timing()])).outcome == "nothing to compare with"
    assert judge(copy, Measurements([timing(bytes=1.0)])).outcome == "nothing to compare with"
    plain = timing(role="plain torch", form="plain", median_seconds=9.0)
    alone = Measurements([timing(form="torch"), plain])
    assert judge(TWICE, alone).outcome == "no kernel ran"


@pytest.mark.parametrize(
    ("backend", "outcome"), [("triton", "void: its checks failed"), ("torch", "met")]
)
def test_a_time_behind_a_failed_check_does_not_count(timing, check, backend, outcome):
    plain = timing(role="plain torch", form="plain", median_seconds=9.0)
    rows = Measurements([timing(), plain, check(status="failed", backend=backend, case="other")])
    assert judge(TWICE, rows).outcome == outcome


@pytest.mark.parametrize(
    ("statuses", "outcome"),
    [
        ({"triton": "passed"}, "met"),
        ({"triton": "failed", "cuda": "passed"}, "missed"),
        ({"triton": "passed", "torch": "failed"}, "met"),
        ({"triton": "skipped"}, "not measured"),
        ({}, "not measured"),
    ],
)
def test_goals_that_are_checks(check, statuses, outcome):
    goal = Goal("gram", "a case", "CUDA graph", at_least=1.0)
    rows = [
        check(what="CUDA graph", backend=backend, status=status)
        for backend, status in statuses.items()
    ]
    assert judge(goal, Measurements(rows)).outcome == outcome


def test_only_the_goals_of_the_ops_that_ran():
    found = judge_all(Measurements([]), ["masked_sgd"])
    assert found and {verdict.goal.op for verdict in found} == {"masked_sgd"}
