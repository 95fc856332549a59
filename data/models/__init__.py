"""Diffusers folders, judged by their configuration files before any weight is loaded."""
