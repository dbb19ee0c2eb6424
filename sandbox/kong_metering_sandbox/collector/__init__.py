"""A stand-in for OpenMeter's ingest endpoint, for tests and for the demo.

It accepts and refuses what OpenMeter does, keeps every event once in SQLite, answers questions about what
arrived, and fails on request.

Run it with ``python -m kong_metering_sandbox.collector``, or from Python with
:class:`~kong_metering_sandbox.collector.process.CollectorProcess`.
"""
