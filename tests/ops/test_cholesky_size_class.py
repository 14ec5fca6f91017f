"""Classes of sizes for which the backends of cholesky_solve are measured: where they begin."""

from __future__ import annotations

import itertools

import pytest
import torch

from pyeditfast.ops.cholesky_size_class import FEWEST_COLUMNS, size_class


def rows_of(name: str) -> str:
    return name.split(" of ")[1].split(" rows")[0]


def items_of(name: str) -> str:
    return name.split(", ")[1].split(" of ")[0]


@pytest.mark.parametrize(
    ("n", "rows"),
    [
        (1, "1 to 64"),
        (64, "1 to 64"),
        (65, "65 to 128"),
        (128, "65 to 128"),
        (129, "129 to 256"),
        (400, "257 to 512"),
        (512, "257 to 512"),
        (1024, "513 to 1024"),
        (2048, "1025 to 2048"),
        (2049, "2049 to 4096"),
        (4096, "2049 to 4096"),
        (4097, "over 4096"),
        (14336, "over 4096"),
    ],
)
def test_rows(n, rows):
    assert rows_of(size_class(2, n, 4096, torch.float64)) == rows


@pytest.mark.parametrize(
    ("number", "items"),
    [
        (1, "1 item"),
        (2, "2 to 4 items"),
        (4, "2 to 4 items"),
        (5, "5 to 16 items"),
        (16, "5 to 16 items"),
        (17, "over 16 items"),
        (1000, "over 16 items"),
    ],
)
def test_items(number, items):
    assert items_of(size_class(number, 400, 4096, torch.float64)) == items


def test_the_whole_name():
    name = size_class(2, 400, FEWEST_COLUMNS, torch.float64)
    assert name == "float64, 2 to 4 items of 257 to 512 rows, 1024 columns or more"
    name = size_class(1, 64, FEWEST_COLUMNS - 1, torch.float32)
    assert name == "float32, 1 item of 1 to 64 rows, under 1024 columns"


def test_classes_differ_by_each_of_their_parts():
    parts = ((1, 2, 5, 17), (64, 65, 4097), (1023, 1024), (torch.float32, torch.float64))
    names = [size_class(*sizes) for sizes in itertools.product(*parts)]
    assert len(set(names)) == len(names) == 48


@pytest.mark.parametrize("sizes", [(0, 400, 4096), (2, 0, 4096), (2, 400, 0)])
def test_nothing_to_solve_has_a_class_too(sizes):
    assert size_class(*sizes, torch.float32).startswith("float32, ")
