"""Modules that several models use. A module used by one model stays with that model."""
