"""The CSI driver, with a gRPC client as the kubelet, and with real daemons, mounts and pods."""

import hashlib
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import Node, wait_until
from support.kubelet import (
    ROX,
    DriverProcess,
    Kubelet,
    capability,
    in_own_users,
    in_pod,
    volumes_at,
)
from support.s3server import S3Server
from support.servers import Moto
from support.usernamespace import IS_SUPPORTED
from support.webidentity import WebIdentityAws

from ckptfs._os.mountinfo import mount_table

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can bind mounts"),
]
ROLE = "arn:aws:iam::123456789012:role/{}"


@pytest.fixture
def driver(node: Node, kubelet: Kubelet) -> Iterator[DriverProcess]:
    with DriverProcess(node, kubelet) as driver:
        yield driver


def check_nothing_left(node: Node, kubelet: Kubelet, driver: DriverProcess) -> None:
    assert volumes_at(kubelet) == []
    assert not [path for path in kubelet.folder.glob("pods/*/volumes/*/*")]
    assert not list(driver.state.glob("*.json"))
    wait_until(lambda: node.status()["attachments"] == [])


def test_publish_read_and_unpublish_leave_nothing(
    node: Node,
    kubelet: Kubelet,
    driver: DriverProcess,
    attributes: dict[str, str],
    keys: dict[str, str],
    small: Path,
) -> None:
    info = kubelet.call("GetPluginInfo")
    assert (info.name, bool(info.vendor_version)) == ("csi.ckptfs.dev", True)
    assert list(kubelet.call("GetPluginCapabilities").ListFields()) == []
    assert kubelet.call("Probe").ready.value
    assert kubelet.call("NodeGetInfo").node_id == "node-1"
    capabilities = kubelet.call("NodeGetCapabilities").capabilities
    assert [each.rpc.type for each in capabilities] == [2, 4, 6]
    target = kubelet.publish("a", attributes, secrets=keys)
    kubelet.publish("a", attributes, secrets=keys)  # each call twice
    kubelet.publish(
        "b", attributes, secrets=keys, volume_capability=capability(ROX, "4711", ("noexec",))
    )
    digest = hashlib.sha256((small / "layers/0/weights.bin").read_bytes()).hexdigest()
    script = "id -u; stat -c '%u %g %a' . layers config.json; sha256sum layers/0/weights.bin"
    read = in_pod(target, f"{script}; touch new || :; pwd -P")
    lines = read.stdout.splitlines()
    assert lines[0] == "65534"  # of a user namespace without a map
    assert lines[1:4] == ["65534 65534 555", "65534 65534 555", "65534 65534 444"]
    assert lines[4].startswith(digest)
    assert lines[5].endswith("/seen")
    assert "Read-only file system" in read.stderr
    grouped = kubelet.target("b")
    owned = in_pod(grouped, "stat -c '%u %g %a' . config.json", groups="4711", users=False)
    assert owned.stdout.split("\n")[:2] == ["0 4711 550", "0 4711 440"]
    assert in_pod(grouped, "cat config.json", groups="4711").stdout == '{"layers": 1}'
    assert "Permission denied" in in_pod(grouped, "cat config.json", users=False).stderr
    # The volumes' directories are for root only, also for a user who knows the name.
    [first, second] = node.status()["attachments"]
    for path in (first["path"], second["path"]):
        assert "Permission denied" in in_pod(target, f"ls {path}", users=False).stderr
    assert first["volume"]
    assert first["pinned"]
    options = {line.path: line for line in mount_table()}
    flags = Path("/proc/self/mountinfo").read_text()
    for each in (target, grouped):
        [line] = [line for line in flags.splitlines() if line.split(" ")[4] == each]
        assert {"ro", "nosuid", "nodev"} <= set(line.split(" ")[5].split(","))
        assert options[each].root.startswith("/.volumes/")
    assert "noexec" in flags.split(f" {grouped} ")[1].split(" ")[0]
    stats = kubelet.stats("a")
    size = sum(path.stat().st_size for path in small.rglob("*") if path.is_file())
    assert [(u.total, u.used, u.unit) for u in stats.usage] == [(size, size, 1), (3, 3, 2)]
    assert not stats.volume_condition.abnormal, stats.volume_condition.message
    for _ in range(2):
        kubelet.unpublish("a")
        kubelet.unpublish("b")
    assert kubelet.refusal(
        "NodeGetVolumeStats", volume_id="csi-a", volume_path=kubelet.target("a")
    ) == ("NOT_FOUND", f"volume csi-a is not published at {kubelet.target('a')}")
    check_nothing_left(node, kubelet, driver)
    assert keys["AWS_SECRET_ACCESS_KEY"] not in driver.log() + node.log()


