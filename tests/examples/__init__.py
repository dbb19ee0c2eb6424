"""The examples in `examples/`, each applied by the tool that it is for; skipped where the tool is not on the PATH."""
