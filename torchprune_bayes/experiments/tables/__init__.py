"""The published tables that can be repeated, a file for each paper."""
