"""The operations, checked and fast: one public function a file.

Which implementation runs is chosen by ``pyeditfast.backend``; ``pyeditfast.chosen_backends`` tells.
"""

from pyeditfast.ops.activation_gap import activation_gap
from pyeditfast.ops.apply_shift import apply_shift_, check_shift
from pyeditfast.ops.cholesky_solve import cholesky_solve
from pyeditfast.ops.choose_route import choose_route
from pyeditfast.ops.covariance import covariance
from pyeditfast.ops.edit_values import edit_values
from pyeditfast.ops.gram import gram
from pyeditfast.ops.linear_cross_entropy import linear_cross_entropy
from pyeditfast.ops.magnitude_threshold import magnitude_threshold
from pyeditfast.ops.masked_sgd import masked_sgd_, masked_sgd_product_
from pyeditfast.ops.memories import MOST_IN_A_KERNEL
from pyeditfast.ops.merge import merge
from pyeditfast.ops.random_mask import random_mask, random_uniform
from pyeditfast.ops.routed_linear import routed_linear
from pyeditfast.ops.running_moments import RunningMoments
from pyeditfast.ops.solve_shift import solve_shift
from pyeditfast.ops.ties_merge import ties_merge
from pyeditfast.reference.activation_gap import ACTIVATIONS, REDUCTIONS, query_gap, token_gaps
from pyeditfast.reference.margin_loss import margin_loss, mean_of_positive
from pyeditfast.reference.routed_linear import Routed
from pyeditfast.reference.solve_shift import Shift

__all__ = [
    "ACTIVATIONS",
    "MOST_IN_A_KERNEL",
    "REDUCTIONS",
    "Routed",
    "RunningMoments",
    "Shift",
    "activation_gap",
    "apply_shift_",
    "check_shift",
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
    "mean_of_positive",
    "merge",
    "query_gap",
    "random_mask",
    "random_uniform",
    "routed_linear",
    "solve_shift",
    "ties_merge",
    "token_gaps",
]
