"""Tests of sana.utils, and helpers for tests."""
