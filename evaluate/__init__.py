"""Judges models: trained and base model -> samples -> scores -> win rates -> report."""