@pytest.mark.skipif(not IS_SUPPORTED, reason="the kernel has no idmapped mounts of FUSE")
def test_a_pod_with_user_namespaces_reads_and_changes_nothing(
    node: Node,
    kubelet: Kubelet,
    driver: DriverProcess,
    attributes: dict[str, str],
    keys: dict[str, str],
    small: Path,
) -> None:
    (small / ".metadata.json").write_text('{"a": 1}')
    target = kubelet.publish("a", attributes, secrets=keys)
    kubelet.publish("b", attributes, secrets=keys, volume_capability=capability(ROX, "4711"))
    digest = hashlib.sha256((small / "layers/0/weights.bin").read_bytes()).hexdigest()
    seen = "stat -c '%u %g %a' . config.json; sha256sum < layers/0/weights.bin"
    read = in_own_users(target, f"id -u; {seen}; getfattr --only-values -n user.ckptfs.meta.a .")
    assert read.returncode == 0, read.stderr
    *lines, meta = read.stdout.splitlines()
    assert lines == ["0", "0 0 555", "0 0 444", f"{digest}  -"], read.stderr
    assert meta == "1"
    grouped = in_own_users(kubelet.target("b"), seen)
    assert grouped.stdout.splitlines()[:2] == ["0 4711 550", "0 4711 440"], grouped.stderr
    # The same bytes, from the cache, by passthrough where the kernel has it.
    assert in_own_users(target, seen).stdout.splitlines()[-1] == f"{digest}  -"
    user = "setpriv --reuid=1000 --regid=1000 {} cat config.json"
    assert in_own_users(target, user.format("--clear-groups")).stdout == '{"layers": 1}'
    outside = in_own_users(kubelet.target("b"), user.format("--clear-groups"))
    assert "Permission denied" in outside.stderr
    member = in_own_users(kubelet.target("b"), user.format("--groups=4711"))
    assert member.stdout == '{"layers": 1}', member.stderr
    # Root of the pod owns the files there, and has all capabilities there, but changes nothing,
    # even if its runtime has made the volume writable.
    changes = [
        "setfattr -n user.ckptfs.meta.a -v 2 .",
        "setfattr -x user.ckptfs.meta.a .",
        "setfattr -n user.ckptfs.evict -v 1 config.json",
        "setfattr -n user.ckptfs.prefetch -v 1 .",
        "touch new",
        "rm config.json",
        "chmod 777 config.json",
        "chown 1000 config.json",
        "sh -c 'echo > config.json'",
    ]
    for readonly in (True, False):
        for change in changes:
            done = in_own_users(target, change, readonly=readonly)
            assert done.returncode, change
            assert "Read-only file system" in done.stderr, done.stderr
    for attachment in node.status()["attachments"]:  # the same for root on the node
        with pytest.raises(OSError, match="Read-only"):
            os.setxattr(attachment["path"], "user.ckptfs.meta.a", b"2")
    assert (small / ".metadata.json").read_text() == '{"a": 1}'
    kubelet.unpublish("a")
    kubelet.unpublish("b")
    check_nothing_left(node, kubelet, driver)


