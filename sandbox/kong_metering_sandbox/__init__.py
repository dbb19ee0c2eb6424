"""A gateway stand-in, an ingest collector and a demo: everything that is needed to see the plugin run."""
