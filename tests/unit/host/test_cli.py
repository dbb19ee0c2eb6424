"""The program: its flags, their environment variables, what it prints, and what it says in the log."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from kong_metering import __version__, cli, information
from kong_metering.quantities import Listen
from kong_metering.spool.options import INBOX_DIRECTORY, Sync
from tests.support.ingest import IngestServer
from tests.support.plugin_server import BIN, ROOT, PluginServerProcess, ServerProcess, example_settings, script_command
from tests.support.rpc import PLUGIN, Connection, KongClient, KongRequest, request_frame
from tests.support.waiting import wait_until
from tests.unit.host.conftest import answers, header_config

Launch = Callable[..., PluginServerProcess]

PROGRAM = str(BIN / "kong-metering-plugin-server")
FLAGS = {
    "--plugin-name": "api-usage",
    "--priority": "16",
    "--kong-prefix": "/somewhere",
    "--socket-name": "other.sock",
    "--socket": "/run/metering/plugin.sock",
    "--socket-group": "kong",
    "--dump-file": "/run/metering/dump.json",
    "--servers": "3",
    "--listen-queue-size": "17",
    "--phase-timeout": "1.5",
    "--instance-ttl": "7",
    "--stop-timeout": "0.25",
    "--parent": "ignore",
    "--ca-bundle": "/etc/ca.pem",
    "--adaptive-batch": "7",
    "--spool-dir": "/var/spool/metering",
    "--inbox-dir": "/run/metering",
    "--spool-sync": "commit",
    "--spool-max-bytes": "500M",
    "--spool-max-age": "7d",
    "--dedupe-window": "32d",
    "--keep-delivered": "7h",
    "--verify-every": "10m",
    "--metrics-listen": "127.0.0.1:9542",
}
# What stands for the values of those that are not just text.
MEANINGS: dict[str, object] = {
    "--socket": Path("/run/metering/plugin.sock"),
    "--dump-file": Path("/run/metering/dump.json"),
    "--spool-sync": Sync.COMMIT,
    "--spool-max-bytes": 500 * 1024**2,
    "--spool-max-age": 604_800.0,
    "--dedupe-window": 2_764_800.0,
    "--keep-delivered": 25_200.0,
    "--verify-every": 600.0,
    "--metrics-listen": Listen("127.0.0.1", 9542),
}


def output_of(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)


def parsed(*arguments: str, **environment: str) -> dict[str, Any]:
    """Give what the program takes these flags and variables for."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("KONG_METERING_")]:
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        return cli.program.make_context("plugin server", list(arguments)).params


def test_an_inbox_can_be_done_without() -> None:
    assert parsed("--inbox-dir", "none")["inbox_dir"] is None
    assert parsed()["inbox_dir"] == INBOX_DIRECTORY


# What Kong's query command wants


@pytest.mark.parametrize(
    "command",
    [
        shlex.split(example_settings(Path("/nowhere"))["pluginserver_metering_query_cmd"]),
        [str(BIN / "python"), str(ROOT / "plugin_server.py"), "-dump"],
    ],
    ids=["kong.conf.example", "plugin_server.py"],
)
def test_the_dump_is_json_and_nothing_else(command: list[str]) -> None:
    """In an empty environment, as Kong runs it; a prefix that is named and not there is said beside it."""
    answer = output_of(*command)
    assert answer.returncode == 0
    assert ("is no directory that user " in answer.stderr) == ("--kong-prefix" in command)
    assert answer.stderr.count("\n") == ("--kong-prefix" in command)
    dump = json.loads(answer.stdout)
    assert dump["Protocol"] == "ProtoBuf:1"
    (told,) = dump["Plugins"]
    assert told == json.loads(json.dumps(information.plugin_information()))
    assert sorted(told) == ["Name", "Phases", "Priority", "Schema", "Version"]
    assert (told["Name"], told["Priority"]) == (PLUGIN, 850)
    assert (told["Phases"], told["Version"]) == (["access", "log"], __version__)


