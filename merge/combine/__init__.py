"""Several tasks of one backbone into one: sums of what each changed in the weights.

A task's part in the sum is the difference between its folded weights and the frozen ones, never its
factors: `(A1 + A2)(B1 + B2)` has cross terms that neither task learned.
"""

from __future__ import annotations

METHODS: dict[str, str] = {
    "linear": "the weighted sum of the differences (task arithmetic, arXiv 2212.04089)",
    "cat": "the same sum, exactly, with low ranks side by side",
    "svd": "the same sum, each weight cut to its nearest low rank",
    "ties": "trim, elect a sign, average who agrees (arXiv 2306.01708)",
    "dare": "drop at random, rescale, sum (arXiv 2311.03099)",
    "dare-ties": "drop at random, rescale, elect a sign, average who agrees",
    "magnitude": "keep the largest values, sum",
}

SPARSE = ("ties", "dare", "dare-ties", "magnitude")
"""Methods that keep a share of each difference."""
RANDOM = ("dare", "dare-ties")
ELECTING = ("ties", "dare-ties")
"""Methods whose sum is an average already, so that a weight's default is 1."""
