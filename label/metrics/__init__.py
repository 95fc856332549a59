"""The scorers: a file per kind, which `registry` finds by its name, and what they share."""
