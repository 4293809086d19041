"""Tests. Their layout mirrors the packages they test."""
