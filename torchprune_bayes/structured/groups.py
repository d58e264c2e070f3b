"""The vocabulary of everything structured; it lives with what finds the groups."""

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
