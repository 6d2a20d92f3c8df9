"""Held-out measurements: benchmark episodes, pivot accuracy, and skills that training never touches."""
