"""How the entries of a model's tensors are wired: one understanding for all that is structured.

In plain words: a run shows which entries of which tensors stand and fall together
(:func:`~torchprune_bayes.wiring.trace.observe`), and from that follow the units that can be removed
(:func:`~torchprune_bayes.wiring.units.groups_of`). Cutting, gates, costs and importances all read
these groups.
"""
