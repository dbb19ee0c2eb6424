"""Pieces of a plugin's configuration."""

from __future__ import annotations

BY_HEADER = {"look_up_value_in": "header", "field": "x-tenant-id"}


def attribute(source: str, name: str, event_property_name: str) -> dict[str, str]:
    return {"source": source, "look_up_value_in": name, "event_property_name": event_property_name}


DEPARTMENT = attribute("header", "x-department", "department")
