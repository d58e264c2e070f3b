"""Importances of units, one published method each."""
