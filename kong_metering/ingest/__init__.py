"""The endpoint's side: one POST, and what its answer means."""
