"""Heads of continuous generators: how a token is noised, learned and drawn. `base` says what they share."""
