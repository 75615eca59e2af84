"""Frozen models behind one interface, one folder a family."""
