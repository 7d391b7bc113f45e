"""Tr(F) and Tr(H) of a model on given data."""