def test_the_dump_names_no_protocol_where_kong_is_to_speak_messagepack(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--dump", "--protocol", "msgpack"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps([information.plugin_information()]))


def test_the_dump_is_the_same_whatever_else_is_asked_for_or_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--dump"]) == 0
    plain = capsys.readouterr()
    assert cli.main(["-v", "-v", "--dump", "--kong-prefix", "/nowhere", "-m", "--parent", "nonsense"]) == 0
    assert capsys.readouterr().out == plain.out


def test_version_and_help_are_printed_and_nothing_is_served(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{PLUGIN} {__version__}\n"
    explained = output_of(PROGRAM, "--help")
    assert explained.returncode == 0
    for flag in (*FLAGS, "--dump", "--verbose", "--version", "--no-lua-style", "--gevent", "--multiprocessing"):
        assert flag in explained.stdout
    assert set(re.findall(r"\[env var: (KONG_METERING_[A-Z_]+)[];]", " ".join(explained.stdout.split()))) == {
        variable_of(flag) for flag in (*FLAGS, "--no-spool", "--verify-resend", "--protocol")
    }


# Flags


def variable_of(flag: str) -> str:
    return "KONG_METERING_" + flag.removeprefix("--").replace("-", "_").upper()


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_has_its_environment_variable_as_second_choice(flag: str) -> None:
    name, value = flag.removeprefix("--").replace("-", "_"), FLAGS[flag]
    by_flag = parsed(flag, value)
    assert by_flag != parsed()
    assert by_flag[name] == (MEANINGS[flag] if flag in MEANINGS else type(by_flag[name])(value))
    assert parsed(**{variable_of(flag): value}) == by_flag
    assert parsed(flag, value, **{variable_of(flag): "nonsense"}) == by_flag


def test_every_flag_that_takes_a_value_is_among_those_tested() -> None:
    settings = {option.name for option in cli.program.params if isinstance(option, click.Option) and option.metavar}
    assert {f"--{name}".replace("_", "-") for name in settings if name} == {*FLAGS, "--protocol"}


def test_the_former_name_of_the_phase_timeout_is_understood_and_not_shown() -> None:
    wanted = parsed("--phase-timeout", "1.5")
    assert parsed("--event-ttl", "1.5") == wanted
    assert parsed(KONG_METERING_EVENT_TTL="1.5") == wanted
    assert parsed(KONG_METERING_EVENT_TTL="9", KONG_METERING_PHASE_TIMEOUT="1.5") == wanted
    explained = output_of(PROGRAM, "--help").stdout
    assert "event-ttl" not in explained
    assert "EVENT_TTL" not in explained


@pytest.mark.parametrize(
    ("word", "is_without"), [("1", True), ("please", True), ("0", False), ("no", False), ("", False)]
)
def test_the_environment_can_do_without_a_spool(word: str, is_without: bool) -> None:  # noqa: FBT001 - of a table
    assert parsed(KONG_METERING_NO_SPOOL=word)["no_spool"] is is_without
    assert parsed("--no-spool", KONG_METERING_NO_SPOOL=word)["no_spool"] is True


def test_kong_pdks_flags_are_understood() -> None:
    """Those of `start_dedicated_server`: a start_cmd that was written for it goes on to work."""
    theirs = parsed("-p", "/a", "-v", "--socket-name", "b", "--listen-queue-size", "7", "--no-lua-style", "-g")
    assert (theirs["kong_prefix"], theirs["socket_name"], theirs["listen_queue_size"]) == (Path("/a"), "b", 7)
    for arguments in (["-kong-prefix", "/a"], ["-m"], ["--gevent"], ["--multiprocessing"], ["-dump"]):
        parsed(*arguments)


@pytest.mark.parametrize("value", ["100%", "%s", "%(prog)s %d"])
def test_help_can_be_read_whatever_is_in_the_environment(value: str) -> None:
    environment = {variable_of(flag): value for flag in FLAGS}
    assert output_of(PROGRAM, "--help", **environment).stdout == output_of(PROGRAM, "--help").stdout


WRONG = (
    ("--plugin-name", "My Plugin", "My Plugin is no name for a plugin: small letters, digits, '-' and '_', 64 at most"),
    ("--priority", "first", "'first' is not a valid whole number"),
    ("--parent", "nonsense", "'nonsense' is not one of 'auto', 'watch', 'ignore'"),
    ("--phase-timeout", "soon", "soon is not a length of time above 0, such as 90s, 15m, 24h or 30d"),
    ("--phase-timeout", "nan", "nan is not a length of time above 0"),
    ("--instance-ttl", "-1", "-1 is not a length of time above 0"),
    ("--stop-timeout", "-1", "-1 is not a length of time, such as 90s"),
    ("--listen-queue-size", "99999999999", "99999999999 is not in the range 1<=x<=65535"),
    ("--servers", "0", "0 is not in the range 1<=x<=100"),
    ("--spool-sync", "always", "'always' is not one of 'commit', 'second', 'off'"),
    ("--spool-max-bytes", "1.5G", "1.5G is not a size above 0, such as 500M or 1G"),
    ("--spool-max-bytes", "0", "0 is not a size above 0, such as 500M or 1G"),
    ("--spool-max-age", "a month", "a month is not a length of time above 0, such as 90s, 15m, 24h or 30d"),
    ("--dedupe-window", "0", "0 is not a length of time above 0, such as 90s, 15m, 24h or 30d"),
)


@pytest.mark.parametrize(("flag", "value", "complaint"), WRONG)
def test_a_value_that_cannot_be_used_is_said_and_the_default_is_used(
    flag: str, value: str, complaint: str, prefix: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parsed(f"{flag}={value}") == parsed() == parsed(**{variable_of(flag): value})
    assert cli.main(["--dump", "--kong-prefix", str(prefix), f"{flag}={value}"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["Plugins"]
    assert f"error: {PLUGIN}: {flag}: {complaint}" in printed.err
    assert "; the default is used, " in printed.err


def test_a_value_that_cannot_be_used_is_left_out_where_there_is_no_default(
    prefix: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["--dump", "--kong-prefix", str(prefix), "--metrics-listen", "foo"]) == 0
    said = "--metrics-listen: foo is no address, such as 127.0.0.1:9542, [::1]:9542 or unix:/run/metrics.sock"
    assert f"{said}; it is left out: no metrics are served\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--spool-maximum", "1G"], "--spool-maximum is not understood, and left out"),
        (["--spool-dir"], "--spool-dir: Option '--spool-dir' requires an argument. It is left out."),
        (["--no-spool=yes"], "--no-spool: Option '--no-spool' does not take a value. It is left out."),
        (["stray"], "stray is not understood, and left out"),
    ],
)
def test_a_flag_that_is_not_understood_is_said_and_left_out(
    arguments: list[str], complaint: str, prefix: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["--dump", "--kong-prefix", str(prefix), *arguments]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["Plugins"]
    assert complaint in printed.err


def test_a_start_with_wrong_flags_serves_and_says_so_through_kong(launch: Launch, ingest: IngestServer) -> None:
    server = launch("--spool-max-bytes 1.5G", "--spool-dir /proc/nowhere", "--ca-bundle /nowhere.pem", "--new").start()
    client = KongClient(server.path)
    instance = client.start_instance(header_config(ingest.url))
    said: list[str] = []
    for number in range(10):
        request = KongRequest(answers("acme", number))
        client.run_phases(instance, request)
        said += request.said
    ingest.wait_for_events(10)
    text = "\n".join(said)
    for complaint in (
        "--spool-max-bytes: 1.5G is not a size above 0",
        "--new is not understood, and left out",
        "--ca-bundle /nowhere.pem cannot be read by user",
        "/proc/nowhere cannot be used for the spool",
    ):
        assert complaint in text, text


# What the dump says will not work


def dumped(*arguments: str) -> list[str]:
    answer = output_of(PROGRAM, "--dump", *arguments)
    assert answer.returncode == 0
    assert json.loads(answer.stdout)["Plugins"]
    return answer.stderr.splitlines()


def test_the_dump_says_what_will_not_work(prefix: Path) -> None:
    socket = prefix / f"{PLUGIN}.sock"
    (complaint,) = dumped("--kong-prefix", f"{prefix}/missing", "--no-spool")
    assert "/missing is no directory that user " in complaint
    socket.write_text("somebody's", encoding="utf-8")
    (complaint,) = dumped("--kong-prefix", str(prefix), "--no-spool")
    assert f"{socket} exists and is not a socket; move it away" in complaint
    socket.unlink()
    (complaint,) = dumped("--kong-prefix", str(prefix), "--no-spool", "--socket-name", "x" * 100)
    assert f"the socket's path has {len(str(prefix)) + 101} bytes, and Kong can connect to one of 107" in complaint
    (complaint,) = dumped("--kong-prefix", str(prefix), "--no-spool", "--ca-bundle", "/nowhere.pem")
    assert "--ca-bundle /nowhere.pem cannot be read by user " in complaint
    (complaint,) = dumped("--kong-prefix", str(prefix), "--no-spool", "--ca-bundle", "/etc/passwd")
    assert complaint.endswith("--ca-bundle /etc/passwd holds no certificate (PEM): nothing is delivered over TLS")
    (complaint,) = dumped("--kong-prefix", str(prefix), "--spool-dir", "/proc/version/spool")
    assert "cannot keep files in /proc/version/spool: events wait in memory" in complaint


@pytest.fixture
def open_prefix() -> Iterator[Path]:
    """Give a directory that everybody can get to, wherever the tests have their own."""
    with tempfile.TemporaryDirectory(prefix="km-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_the_dump_of_root_judges_for_the_user_of_kongs_workers(open_prefix: Path) -> None:
    """It is the one of nginx.conf, which Kong writes before it asks; and Kong's log file has it as well."""
    (open_prefix / "logs").mkdir()
    log = open_prefix / "logs" / "error.log"
    log.touch()
    (open_prefix / "nginx.conf").write_text(
        "user nobody nogroup;\nerror_log logs/error.log notice;\n", encoding="utf-8"
    )
    said = dumped("--kong-prefix", str(open_prefix))
    assert any(
        f"user nobody, whom Kong's workers run as, cannot make a socket in {open_prefix}" in line for line in said
    )
    assert any("cannot keep files in" in line for line in said)
    assert [line.partition("[error] ")[2].partition(": ")[2] for line in log.read_text().splitlines()] == [
        line.partition("error: ")[2] for line in said
    ]
    (open_prefix / "nginx.conf").write_text("user root root;\n", encoding="utf-8")
    assert dumped("--kong-prefix", str(open_prefix)) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_the_dump_of_root_says_that_workers_cannot_run_the_interpreter(open_prefix: Path) -> None:
    private = open_prefix / "private"
    private.mkdir(mode=0o700)
    python = private / "python"
    python.symlink_to(sys.executable)
    command = [str(python), PROGRAM, "--dump", "--kong-prefix", str(open_prefix), "--no-spool"]
    (open_prefix / "nginx.conf").write_text("user nobody nogroup;\n", encoding="utf-8")
    answer = output_of(*command, PYTHONPATH=":".join(sys.path))
    assert f"user nobody, whom Kong's workers run as, cannot run {python} with " in answer.stderr
    (open_prefix / "nginx.conf").write_text("user root root;\n", encoding="utf-8")
    assert output_of(*command, PYTHONPATH=":".join(sys.path)).stderr == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_the_dump_of_root_names_the_python_that_a_virtual_environment_leads_to(open_prefix: Path) -> None:
    private = open_prefix / "private"
    private.mkdir(mode=0o700)
    python, leads_to = open_prefix / "python", private / "python"
    leads_to.symlink_to(sys.executable)
    python.symlink_to(leads_to)
    command = [str(python), PROGRAM, "--dump", "--kong-prefix", str(open_prefix), "--no-spool"]
    (open_prefix / "nginx.conf").write_text("user nobody nogroup;\n", encoding="utf-8")
    answer = output_of(*command, PYTHONPATH=":".join(sys.path))
    assert f"cannot run {python}, which is {leads_to}, with " in answer.stderr


def test_a_prefix_that_is_not_there_is_refused_with_the_reason(prefix: Path) -> None:
    answer = output_of(PROGRAM, "--kong-prefix", f"{prefix}/missing")
    assert answer.returncode == 1
    assert answer.stderr.startswith("critical: cannot start: ")
    assert answer.stderr.endswith("missing is not a directory; -p/--kong-prefix must name Kong's prefix\n")


@pytest.mark.parametrize(
    ("mode", "parent", "watched"),
    [("auto", 17, 17), ("auto", 1, None), ("auto", 0, None), ("watch", 1, 1), ("watch", 17, 17), ("ignore", 17, None)],
)
def test_which_parent_must_live_on(
    mode: str, parent: int, watched: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started by process 1 or as process 1, as under a supervisor or in a container, there is none to watch."""
    monkeypatch.setattr(os, "getppid", lambda: parent)
    assert cli._parent(mode) == watched


def test_the_environment_is_enough_to_start(prefix: Path) -> None:
    environment = {
        "KONG_METERING_KONG_PREFIX": str(prefix),
        "KONG_METERING_SOCKET_NAME": "other.sock",
        "KONG_METERING_PHASE_TIMEOUT": "0.01",
    }
    with ServerProcess(PROGRAM, prefix / "other.sock", environment=environment) as server:
        client = KongClient(server.path)
        instance = client.start_instance(header_config("http://127.0.0.1:1"))
        client.call("HandleEvent", {"InstanceId": instance, "EventName": "access"})
        wait_until(lambda: client.status()["Events"] == 0, "the event to be forgotten")


def test_the_checkouts_own_program_serves_as_well_and_makes_files_for_its_owner_only(prefix: Path) -> None:
    """Kong starts it with umask 0."""
    command = script_command(ROOT / "plugin_server.py", prefix, "-v", "-g", "--no-lua-style")
    with ServerProcess(command, prefix / f"{PLUGIN}.sock") as server:
        assert KongClient(server.path).call("GetPluginInfo", PLUGIN)["Name"] == PLUGIN
        status = Path(f"/proc/{server.pid}/status").read_text(encoding="utf-8")
    assert re.search(r"^Umask:\s+0077$", status, re.MULTILINE)
    assert server.complaints() == []


# The log

HOSTILE = "evil\nerror: forged line\r\x1b[31m\x00\x07\x7f\x85\u2028\u202e\udcff\U000e0001"
TOKEN = "om_s3cret_token"


def hostile_frames(instance: int, endpoint: str) -> list[bytes]:
    config = header_config(endpoint, api_token=TOKEN)
    broken = [
        {**config, "ingest_endpoint": HOSTILE},
        {**config, "ingest_endpoint": f"http://{TOKEN}\n@x y"},
        {**config, "api_token": f"{TOKEN}\n{HOSTILE}"},
        {**config, "api_token": {TOKEN: TOKEN}},
        {**config, "api_token": [TOKEN]},
        {**config, "subject": {"look_up_value_in": HOSTILE, "field": HOSTILE}},
        {**config, "allow_status_codes": [HOSTILE]},
        {**config, "queue": HOSTILE, "attributes": TOKEN},
        {**config, "plugin_instance_name": HOSTILE, "__plugin_id": HOSTILE, "timeout": HOSTILE},
        {**config, "ingest_endpoint": "", "$refs": {"ingest_endpoint": HOSTILE}},
        {HOSTILE: TOKEN},
    ]
    arguments: list[tuple[str, object]] = [
        ("StartInstance", {"Name": PLUGIN, "Config": json.dumps(item)}) for item in broken
    ]
    arguments += [
        ("StartInstance", {"Name": HOSTILE, "Config": json.dumps(config)}),
        ("StartInstance", {"Name": PLUGIN, "Config": HOSTILE}),
        ("CloseInstance", HOSTILE),
        ("HandleEvent", {"InstanceId": HOSTILE, "EventName": HOSTILE}),
        ("HandleEvent", {"InstanceId": instance, "EventName": HOSTILE}),
        ("Step", {"EventId": HOSTILE, "Data": HOSTILE}),
        ("StepError", {"EventId": HOSTILE, "Data": HOSTILE}),
        ("GetPluginInfo", HOSTILE),
        (HOSTILE, HOSTILE),
        ("x" * 100_000, None),
    ]
    return [request_frame(7, method, argument).data for method, argument in arguments]


def test_no_input_forges_or_breaks_log_lines_or_brings_the_token_into_them(launch: Launch) -> None:
    server = launch("-v").start()
    client = KongClient(server.path)
    with IngestServer() as ingest:
        ingest.answer_next(401, 200)
        named = header_config(ingest.url, plugin_instance_name=HOSTILE, api_token=TOKEN)
        instance = client.start_instance(named)
        for frame in hostile_frames(instance, ingest.url):
            answer = client.answer_to(frame)
            assert answer.error is None or answer.error.isprintable()
        with Connection(server.path) as connection:
            connection.send(HOSTILE.encode("utf-8", "surrogateescape"))
            assert connection.is_ended()
        client.run_phases(instance, KongRequest(answers(HOSTILE)))
        failing = client.call("HandleEvent", {"InstanceId": instance, "EventName": "log"})
        client.call("StepError", {"EventId": failing["EventId"], "Data": HOSTILE * 1000})
        ingest.wait_for_events(1)
        server.stop()
    assert len(server.complaints()) > 5
    for line in server.log:
        assert re.match(r"(debug|info|warning|error|critical): ", line)
        assert line.isprintable()
        assert len(line.encode()) <= 2048
        assert TOKEN not in line
        assert not line.startswith("error: forged")


def test_a_log_that_nobody_reads_does_not_hold_up_the_process(prefix: Path) -> None:
    """Kong empties the pipe; if it does not, lines are lost and metering goes on."""
    reading, writing = os.pipe()
    path = prefix / f"{PLUGIN}.sock"
    process = subprocess.Popen([PROGRAM, "-v", "--kong-prefix", str(prefix)], env={}, stdout=writing, stderr=writing)
    try:
        wait_until(path.exists, "a socket")
        client = KongClient(path)
        for _ in range(100):
            client.start_instance(header_config("not a URL", plugin_instance_name="x" * 2000))
        assert client.status()
        process.terminate()
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.wait()
        os.close(reading)
        os.close(writing)
