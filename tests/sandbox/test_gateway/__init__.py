"""Tests of the stand-in gateway; `fakes` holds what they share."""
