"""Fuzzing: `python -m tests.fuzz --seconds 600`; what was found once runs with the tests (`test_corpus.py`)."""
