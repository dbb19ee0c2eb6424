"""Our lines in kong.conf: added, merged with what is there, and taken out again."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kong_metering.installation.kongconf import Connection, has_ours, lines_for, settings_in, with_ours, without_ours

OURS = Connection("metering-and-billing", Path("/run/kong-metering/kong-metering.sock"), Path("/var/lib/dump.json"))
IN_FORCE = {
    "plugins": "bundled,metering-and-billing",
    "pluginserver_names": "metering",
    "pluginserver_metering_socket": "/run/kong-metering/kong-metering.sock",
    "pluginserver_metering_query_cmd": "cat /var/lib/dump.json",
}
OWNERS = """\
# Kong's own words
database = postgres
plugins = bundled, my-plugin   # mine
pluginserver_names = go
pluginserver_go_socket = /run/go.sock
PluginServer_Metering_Start_Cmd = /opt/kong-metering/bin/kong-metering-plugin-server --kong-prefix /usr/local/kong
"""


def test_an_empty_file_gets_what_kong_needs() -> None:
    assert settings_in(with_ours("", OURS)) == IN_FORCE


def test_what_the_owner_has_stays_in_force_beside_ours() -> None:
    settings = settings_in(with_ours(OWNERS, OURS))
    assert settings == IN_FORCE | {
        "database": "postgres",
        "plugins": "bundled,my-plugin,metering-and-billing",
        "pluginserver_names": "go,metering",
        "pluginserver_go_socket": "/run/go.sock",
    }
    assert "pluginserver_metering_start_cmd" not in settings


@pytest.mark.parametrize(
    ("owners", "plugins"),
    [
        ("plugins = off", "metering-and-billing"),
        ("plugins = bundled,metering-and-billing", "bundled,metering-and-billing"),
        ("plugins =", "bundled,metering-and-billing"),
        ("#plugins = key-auth", "bundled,metering-and-billing"),
    ],
)
def test_the_plugin_is_named_once_beside_the_others(owners: str, plugins: str) -> None:
    assert lines_for(OURS, f"{owners}\n")[0] == f"plugins = {plugins}"


def test_another_name_replaces_the_one_before() -> None:
    renamed = Connection("api-usage", OURS.socket, OURS.dump)
    assert settings_in(with_ours(with_ours(OWNERS, OURS), renamed))["plugins"] == "bundled,my-plugin,api-usage"


_LINES = st.sampled_from(
    [
        *OWNERS.splitlines(),
        "",
        "  plugins=off",
        "# plugins = x",
        "log_level = info \\# no",
        "prefix = /k\r",
        "ü = \u2028",
    ]
)
_FILES = st.lists(_LINES).map(lambda lines: "".join(f"{line}\n" for line in lines))


@given(_FILES)
def test_taking_ours_out_gives_the_file_back_and_doing_it_twice_is_doing_it_once(text: str) -> None:
    ours = with_ours(text, OURS)
    assert has_ours(ours)
    assert with_ours(ours, OURS) == ours
    assert without_ours(ours) == without_ours(text) == text
    assert not has_ours(text)
