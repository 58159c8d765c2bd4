"""Operators: registration, differentiation rules and the choice of a backend. One file each."""
