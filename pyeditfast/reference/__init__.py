"""The papers' equations in plain PyTorch: the truth that every other implementation is tested
against.

Nothing here checks its arguments, saves memory or hurries. Every function takes any floating dtype.
"""

from pyeditfast.reference.activation_gap import activation_gap
from pyeditfast.reference.apply_shift import apply_shift_, round_stochastically
from pyeditfast.reference.cholesky_solve import cholesky_solve
from pyeditfast.reference.choose_route import MAIN, choose_route
from pyeditfast.reference.covariance import covariance
from pyeditfast.reference.edit_values import edit_values
from pyeditfast.reference.gram import gram
from pyeditfast.reference.linear_cross_entropy import linear_cross_entropy
from pyeditfast.reference.magnitude_threshold import magnitude_threshold
from pyeditfast.reference.margin_loss import margin_loss
from pyeditfast.reference.masked_sgd import masked_sgd_, masked_sgd_product_
from pyeditfast.reference.random_mask import random_mask, random_uniform
from pyeditfast.reference.routed_linear import Routed, routed_linear
from pyeditfast.reference.running_moments import EPSILON, RunningMoments
from pyeditfast.reference.solve_shift import Shift, solve_shift
from pyeditfast.reference.ties_merge import ties_merge

__all__ = [
    "EPSILON",
    "MAIN",
    "Routed",
    "RunningMoments",
    "Shift",
    "activation_gap",
    "apply_shift_",
    "cholesky_solve",
    "choose_route",
    "covariance",
    "edit_values",
    "gram",
    "linear_cross_entropy",
    "magnitude_threshold",
    "margin_loss",
    "masked_sgd_",
    "masked_sgd_product_",
    "random_mask",
    "random_uniform",
    "round_stochastically",
    "routed_linear",
    "solve_shift",
    "ties_merge",
]