def test_refused_requests(
    node: Node,
    kubelet: Kubelet,
    driver: DriverProcess,
    attributes: dict[str, str],
    keys: dict[str, str],
    bucket: Path,
) -> None:
    block = capability()
    block.block.SetInParent()
    wrong = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "S3CR3T"}
    table: list[tuple[str, str, dict[str, str], dict[str, Any]]] = [
        ("INVALID_ARGUMENT", "unknown volumeAttributes bukket", {"bukket": "x"}, {}),
        ("INVALID_ARGUMENT", "readOnly: true", {}, {"readonly": False}),
        ("INVALID_ARGUMENT", "volumeMode: Filesystem", {}, {"volume_capability": block}),
        ("NOT_FOUND", "nothing", {"uri": f"s3://{bucket.name}/nothing"}, {}),
        ("INVALID_ARGUMENT", "node", {"uri": "file:///etc", "endpoint": "", "region": ""}, {}),
        ("PERMISSION_DENIED", "", {}, {"secrets": wrong}),
        ("PERMISSION_DENIED", "--node-credentials-namespace default", {}, {"secrets": {}}),
        ("INVALID_ARGUMENT", "its own endpoint", {"store": "prod", "uri": "run"}, {}),
    ]
    for status, text, more, fields in table:
        given = {name: value for name, value in (attributes | more).items() if value}
        given_fields: dict[str, Any] = {"secrets": keys} | fields
        request = kubelet.request("a", given, **given_fields)
        found, said = kubelet.refusal("NodePublishVolume", **request)
        assert (found, text in said) == (status, True), said
        assert "S3CR3T" not in said
    assert "S3CR3T" not in driver.log() + node.log()
    check_nothing_left(node, kubelet, driver)
    kubelet.publish("a", attributes, secrets=keys)
    request = kubelet.request("a", attributes | {"prefetch": "*"}, secrets=keys)
    found, said = kubelet.refusal("NodePublishVolume", **request)
    assert found == "ALREADY_EXISTS", said
    kubelet.unpublish("a")
    check_nothing_left(node, kubelet, driver)


