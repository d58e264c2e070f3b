"""Types of structured pruning, re-exported from the package that finds groups."""

from torchprune_bayes.wiring.groups import (
    AttributeRule,
    Kept,
    Kind,
    Role,
    UnitGroup,
    UnitSlice,
    check_kept,
)

__all__ = ["AttributeRule", "Kept", "Kind", "Role", "UnitGroup", "UnitSlice", "check_kept"]
