"""Measurements on several processes."""
