"""`kong-metering install` and `uninstall`, as a person calls them, below a directory that stands for the root."""

from __future__ import annotations

import errno
import json
import os
import pwd
import re
import shlex
import shutil
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from kong_metering import information
from kong_metering.commands.main import program
from kong_metering.installation.changes import Changes
from kong_metering.installation.unit import Service, command_in, unit_text
from kong_metering.plugin_identity import PluginIdentity
from tests.support.kongs import kong_in
from tests.support.plugin_server import BIN, ServerProcess, remove_directory, short_directory

pytestmark = pytest.mark.slow

OWN = pwd.getpwuid(os.geteuid()).pw_name
UNIT = "etc/systemd/system/kong-metering.service"
SOCKET = "/run/kong-metering/kong-metering.sock"
DUMP = "/var/lib/kong-metering/dump.json"
SPOOL = "/var/lib/kong-metering/spool"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make another user's directories")
_SECONDS = 60


@dataclass(frozen=True)
class Host:
    """A directory that stands for a host's root, with a kong.conf in it and Kong's prefix beside it."""

    root: Path
    conf: Path
    prefix: Path

    def call(self, command: str, *flags: str, status: int = 0, user: str = OWN) -> str:
        """Call the program, check its exit status, and give what it printed."""
        own = ["--kong-prefix", str(self.prefix), "--user", user] if command == "install" else []
        done = subprocess.run(
            [str(BIN / "kong-metering"), command, "--root", str(self.root), "-c", "/etc/kong.conf", *own, *flags],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout if status == 0 else done.stderr

    def files(self) -> dict[str, object]:
        """Tell all that is there: modes and owners of directories, what files say."""
        return {
            str(path.relative_to(self.root)): (stat.S_IMODE(path.stat().st_mode), path.stat().st_uid)
            if path.is_dir()
            else path.read_text("utf-8")
            for path in self.root.rglob("*")
        }

    def exec_start(self) -> list[str]:
        """Give the service's command, for the paths of this directory."""
        (command,) = re.findall(r"^ExecStart=(.*)$", (self.root / UNIT).read_text("utf-8"), re.MULTILINE)
        return [
            word.replace("/run/", f"{self.root}/run/").replace("/var/", f"{self.root}/var/")
            for word in shlex.split(command)
        ]


@pytest.fixture
def host() -> Iterator[Host]:
    directory = short_directory()
    root, prefix = directory / "root", directory / "prefix"
    (root / "etc").mkdir(parents=True)
    prefix.mkdir()
    yield Host(root, root / "etc/kong.conf", prefix)
    remove_directory(directory)


def test_what_is_installed_serves_and_is_well_when_it_is_started_by_hand(host: Host) -> None:
    host.call("install")
    command = shlex.join(host.exec_start())
    socket = host.root / SOCKET[1:]
    with ServerProcess(command, socket) as server:
        assert server.complaints() == []
        probe = [str(BIN / "kong-metering"), "health", "--socket", str(socket)]
        assert subprocess.run(probe, capture_output=True, timeout=_SECONDS, check=False).returncode == 0
    assert (host.root / SPOOL[1:]).is_dir()


def test_a_kong_conf_that_is_not_there_is_told_as_kong_may_be_started_with_another_one(host: Host) -> None:
    said = "/etc/kong.conf is not there: if Kong is started with another file, name that one with -c"
    assert said in host.call("install", "--dry-run").splitlines()
    host.conf.write_text("log_level = info\n", encoding="utf-8")
    assert "is not there" not in host.call("install", "--dry-run")


def test_directories_are_the_users_and_the_dump_is_for_everybody(host: Host) -> None:
    host.call("install", "--plugin-name", "api-usage", "--priority", "16")
    files = host.files()
    for name, mode in {"var/lib/kong-metering": 0o755, SPOOL[1:]: 0o700, "run/kong-metering": 0o755}.items():
        assert files[name] == (mode, os.geteuid())
    dump = host.root / DUMP[1:]
    assert stat.S_IMODE(dump.stat().st_mode) == 0o644
    assert json.loads(dump.read_text("utf-8")) == json.loads(
        json.dumps(information.dump("protobuf", PluginIdentity("api-usage", 16)))
    )
    assert {"--plugin-name", "api-usage", "--priority", "16"} <= set(host.exec_start())


@needs_root
def test_directories_are_made_for_kongs_user(host: Host) -> None:
    nobody = pwd.getpwnam("nobody")
    if not _may_be_run_by_others():
        pytest.skip("nobody may not run this Python, which install refuses")
    host.call("install", user="nobody")
    place = (host.root / SPOOL[1:]).stat()
    assert (place.st_uid, place.st_gid) == (nobody.pw_uid, nobody.pw_gid)
    assert "User=nobody\n" in (host.root / UNIT).read_text("utf-8")


@needs_root
def test_a_directory_is_made_for_another_user(tmp_path: Path) -> None:
    nobody, told = pwd.getpwnam("nobody"), list[str]()
    Changes(tmp_path, is_dry=False, tell=told.append).directory(Path("/var/lib/kong-metering"), nobody, 0o700)
    place = (tmp_path / "var/lib/kong-metering").stat()
    assert (place.st_uid, place.st_gid, stat.S_IMODE(place.st_mode)) == (nobody.pw_uid, nobody.pw_gid, 0o700)


def _may_be_run_by_others() -> bool:
    """Tell whether another user may run this environment's interpreter."""
    done = subprocess.run(["/bin/sh", "-c", f"test -x {BIN / 'python'}"], user="nobody", check=False, timeout=_SECONDS)
    return done.returncode == 0


def test_doing_it_again_changes_nothing(host: Host) -> None:
    host.conf.write_text("plugins = bundled,mine\n", encoding="utf-8")
    host.call("install", "--write")
    before = host.files()
    said = host.call("install", "--write")
    assert host.files() == before
    assert not re.search(r"^(made|wrote|gave|removed)", said, re.MULTILINE)


def test_a_dry_run_changes_nothing_and_tells_all(host: Host) -> None:
    before = host.files()
    said = host.call("install", "--write", "--dry-run")
    assert host.files() == before
    for path in ("/var/lib/kong-metering", SPOOL, "/run/kong-metering", DUMP, f"/{UNIT}", "/etc/kong.conf"):
        assert re.search(rf"^would have (made|written) {path}\b", said, re.MULTILINE), path


def test_kong_conf_is_only_changed_when_that_is_asked_for(host: Host) -> None:
    host.conf.write_text("plugins = bundled,mine\n", encoding="utf-8")
    said = host.call("install")
    assert host.conf.read_text("utf-8") == "plugins = bundled,mine\n"
    lines = [
        "plugins = bundled,mine,metering-and-billing",
        "pluginserver_names = metering",
        f"pluginserver_metering_socket = {SOCKET}",
        f"pluginserver_metering_query_cmd = cat {DUMP}",
    ]
    assert "".join(f"    {line}\n" for line in lines) in said
    host.call("install", "--write")
    assert set(lines) <= set(host.conf.read_text("utf-8").splitlines())


def test_lines_are_only_told_of_where_some_are_needed(host: Host) -> None:
    assert "the lines above into /etc/kong.conf" in host.call("install", "--dry-run")
    host.call("install", "--write")
    assert "the lines above" not in host.call("install", "--dry-run")


def test_kong_conf_keeps_who_may_read_it(host: Host) -> None:
    host.conf.write_text("pg_password = secret\n", encoding="utf-8")
    host.conf.chmod(0o640)
    host.call("install", "--write")
    assert stat.S_IMODE(host.conf.stat().st_mode) == 0o640


def test_what_is_to_be_done_next_is_told_in_order(host: Host) -> None:
    said = host.call("install", "--write")
    steps = ["systemctl enable --now kong-metering", "kong-metering health", "kong start -c /etc/kong.conf"]
    places = [said.index(step) for step in steps]
    assert places == sorted(places)


def test_events_of_a_server_that_kong_started_are_not_forgotten(host: Host) -> None:
    former = host.prefix / "metering-spool"
    former.mkdir()
    assert f"kong-metering spool deliver --spool-dir {former} --plugin-id " in host.call("install")


def test_a_start_command_has_to_go(host: Host) -> None:
    assert "start_cmd" not in host.call("install")
    host.conf.write_text("pluginserver_metering_start_cmd = /bin/server\n", encoding="utf-8")
    assert "\nand no pluginserver_metering_start_cmd: Kong would start a server" in host.call("install")
    assert "and no pluginserver_metering_start_cmd" not in host.call("install", "--write")


def test_a_kong_that_starts_the_server_itself_has_to_be_restarted(host: Host) -> None:
    with kong_in(host.prefix):
        assert f"kong reload -c /etc/kong.conf -p {host.prefix}" in host.call("install", "--write")
        with (host.prefix / ".kong_env").open("a", encoding="utf-8") as running_with:
            running_with.write("\npluginserver_metering_start_cmd = /bin/kong-metering-plugin-server\n")
        said = host.call("install", "--write")
    assert f"kong restart -c /etc/kong.conf -p {host.prefix}" in said
    assert "kong reload" not in said


def test_flags_of_the_server_are_in_its_command_and_the_time_to_end_follows(host: Host) -> None:
    host.call("install", "--flags", "--servers 2 --stop-timeout 20s")
    assert host.exec_start()[-4:] == ["--servers", "2", "--stop-timeout", "20s"]
    assert "TimeoutStopSec=30\n" in (host.root / UNIT).read_text("utf-8")


def test_flags_that_the_server_would_not_understand_are_refused_before_anything_is_changed(host: Host) -> None:
    before = host.files()
    assert "--flags: --severs" in host.call("install", "--flags", "--severs=2", status=1)
    assert host.files() == before


def test_flags_that_are_no_command_line_are_a_wrong_call(host: Host) -> None:
    assert "Error: --flags: no closing quotation in --servers '2" in host.call(
        "install", "--dry-run", "--flags", "--servers '2", status=2
    )


def test_a_name_is_given_once_or_twice_the_same(host: Host) -> None:
    host.call("install", "--plugin-name", "api-usage", "--flags", "--plugin-name api-usage")
    assert host.exec_start().count("--plugin-name") == 1
    said = host.call("install", "--plugin-name", "api-usage", "--flags", "--plugin-name=other", status=2)
    assert "--plugin-name is api-usage, and other in --flags" in said


def test_the_dump_names_the_protocol_that_the_flags_name(host: Host) -> None:
    host.call("install", "--flags", "--protocol msgpack")
    assert json.loads((host.root / DUMP[1:]).read_text("utf-8"))[0]["Name"] == "metering-and-billing"


@needs_root
def test_nothing_is_made_where_the_user_may_not_run_the_program(host: Host) -> None:
    host.conf.write_text("plugins = bundled\n", encoding="utf-8")
    before = host.files()
    hidden = host.prefix / "hidden"
    (hidden / "bin").mkdir(parents=True)
    hidden.chmod(0o700)
    shutil.copy(BIN.parent / "pyvenv.cfg", hidden)
    (hidden / "lib").symlink_to(BIN.parent / "lib")
    (hidden / "bin/python").symlink_to(BIN / "python")
    command = [str(hidden / "bin/python"), str(BIN / "kong-metering"), "install", "--write", "--root", str(host.root)]
    done = subprocess.run(
        [*command, "-c", "/etc/kong.conf", "-p", str(host.prefix), "--user", "nobody"],
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    assert (done.returncode, host.files()) == (1, before)
    assert "Error: user nobody, whom Kong's workers run as, cannot run " in done.stderr
    assert "/usr/bin/python3 -m venv" in done.stderr
    assert "Next:" not in done.stdout


def test_what_could_not_be_made_is_not_told_as_made(tmp_path: Path) -> None:
    (tmp_path / "var").write_text("a file", encoding="utf-8")
    (tmp_path / "etc").symlink_to("nowhere")
    told: list[str] = []
    changes = Changes(tmp_path, is_dry=False, tell=told.append)
    with pytest.raises(NotADirectoryError):
        changes.directory(Path("/var/lib"), pwd.getpwnam(OWN), 0o755)
    with pytest.raises(OSError, match="exists"):
        changes.file(Path("/etc/unit"), "text")
    assert told == []


def test_who_may_not_make_something_is_told_to_be_root(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/var/lib/kong-metering")

    monkeypatch.setattr(Changes, "directory", refused)
    flags = ["--root", str(host.root), "-c", "/etc/kong.conf", "--user", OWN, "-p", str(host.prefix)]
    said = CliRunner().invoke(program, ["install", *flags])
    assert (said.exit_code, said.stderr) == (1, "Error: /var/lib/kong-metering: Permission denied: run this as root\n")


def test_a_user_who_is_not_there_is_told(host: Host) -> None:
    assert "there is no user no-such-user (--user); name the user of Kong's workers" in host.call(
        "install", user="no-such-user", status=1
    )


def test_the_unit_is_one(host: Host) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    host.call("install", "--flags", "--ca-bundle '/etc/my ca/100%.pem'")
    done = subprocess.run(
        [analyze, "verify", str(host.root / UNIT)], capture_output=True, text=True, timeout=_SECONDS, check=False
    )
    complaints = [line for line in done.stderr.splitlines() if UNIT in line and "nobody" not in line]
    assert (done.returncode, complaints) == (0, [])


def test_arguments_are_written_as_systemd_reads_them() -> None:
    text = unit_text(Service(["/bin/server", "--ca-bundle", '/a b/100%$"'], "kong", "kong", "plugin"))
    assert '\nExecStart=/bin/server --ca-bundle "/a b/100%%$$\\""\n' in text


# Doing it again: what is not given anew stays as it is

OPTIONS = ("--plugin-name", "api-usage", "--priority", "16", "--flags", "--servers 2 --stop-timeout 20s")
KEPT = f"kept from /{UNIT}: --plugin-name api-usage --priority 16 --flags '--servers 2 --stop-timeout 20s'\n"


@pytest.fixture
def installed(host: Host) -> Host:
    """Give a host that has been installed on, with options."""
    host.conf.write_text("plugins = bundled,mine\n", encoding="utf-8")
    host.call("install", "--write", *OPTIONS)
    return host


def edit(host: Host, before: str, after: str) -> None:
    """Change the unit by hand."""
    unit = host.root / UNIT
    text = unit.read_text("utf-8")
    assert before in text
    unit.write_text(text.replace(before, after), encoding="utf-8")


def identity_in(host: Host) -> tuple[str, int]:
    """Give name and priority by which Kong comes to know the plugin."""
    (plugin,) = json.loads((host.root / DUMP[1:]).read_text("utf-8"))["Plugins"]
    return plugin["Name"], plugin["Priority"]


def test_an_upgrade_keeps_what_was_given(installed: Host) -> None:
    before = installed.files()
    assert KEPT in installed.call("install", "--dry-run")
    said = installed.call("install", "--write")
    assert KEPT in said
    assert "changed" not in said
    assert installed.files() == before
    assert identity_in(installed) == ("api-usage", 16)


def test_an_option_that_is_given_anew_replaces_that_one_alone(installed: Host) -> None:
    said = installed.call("install", "--write", "--flags", "--servers 3")
    assert f"kept from /{UNIT}: --plugin-name api-usage --priority 16\n" in said
    assert "changed --flags '--servers 2 --stop-timeout 20s' to '--servers 3'\n" in said
    assert installed.exec_start()[-6:] == ["--plugin-name", "api-usage", "--priority", "16", "--servers", "3"]
    assert "TimeoutStopSec=15\n" in (installed.root / UNIT).read_text("utf-8")


def test_options_are_dropped_by_naming_the_defaults_and_each_is_told(installed: Host) -> None:
    defaults = ["--write", "--flags", "", "--plugin-name", "metering-and-billing", "--priority", "850"]
    before = installed.files()
    dry = installed.call("install", "--dry-run", *defaults)
    assert installed.files() == before
    said = installed.call("install", *defaults)
    for change in (
        "--plugin-name api-usage to metering-and-billing; entities named api-usage keep Kong from starting then",
        "--priority 16 to 850",
        "--flags '--servers 2 --stop-timeout 20s' to ''",
    ):
        assert f"would have changed {change}\n" in dry
        assert f"\nchanged {change}\n" in said
    assert "changed plugins in /etc/kong.conf: bundled,mine,api-usage to bundled,mine,metering-and-billing\n" in said
    assert installed.exec_start()[-1].endswith("/spool")
    assert identity_in(installed) == ("metering-and-billing", 850)
    assert "kept" not in installed.call("install").replace("kept from /" + UNIT + ": --kong-conf", "")


def test_without_a_unit_the_dump_tells_name_and_priority_and_else_kong_conf(installed: Host) -> None:
    (installed.root / UNIT).unlink()
    assert f"kept from {DUMP}: --plugin-name api-usage --priority 16\n" in installed.call("install", "--dry-run")
    (installed.root / DUMP[1:]).write_text("{}", encoding="utf-8")
    assert "kept from /etc/kong.conf: --plugin-name api-usage\n" in installed.call("install", "--write")
    assert identity_in(installed) == ("api-usage", 850)


@pytest.mark.parametrize("name", ["x\\nExecStartPre=/bin/sh", "A", ""])
def test_a_name_from_the_dump_is_a_name(installed: Host, name: str) -> None:
    """The dump is its user's, and the unit is root's."""
    (installed.root / UNIT).unlink()
    installed.conf.unlink()
    dump = f'{{"Plugins": [{{"Name": "{name}", "Priority": 16}}]}}'
    (installed.root / DUMP[1:]).write_text(dump, encoding="utf-8")
    installed.call("install")
    assert identity_in(installed) == ("metering-and-billing", 16)


def test_flags_that_were_written_into_the_command_by_hand_are_kept(installed: Host) -> None:
    edit(installed, "--spool-dir /var/lib/kong-metering/spool", "--spool-dir=/data/spool '--ca-bundle' '/my ca/100%%'")
    kept = "--spool-dir=/data/spool --ca-bundle '/my ca/100%' --servers 2 --stop-timeout 20s"
    assert f" --flags {shlex.quote(kept)}\n" in installed.call("install")
    assert installed.exec_start()[-7:] == shlex.split(kept.replace("%", "%%"))


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ("--servers 2", "--servers ${COUNT}", "systemd puts something else in for $ in ${COUNT}"),
        ("--servers 2", "--ca-bundle %h/ca.pem", "systemd puts something else in for % in %h/ca.pem"),
        ("--servers 2", "--ca-bundle '/a", "its quotes or backslashes are not as `install` writes them"),
        ("--servers 2", "--ca-bundle /a\\x20b", "its quotes or backslashes are not as `install` writes them"),
        ("ExecStart=", "ExecStart=/usr/bin/nice ", "it runs /usr/bin/nice"),
        ("ExecStart=", "ExecStart=\nExecStart=", "it has 2 ExecStart"),
        ("ExecStart=", "#", "it has no ExecStart"),
    ],
)
def test_a_command_that_is_not_as_it_was_written_is_refused_unless_all_of_it_is_given_anew(
    installed: Host, before: str, after: str, why: str
) -> None:
    edit(installed, before, after)
    files = installed.files()
    said = installed.call("install", "--write", status=1)
    assert f"ExecStart in /{UNIT} is not as `install` writes it: {why}. Nothing is changed: give --plugin-name" in said
    assert installed.files() == files
    said = installed.call("install", *OPTIONS)
    assert re.search(rf"^changed .*ExecStart.* in /{UNIT} to ExecStart's /", said, re.MULTILINE)
    assert installed.exec_start()[-2:] == ["--stop-timeout", "20s"]


def test_flags_of_before_that_this_version_does_not_know_are_refused_by_name(installed: Host) -> None:
    edit(installed, "--servers 2", "--severs 2 --priority=high")
    files = installed.files()
    said = installed.call("install", "--write", status=1)
    assert f"/{UNIT} has flags that this version's server would not take: " in said
    assert "--severs is not understood" in said
    assert "--priority: " in said
    assert "Nothing is changed: give those that are to stay, such as --flags '--stop-timeout 20s'" in said
    assert installed.files() == files
    installed.call("install", "--write", "--flags", "--stop-timeout 20s")


def test_settings_that_were_added_to_the_unit_stay_and_those_that_were_changed_are_told(installed: Host) -> None:
    edit(installed, "LimitNOFILE=65536\n", "LimitNOFILE=1000\nEnvironment=HTTPS_PROXY=http://proxy \\\n  NO_PROXY=x\n")
    edit(installed, "[Install]\n", "[Install]\nAlias=metering.service\n")
    added = "Environment=HTTPS_PROXY=http://proxy    NO_PROXY=x"
    said = installed.call("install", "--dry-run")
    assert f"kept from /{UNIT}: Environment, Alias\n" in said
    assert "http://proxy" not in said
    assert f"would have changed LimitNOFILE=1000 in /{UNIT} to LimitNOFILE=65536; what you want to differ" in said
    assert "wrote" in installed.call("install")
    text = (installed.root / UNIT).read_text("utf-8")
    assert f"\n{added}\n" in text.partition("[Install]")[0]
    assert "\nAlias=metering.service\n" in text.partition("[Install]")[2]
    assert "wrote" not in installed.call("install")


def test_a_drop_in_with_a_command_of_its_own_is_told(installed: Host) -> None:
    drop_in = installed.root / f"{UNIT}.d/override.conf"
    drop_in.parent.mkdir()
    drop_in.write_text("[Service]\nEnvironment=A=b\n", encoding="utf-8")
    assert "has an ExecStart" not in installed.call("install")
    drop_in.write_text("[Service]\nExecStart=\nExecStart=/bin/server\n", encoding="utf-8")
    assert f"/{UNIT}.d/override.conf has an ExecStart: systemd runs that one" in installed.call("install")


def test_a_plugin_that_was_named_between_our_marks_is_not_lost(installed: Host) -> None:
    text = installed.conf.read_text("utf-8")
    installed.conf.write_text(
        text.replace("bundled,mine,api-usage", "bundled,mine,api-usage,other").replace(
            "pluginserver_names = metering", "log_level = debug\npluginserver_names = metering,go"
        ),
        encoding="utf-8",
    )
    files = installed.files()
    said = installed.call("install", "--write", status=1)
    assert "/etc/kong.conf would lose what somebody has written between our marks: other in plugins, go in " in said
    assert ", log_level. Nothing is changed: " in said
    assert installed.files() == files
    own = "plugins = bundled,mine,other\npluginserver_names = go\nlog_level = debug\n"
    mark = "# kong-metering: begin"
    installed.conf.write_text(text.replace(mark, own + mark), encoding="utf-8")
    installed.call("install", "--write")
    assert "\nplugins = bundled,mine,other,api-usage\npluginserver_names = go,metering\n" in installed.conf.read_text(
        "utf-8"
    )


def again(host: Host, *flags: str, status: int = 0) -> str:
    """Call `install` with nothing but these flags."""
    command = [str(BIN / "kong-metering"), "install", "--root", str(host.root), "-p", str(host.prefix), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_kong_conf_that_was_named_is_the_one_of_an_upgrade_and_of_uninstall(installed: Host) -> None:
    before = installed.files()
    assert f"kept from /{UNIT}: --kong-conf /etc/kong.conf\n" in again(installed, "--write", "--user", OWN)
    assert installed.files() == before
    said = again(installed, "--dry-run", "--user", OWN, "-c", "/etc/other.conf")
    assert "changed --kong-conf /etc/kong.conf to /etc/other.conf; our lines in the former stay there\n" in said
    command = [str(BIN / "kong-metering"), "uninstall", "--write", "--root", str(installed.root)]
    subprocess.run(command, capture_output=True, timeout=_SECONDS, check=True)
    assert installed.conf.read_text("utf-8") == "plugins = bundled,mine\n"


@needs_root
def test_the_user_is_kept_and_told_where_kongs_workers_are_another_one(installed: Host) -> None:
    (installed.prefix / "nginx.conf").write_text("user nobody;\n", encoding="utf-8")
    assert f"kept from /{UNIT}: --user {OWN}; Kong's workers are user nobody: --user nobody, if" in again(installed)
    assert f"User={OWN}\n" in (installed.root / UNIT).read_text("utf-8")
    edit(installed, f"User={OWN}", "User=gone")
    assert f"there is no user gone (User= in /{UNIT}); name the user" in again(installed, status=1)
    assert f"changed --user gone to {OWN}\n" in again(installed, "--user", OWN)


@given(st.lists(st.text(st.characters(exclude_categories=["C", "Z"]) | st.just(" "))))
def test_a_command_is_read_back_as_it_was_given(arguments: list[str]) -> None:
    assert command_in(unit_text(Service(["/bin/server", *arguments], "kong", "kong", "plugin"))) == [
        "/bin/server",
        *arguments,
    ]


# What is found out


def found(prefix: Path | None = None, conf: Path | None = None, *, status: int = 0) -> str:
    """Give what a dry run finds out, without being told the user."""
    flags = [*(["-p", str(prefix)] if prefix else []), *(["-c", str(conf)] if conf else [])]
    done = subprocess.run(
        [str(BIN / "kong-metering"), "install", "--dry-run", *flags],
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
        env={**os.environ, "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode in (status, 1), done.stderr
    return done.stdout.partition("\n")[0] if status == 0 else done.stderr


@needs_root
def test_the_workers_of_a_kong_that_runs_tell_their_user(host: Host) -> None:
    with kong_in(host.prefix, user=pwd.getpwnam("nobody").pw_uid):
        line = found(host.prefix)
    assert f"; prefix {host.prefix}, which runs; workers are user nobody (process " in line


def test_kong_conf_tells_prefix_and_user(host: Host) -> None:
    host.conf.write_text(f"prefix = {host.prefix}  # ours\nnginx_user = {OWN} {OWN}\n", encoding="utf-8")
    line = found(host.prefix, host.conf)
    assert line.endswith(
        f"; prefix {host.prefix}, which does not run; workers are user {OWN} (nginx_user in kong.conf)"
    )


def test_nginxs_own_configuration_tells_the_user(host: Host) -> None:
    (host.prefix / "nginx.conf").write_text(f"pid pids/nginx.pid;\nuser {OWN} {OWN};\n", encoding="utf-8")
    assert found(host.prefix, host.conf).endswith(f"workers are user {OWN} ({host.prefix}/nginx.conf)")


def kong_that_is(host: Host, version: str) -> dict[str, str]:
    """Have a program on the PATH that says it is this version of Kong."""
    program = host.prefix / "kong"
    program.write_text(f"#!/bin/sh\necho '{version}'\n", encoding="utf-8")
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{host.prefix}:/usr/bin:/bin"}


@pytest.mark.parametrize(
    ("version", "flags", "told"),
    [
        (
            "Kong Enterprise 3.14.0.1",
            [],
            "has a plugin of its own named metering-and-billing, and would never ask this",
        ),
        ("Kong Enterprise 3.14.0.1", ["--plugin-name", "api-usage"], None),
        ("Kong Enterprise 3.13.0.0", [], None),
        ("3.9.1", [], None),
        ("3.3.1", [], "Kong 3.3.1 is too old: Kong 3.4 and later take such a plugin"),
    ],
)
def test_a_kong_that_would_never_ask_the_plugin_is_refused(
    host: Host, version: str, flags: list[str], told: str | None
) -> None:
    command = [str(BIN / "kong-metering"), "install"]
    done = subprocess.run(
        [*command, "--root", str(host.root), "-c", "/etc/kong.conf", "--user", OWN, "-p", str(host.prefix), *flags],
        env=kong_that_is(host, version),
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    assert done.returncode == (0 if told is None else 1), done.stderr
    assert told is None or told in done.stderr
    assert (host.root / UNIT).exists() == (told is None)


# And away again


def test_uninstalling_leaves_the_spool_and_kong_conf_as_it_was(host: Host) -> None:
    host.conf.write_text("plugins = bundled,mine # these\nlog_level = info\n", encoding="utf-8")
    host.call("install", "--write")
    (host.root / SPOOL[1:] / "events").write_text("waiting", encoding="utf-8")
    said = host.call("uninstall", "--write")
    assert f"kept {SPOOL}" in said
    assert host.conf.read_text("utf-8") == "plugins = bundled,mine # these\nlog_level = info\n"
    files = {name for name, what in host.files().items() if isinstance(what, str)}
    assert files == {f"{SPOOL[1:]}/events", "etc/kong.conf"}
    assert "removed" not in host.call("uninstall", "--write")
    shutil.rmtree(host.root / "var")
    assert host.call("uninstall", "--dry-run") == "nothing to do: nothing that `install` makes is here\n"


def test_kong_is_restarted_before_its_server_goes(host: Host) -> None:
    command = [str(BIN / "kong-metering"), "uninstall", "-c", str(host.conf)]
    with kong_in(host.prefix, Path(SOCKET)):
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        assert f"nothing else is removed yet: Kong in {host.prefix} runs with the plugin" in done.stderr
        assert f"then kong restart -p {host.prefix}" in done.stderr
        host.conf.write_text("log_level = info\n", encoding="utf-8")
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    assert f"then kong restart -c {host.conf} -p {host.prefix}" in done.stderr


def test_kong_conf_goes_if_it_had_nothing_but_our_lines(host: Host) -> None:
    host.call("install", "--write")
    host.call("uninstall", "--write")
    assert not host.conf.exists()


def test_nothing_is_taken_away_that_kong_is_still_told_to_use(host: Host) -> None:
    host.call("install", "--write")
    before = host.files()
    assert "/etc/kong.conf still has our lines: take them out, or add --write" in host.call("uninstall", status=1)
    assert host.files() == before
