"""Faults of every kind for minutes or hours, and an account that must add up: `python -m kong_metering_soak`."""
