"""The bundled plugins that the stand-in plays: as much of each as a demonstration of metering needs."""
