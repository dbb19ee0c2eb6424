"""A real Kong with a database: what a declarative configuration holds is written to it by its Admin API."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import requests
import yaml

from kong_metering_sandbox.gateways import RealKong
from tests.support.adminapi import AdminApi

if TYPE_CHECKING:
    from tests.support.postgres import Cluster

_MARKER = "in-force"
_SECONDS = 20


class KongWithDatabase(RealKong):
    """The Kong on the PATH, with a database of its own in `cluster`.

    A context manager like its base. A configuration that is given is in force in every worker when the call returns.
    """

    cluster: ClassVar[Cluster]

    def __init__(
        self, directory: Path, declarative: str, *, settings: Mapping[str, str] | None = None, **options: Any
    ) -> None:
        # Kong looks each 5 s by default whether its router and its list of plugins are up to date.
        own = {"declarative_config": "", "worker_state_update_frequency": "0.1", **self.cluster.database()}
        self._in_force = ""
        self._times_settled = 0
        all_settings = own | dict(settings or {})
        self._workers = int(all_settings.get("nginx_worker_processes", "2"))
        super().__init__(directory, declarative, settings=all_settings, **options)

    @property
    def admin(self) -> AdminApi:
        """Its Admin API."""
        return AdminApi(self.admin_url)

    def configure(self, declarative: str) -> None:
        """Replace the entities while everything runs."""
        self._write_declarative(declarative)
        self._apply()

    def reload(self, declarative: str | None = None) -> None:
        """Replace the entities if others are given, and reload; see the base class."""
        if declarative is not None:
            self.configure(declarative)
        super().reload()

    def _start(self) -> None:
        super()._start()
        self._apply()

    def _apply(self) -> None:
        text = self._declarative.read_text(encoding="utf-8")
        if text != self._in_force:
            self.admin.apply(yaml.safe_load(text))
            self.settle()
            self._in_force = text

    def settle(self) -> None:
        """Wait until all that was written is in force in every worker: the last is a route that tells who answers.

        It is removed again, and its plugin with it.
        """
        self._times_settled += 1
        answer = f"kong.response.exit(200, '{self._times_settled} ' .. ngx.worker.id())"
        route = self.admin.put("routes", _MARKER, {"paths": [f"/{_MARKER}"]})
        self.admin.put(
            "plugins", route, {"name": "pre-function", "route": {"id": route}, "config": {"access": [answer]}}
        )
        self._wait_for(self._is_in_force, "all workers have the configuration")
        self.admin.delete("routes", route)

    def _is_in_force(self) -> bool:
        """Ask until each worker has answered, as long as none answers of before."""
        answered: set[str] = set()
        wanted = {f"{self._times_settled} {worker}" for worker in range(self._workers)}
        with requests.Session() as session:
            session.trust_env = False
            while answered < wanted:
                headers = {"Connection": "close"}
                text = session.get(f"{self.proxy_url}/{_MARKER}", headers=headers, timeout=_SECONDS).text
                if text not in wanted:
                    return False
                answered.add(text)
        return True
