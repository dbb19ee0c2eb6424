"""`kong-metering check` of a plugin with another name than the usual one: told, found in kong.conf, or not known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest

from kong_metering.information import dump
from kong_metering.installation.kongconf import Connection, with_ours
from kong_metering.plugin_identity import PluginIdentity
from tests.unit.commands.check.helpers import above_notes, findings, run
from tests.unit.commands.helpers import REPOSITORY

NAME = "kong-metering"
TOLD = {"KONG_METERING_PLUGIN_NAME": NAME}
KONNECT = "https://us.api.konghq.com/v3/events"
WRONG_PATH = ("endpoint-path", "plugins[1].config.ingest_endpoint")
SERVER = "/opt/kong-metering/bin/kong-metering-plugin-server --kong-prefix /usr/local/kong"
LUA = (REPOSITORY / "examples" / "hybrid" / "control-plane-lua.conf").read_text("utf-8")


def declared(*names: str) -> str:
    config = {"ingest_endpoint": KONNECT, "api_token": "spat_s3cr3t", "subject": {"look_up_value_in": "consumer"}}
    plugins = [{"name": name, "config": config} for name in names]
    return json.dumps({"_format_version": "3.0", "plugins": [{"name": "key-auth"}, *plugins]})


def manifest(name: str) -> str:
    return json.dumps(
        {
            "apiVersion": "configuration.konghq.com/v1",
            "kind": "KongPlugin",
            "metadata": {"name": "metering"},
            "plugin": name,
            "config": {"ingest_endpoint": KONNECT, "api_token": "spat_s3cr3t"},
        }
    )


def installed(directory: Path, *, protocol: Literal["protobuf", "msgpack"] | None = "protobuf") -> Path:
    """Give the kong.conf that `install --write --plugin-name` writes, with the dump unless there is no protocol."""
    file = directory / "dump.json"
    if protocol is not None:
        file.write_text(json.dumps(dump(protocol, PluginIdentity(NAME))), "utf-8")
    conf = directory / "kong.conf"
    conf.write_text(with_ours("", Connection(NAME, Path("/run/kong-metering/kong-metering.sock"), file)), "utf-8")
    return conf


def started(directory: Path, *flags: str) -> Path:
    """Give a kong.conf by which Kong starts the plugin server itself."""
    command = " ".join((SERVER, *flags))
    conf = directory / "kong.conf"
    conf.write_text(
        f"plugins = bundled,{NAME}\npluginserver_names = metering\n"
        f"pluginserver_metering_socket = /usr/local/kong/{NAME}.sock\n"
        f"pluginserver_metering_start_cmd = {command}\npluginserver_metering_query_cmd = {command} --dump\n",
        "utf-8",
    )
    return conf


def rules(*arguments: object, stdin: str | None = None, **environment: str) -> list[tuple[str, str | None]]:
    found = above_notes(findings(*arguments, stdin=stdin, **environment))
    return [(one["rule"], one["path"]) for one in found]


# ------------------------------------------------------------------------------------------------------------ kong.conf


@pytest.mark.parametrize("protocol", ["protobuf", "msgpack"])
def test_what_install_writes_is_right_and_says_the_name(
    tmp_path: Path, protocol: Literal["protobuf", "msgpack"]
) -> None:
    conf = installed(tmp_path, protocol=protocol)
    assert findings("--kong-conf", conf) == []
    assert rules("-", "--kong-conf", conf, stdin=declared(NAME)) == [WRONG_PATH]
    assert rules("-", "--kong-conf", conf, stdin=declared(NAME, "metering-and-billing")) == [WRONG_PATH]


def test_the_flag_in_the_commands_of_kong_conf_says_the_name(tmp_path: Path) -> None:
    conf = started(tmp_path, "--plugin-name", NAME)
    assert rules("--kong-conf", conf) == []
    assert rules("-", "--kong-conf", conf, stdin=declared(NAME)) == [WRONG_PATH]


def test_without_the_flag_kongs_server_has_the_usual_name_whatever_this_environment_says(tmp_path: Path) -> None:
    conf = started(tmp_path)
    for environment in ({}, TOLD):
        assert ("plugin-not-loaded", "plugins") in rules("--kong-conf", conf, **environment)


def test_the_dump_of_another_plugin_says_nothing(tmp_path: Path) -> None:
    conf = installed(tmp_path)
    for text in ('{"Plugins": [{"Name": "js", "Schema": {}}, 7]}', "[]", "{", "7", "[" * 100_000):
        (tmp_path / "dump.json").write_text(text, "utf-8")
        assert rules("--kong-conf", conf) == [("plugin-not-loaded", "plugins")]


def test_a_dump_that_is_not_here_leaves_the_name_open(tmp_path: Path) -> None:
    conf = installed(tmp_path, protocol=None)
    (said,) = findings("--kong-conf", conf)
    assert (said["level"], said["rule"], said["path"]) == ("note", "unknown-plugin-name", "plugins")
    assert "the file of pluginserver_metering_query_cmd says it, and is not here" in said["problem"]
    assert "if it is one of kong-metering, say so with --plugin-name" in said["remedy"]
    assert findings("--kong-conf", conf, "--plugin-name", NAME) == []
    assert findings("--kong-conf", conf, **TOLD) == []
    # A path that the system refuses to look at, as that in a directory of another user's.
    text = conf.read_text("utf-8")
    for path in ("/" + 5000 * "x", "dump.json", str(tmp_path)):
        conf.write_text(text.replace(str(tmp_path / "dump.json"), path), "utf-8")
        assert [one["rule"] for one in findings("--kong-conf", conf)] == ["unknown-plugin-name"]


def test_no_other_name_is_loaded_so_none_is_ours(tmp_path: Path) -> None:
    conf = installed(tmp_path, protocol=None)
    conf.write_text(conf.read_text("utf-8").replace(f"bundled,{NAME}", "bundled"), "utf-8")
    (said,) = findings("--kong-conf", conf)
    assert (said["rule"], said["remedy"]) == ("plugin-not-loaded", "write `plugins = bundled,metering-and-billing`")


def test_other_plugins_stay_loaded_by_what_is_advised(tmp_path: Path) -> None:
    (tmp_path / "kong.conf").write_text("plugins = bundled,of-ours\n", "utf-8")
    (said,) = findings(tmp_path / "kong.conf", "--plugin-name", NAME)
    assert said["remedy"] == f"write `plugins = bundled,of-ours,{NAME}`"


# -------------------------------------------------------------------------------------------------------- control plane


def test_a_control_plane_with_the_schema_in_lua_needs_no_plugin_server(tmp_path: Path) -> None:
    (tmp_path / "kong.conf").write_text(LUA, "utf-8")
    assert findings("--kong-conf", tmp_path / "kong.conf") == []
    (tmp_path / "kong.conf").write_text(LUA.replace("metering-and-billing", NAME), "utf-8")
    assert findings("--kong-conf", tmp_path / "kong.conf", "--plugin-name", NAME) == []
    (said,) = findings("--kong-conf", tmp_path / "kong.conf")
    assert (said["level"], said["rule"]) == ("note", "unknown-plugin-name")
    assert "its schema in Lua says it" in said["problem"]


@pytest.mark.parametrize(
    ("line", "instead", "level", "said"),
    [
        ("role = control_plane", "role = data_plane", "error", "or, with a schema in Lua, meters nothing"),
        ("role = control_plane", "", "error", "or, with a schema in Lua, meters nothing"),
        ("lua_package_path = ", "#", "warning", "nor a lua_package_path that leads to its schema"),
    ],
)
def test_a_schema_in_lua_is_for_control_planes_only(
    tmp_path: Path, line: str, instead: str, level: str, said: str
) -> None:
    (tmp_path / "kong.conf").write_text(LUA.replace(line, instead), "utf-8")
    (found,) = findings("--kong-conf", tmp_path / "kong.conf")
    assert (found["level"], found["rule"], found["path"]) == (level, "server-not-named", "pluginserver_names")
    assert said in found["problem"]


# ------------------------------------------------------------------------------------------------- configurations alone


def test_the_name_is_told_by_an_option_or_as_the_server_is_told() -> None:
    assert rules("-", "--plugin-name", NAME, stdin=declared(NAME)) == [WRONG_PATH]
    assert rules("-", stdin=declared(NAME), **TOLD) == [WRONG_PATH]
    usual = "metering-and-billing"
    assert rules("-", "--plugin-name", usual, stdin=declared(usual), **TOLD) == [WRONG_PATH]
    assert run("-", "--plugin-name", "A B", stdin=declared(NAME)).exit_code == 2


@pytest.mark.parametrize(
    ("text", "path"),
    [
        (declared(NAME), "plugins[1].name"),
        (json.dumps({"name": NAME, "config": {"ingest_endpoint": KONNECT}}), "name"),
        (manifest(NAME), "plugin"),
    ],
)
def test_a_plugin_that_is_configured_like_ours_is_named_with_the_option(text: str, path: str) -> None:
    (said,) = findings("-", stdin=text)
    assert (said["level"], said["rule"], said["path"]) == ("warning", "no-metering-plugin", path)
    assert said["problem"].startswith(f"no plugin metering-and-billing is in it, and {NAME} is configured like one")
    assert f"--plugin-name {NAME}" in said["remedy"]
    assert "endpoint-path" in {one["rule"] for one in findings("-", "--plugin-name", NAME, stdin=text)}


def test_kongs_own_plugin_of_the_usual_name_is_no_misspelling_of_ours() -> None:
    text = declared("metering-and-billing")
    (said,) = findings("-", "--plugin-name", "metering-and-billing-2", stdin=text)
    assert (said["rule"], said["level"]) == ("no-metering-plugin", "warning")
    assert "if the plugin server has --plugin-name metering-and-billing, check with that" in said["remedy"]


def test_a_name_that_is_nearly_ours_may_be_another_server_s() -> None:
    (said,) = findings("-", stdin=declared("metering-and-billing-2"))
    assert (said["rule"], said["level"]) == ("plugin-name", "error")
    assert "has --plugin-name metering-and-billing-2, check with that" in said["remedy"]
    (without,) = findings("-", stdin=json.dumps({"name": "metering-and-billling"}))
    assert without["remedy"] == "write metering-and-billing"


def test_parts_of_a_configuration_are_of_the_plugin_whatever_it_is_called() -> None:
    settings: dict[str, Any] = {"queue": {"max_batch_sise": 1}}
    for text in (json.dumps({"config": settings}), json.dumps({**settings, "ingest_endpoint": KONNECT})):
        assert "unknown-field" in {one["rule"] for one in findings("-", "--plugin-name", NAME, stdin=text)}
