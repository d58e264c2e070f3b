"""What makes the documentation site from the code; no part of the package."""
