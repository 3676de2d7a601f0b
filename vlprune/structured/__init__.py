"""Structured pruning: whole heads, head dimensions, neurons and layers. Units and scores in, a plan out, a cut model.

    groups, towers = model.groups(), model.towers()          what may be removed, told by the model's family
    scores = {group.name: ... for group in groups}           one number per head, dimension or neuron
    plan = choose(groups, scores, ratio=0.5)                 what is kept
    cut(model, plan)                                         in place; `zero` makes the masked model instead

`plan.py` keeps plans in files, `surgery.py` cuts and loads what was cut, `methods.py` lists the methods, `scores.py`
has the scores of those that need one look only, `upop.py` and `mope.py` the pure steps of the others. This room knows
models by their `Group`s and `Tower`s only.
"""

from vlprune.structured.methods import STRUCTURED, StructuredMethod, plan_by_scores
from vlprune.structured.plan import Plan, check_plan, choose, load_plan, removed, save_plan, unit_cost
from vlprune.structured.surgery import checked_sizes, cut, full_shape, reshape, sizes, tell_depth, zero


__all__ = [
    "STRUCTURED",
    "Plan",
    "StructuredMethod",
    "check_plan",
    "checked_sizes",
    "choose",
    "cut",
    "full_shape",
    "load_plan",
    "plan_by_scores",
    "removed",
    "reshape",
    "save_plan",
    "sizes",
    "tell_depth",
    "unit_cost",
    "zero",
]
