"""Converters, caches and metrics that a maintainer runs."""
