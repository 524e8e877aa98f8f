"""Operators with a plain reference and faster backends beside it."""
