"""The operations, checked and fast: one public function a file.

Which implementation runs is chosen by ``pyeditfast.backend``; ``pyeditfast.chosen_backends`` tells.
"""

from pyeditfast.ops.apply_shift import apply_shift_, check_shift
from pyeditfast.ops.cholesky_solve import cholesky_solve
from pyeditfast.ops.covariance import covariance
from pyeditfast.ops.edit_values import edit_values
from pyeditfast.ops.gram import gram
from pyeditfast.ops.random_mask import random_mask, random_uniform
from pyeditfast.ops.running_moments import RunningMoments
from pyeditfast.ops.solve_shift import solve_shift
from pyeditfast.reference.solve_shift import Shift

__all__ = [
    "RunningMoments",
    "Shift",
    "apply_shift_",
    "check_shift",
    "cholesky_solve",
    "covariance",
    "edit_values",
    "gram",
    "random_mask",
    "random_uniform",
    "solve_shift",
]
