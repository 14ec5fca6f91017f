"""The papers' equations in plain PyTorch: the truth that every other implementation is tested
against.

Nothing here checks its arguments, saves memory or hurries. Every function takes any floating dtype.
"""

from pyeditfast.reference.apply_shift import apply_shift_, round_stochastically
from pyeditfast.reference.cholesky_solve import cholesky_solve
from pyeditfast.reference.covariance import covariance
from pyeditfast.reference.edit_values import edit_values
from pyeditfast.reference.gram import gram
from pyeditfast.reference.random_mask import random_mask, random_uniform
from pyeditfast.reference.running_moments import EPSILON, RunningMoments
from pyeditfast.reference.solve_shift import Shift, solve_shift

__all__ = [
    "EPSILON",
    "RunningMoments",
    "Shift",
    "apply_shift_",
    "cholesky_solve",
    "covariance",
    "edit_values",
    "gram",
    "random_mask",
    "random_uniform",
    "round_stochastically",
    "solve_shift",
]
