"""How the entries of a model's tensors depend on each other, for everything structured.

In plain words: a run shows which entries of which tensors must be removed together
(:func:`~torchprune_bayes.wiring.trace.observe`), and from that follow the units that can be removed
(:func:`~torchprune_bayes.wiring.units.groups_of`). Shrinking, gates, costs and importances all use
these groups.
"""