def test_a_deadline_of_the_call_leaves_nothing(
    node: Node,
    kubelet: Kubelet,
    driver: DriverProcess,
    attributes: dict[str, str],
    keys: dict[str, str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and says nothing
        given = attributes | {"endpoint": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        request = kubelet.request("a", given, secrets=keys)
        found, _ = kubelet.refusal("NodePublishVolume", timeout_s=1.0, **request)
        assert found == "DEADLINE_EXCEEDED"
        wait_until(lambda: "DEADLINE_EXCEEDED" in driver.log())
    wait_until(lambda: not list(driver.state.glob("*.json")))
    assert volumes_at(kubelet) == []
    wait_until(lambda: not kubelet.is_busy("a"))
    kubelet.publish("a", attributes, secrets=keys)  # the same volume, with a store that answers
    kubelet.unpublish("a")
    check_nothing_left(node, kubelet, driver)


def test_fifty_volumes_at_once(
    node: Node,
    kubelet: Kubelet,
    driver: DriverProcess,
    attributes: dict[str, str],
    keys: dict[str, str],
) -> None:
    pods = [f"pod-{number}" for number in range(50)]
    with ThreadPoolExecutor(16) as threads:
        targets = list(
            threads.map(lambda pod: kubelet.publish(pod, attributes, secrets=keys), pods)
        )
        assert all(Path(target, "config.json").read_text() for target in targets)
        assert len(node.status()["attachments"]) == 50
        conditions = list(threads.map(lambda pod: kubelet.stats(pod).volume_condition, pods))
        assert not any(condition.abnormal for condition in conditions)
        list(threads.map(kubelet.unpublish, pods))
    check_nothing_left(node, kubelet, driver)


# -- identities


@pytest.fixture(scope="module")
def moto() -> Iterator[Moto]:
    with Moto() as server:
        client = server.client()
        client.create_bucket(Bucket="bucket")
        for team in ("red", "blue"):
            client.put_object(Bucket="bucket", Key=f"{team}/config.json", Body=team.encode())
            for number in range(12):
                body = bytes([number]) * 1_500_000
                client.put_object(Bucket="bucket", Key=f"{team}/w{number:02}", Body=body)
        yield server


@pytest.fixture
def aws(moto: Moto) -> Iterator[WebIdentityAws]:
    with WebIdentityAws(moto.endpoint) as aws:
        yield aws


def web_identity(aws: WebIdentityAws, team: str, role: str = "") -> dict[str, str]:
    return {
        "uri": f"s3://bucket/{team}",
        "endpoint": aws.endpoint,
        "region": "us-east-1",
        "roleArn": ROLE.format(role or team),
        "stsEndpoint": aws.endpoint,
    }


def test_two_pods_read_what_their_own_roles_may(
    node: Node, kubelet: Kubelet, driver: DriverProcess, aws: WebIdentityAws
) -> None:
    tokens = {team: aws.issue(ROLE.format(team), f"/bucket/{team}") for team in ("red", "blue")}
    for team, token in tokens.items():
        target = kubelet.publish(team, web_identity(aws, team), token=token)
        assert in_pod(target, "cat config.json").stdout == team
    assert aws.sessions[0].startswith("ckptfs-default-trainer-red")
    for team, other in (("red", "blue"), ("blue", "red")):
        # The other's prefix, whose bytes are in the cache, and the other's role.
        for pod, role in (("x", team), ("y", other)):
            request = kubelet.request(pod, web_identity(aws, other, role), token=tokens[team])
            found, said = kubelet.refusal("NodePublishVolume", **request)
            assert found == "PERMISSION_DENIED", said
            assert tokens[team] not in said
    # Cached bytes are for those only whose own credentials may read them.
    lister = aws.issue(ROLE.format("lister"), "/bucket/red")
    aws.list_only.add(ROLE.format("lister"))
    target = kubelet.publish("lister", web_identity(aws, "red", "lister"), token=lister)
    assert "Permission denied" in in_pod(target, "cat config.json").stderr
    condition = kubelet.stats("lister").volume_condition
    assert (condition.abnormal, "is failing" in condition.message) == (True, True)
    kubelet.unpublish("lister")
    node.expected_in_log.append("AccessDenied")
    # Without a token, the node's credentials must not be used instead.
    request = kubelet.request("x", web_identity(aws, "red"))
    assert kubelet.refusal("NodePublishVolume", **request)[0] == "FAILED_PRECONDITION"
    for team in tokens:
        kubelet.unpublish(team)
    check_nothing_left(node, kubelet, driver)
    records = "".join(driver.log() + node.log())
    assert not any(token in records for token in tokens.values())


def test_a_renewed_token_is_no_pause_for_a_reader(
    node: Node, kubelet: Kubelet, driver: DriverProcess, aws: WebIdentityAws
) -> None:
    first = aws.issue(ROLE.format("red"), "/bucket/red")
    target = kubelet.publish("red", web_identity(aws, "red"), token=first)
    goes_on = threading.Event()
    read: list[bool] = []

    def reader() -> None:
        for number in range(12):
            data = Path(target, f"w{number:02}").read_bytes()
            read.append(data == bytes([number]) * 1_500_000)
            if number == 3:
                goes_on.wait(60)

    thread = threading.Thread(target=reader)
    thread.start()
    wait_until(lambda: len(read) >= 4)
    # A republish with the same token asks neither the store nor the service.
    sessions = len(aws.sessions)
    kubelet.publish("red", web_identity(aws, "red"), token=first)
    assert len(aws.sessions) == sessions
    # A token that may not read is refused, and the volume keeps its credentials.
    wrong = aws.issue(ROLE.format("blue"), "/bucket/blue")
    request = kubelet.request("red", web_identity(aws, "red"), token=wrong)
    assert kubelet.refusal("NodePublishVolume", **request)[0] == "PERMISSION_DENIED"
    second = aws.issue(ROLE.format("red"), "/bucket/red")
    kubelet.publish("red", web_identity(aws, "red"), token=second)
    keys = [key for key, role in aws.keys.items() if role == ROLE.format("red")]
    newest = keys[-1]
    aws.expire(first)
    aws.keys[newest] = ROLE.format("red")
    goes_on.set()
    thread.join(60)
    assert read == [True] * 12
    assert kubelet.stats("red").volume_condition.abnormal is False
    # The next daemon has the newest token.
    node.here("restart")
    assert Path(target, "config.json").read_text() == "red"
    kubelet.unpublish("red")
    check_nothing_left(node, kubelet, driver)


def test_the_nodes_store_is_for_pods_of_a_listed_namespace(
    node: Node, kubelet: Kubelet, s3: S3Server, small: Path
) -> None:
    root = small.parents[1].relative_to(s3.root)
    keys = node.folder / "keys"
    keys.write_text(
        f"[default]\naws_access_key_id = {s3.access_key}\naws_secret_access_key = {s3.secret_key}\n"
    )
    keys.chmod(0o600)
    with (node.folder / "ckptfs.toml").open("a") as file:
        file.write(
            f'[store.prod]\nuri = "s3://{root}"\nendpoint = "http://{s3.endpoint}"\n'
            f'credentials = {{ file = "{keys}" }}\n'
        )
    node.here("reload")
    given = {"store": "prod", "uri": "run/checkpoint"}
    with DriverProcess(node, kubelet, "--node-credentials-namespace", "training") as driver:
        target = kubelet.publish("a", given, namespace="training")
        assert in_pod(target, "cat config.json").stdout == '{"layers": 1}'
        found, said = kubelet.refusal("NodePublishVolume", **kubelet.request("b", given))
        assert (found, "namespace default" in said) == ("PERMISSION_DENIED", True)
        kubelet.unpublish("a")
        check_nothing_left(node, kubelet, driver)


# -- ends of the driver and of the daemon


def test_volumes_outlive_a_driver_that_is_killed(
    node: Node,
    kubelet: Kubelet,
    driver: DriverProcess,
    attributes: dict[str, str],
    keys: dict[str, str],
) -> None:
    target = kubelet.publish("a", attributes, secrets=keys)
    driver.kill()
    assert Path(target, "config.json").read_text()
    driver.start()
    kubelet.publish("a", attributes, secrets=keys)
    assert len(volumes_at(kubelet)) == 1
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(1) as threads:
        given = attributes | {"endpoint": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        request = kubelet.request("b", given, secrets=keys)
        refused = threads.submit(kubelet.refusal, "NodePublishVolume", **request)
        wait_until(lambda: len(list(driver.state.glob("*.json"))) == 2)
        driver.kill()
        assert refused.result()[0] == "UNAVAILABLE"
        driver.start()
        assert len(list(driver.state.glob("*.json"))) == 1
    kubelet.unpublish("a")
    check_nothing_left(node, kubelet, driver)


def test_a_volume_of_a_daemon_that_has_ended_is_mounted_again(
    node: Node,
    kubelet: Kubelet,
    driver: DriverProcess,
    attributes: dict[str, str],
    keys: dict[str, str],
) -> None:
    target = kubelet.publish("a", attributes, secrets=keys)
    node.end()
    stats = kubelet.stats("a")
    assert (stats.volume_condition.abnormal, stats.usage[0].total > 0) == (True, True)
    assert kubelet.refusal("Probe")[0] == "UNAVAILABLE"
    request = kubelet.request("a", attributes, secrets=keys)
    assert kubelet.refusal("NodePublishVolume", **request)[0] == "UNAVAILABLE"
    kubelet.unpublish("a")  # the pod's part does not wait for the daemon
    assert volumes_at(kubelet) == []
    node.here("mount")
    wait_until(lambda: not list(driver.state.glob("*.json")))
    kubelet.publish("a", attributes, secrets=keys)
    node.end()
    node.here("mount")
    assert "lost the attachment" in kubelet.stats("a").volume_condition.message
    kubelet.publish("a", attributes, secrets=keys)
    assert Path(target, "config.json").read_text()
    kubelet.unpublish("a")
    check_nothing_left(node, kubelet, driver)
