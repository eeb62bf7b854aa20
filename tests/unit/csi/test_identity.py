"""A volume is read with one identity: of a secret, of the pod, or of the node where that may be."""

import json
from collections.abc import Collection
from typing import Any

import pytest

from ckptfs._csi.identity import Wanted, wanted
from ckptfs._csi.publication import TOKENS, Pod, Publication
from ckptfs._csi.refusals import status_of
from ckptfs._model.plans.plan import Plan, encode

AWS = {"awsAccessKeyId": "wrong name"}
KEYS = {"AWS_ACCESS_KEY_ID": "key", "aws_secret_access_key": "S3CR3T"}
ROLE = {"roleArn": "arn:aws:iam::1:role/reader"}
AZURE = "abfss://container@account.dfs.core.windows.net/run"
APPLICATION = {"clientId": "client", "tenantId": "tenant"}


def tokens(**by_audience: str) -> str:
    return json.dumps({audience: {"token": token} for audience, token in by_audience.items()})


ONE_TOKEN = tokens(anything="T0K3N")


def found(
    attributes: dict[str, str],
    secrets: dict[str, str] | None = None,
    token: str = "",
    namespaces: Collection[str] = (),
    namespace: str = "team",
    gid: int | None = None,
) -> Wanted:
    attributes = {"uri": "s3://bucket/run", **attributes}
    publication = Publication("v", "/t/mount", attributes, Pod(namespace, "pod:0", "account"), gid)
    context = {**attributes, **({TOKENS: token} if token else {})}
    return wanted(publication, context, secrets or {}, namespaces)


def refusal(*args: Any, **more: Any) -> tuple[str, str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the status is checked
        found(*args, **more)
    said = str(caught.value)
    assert "\n" not in said
    assert "S3CR3T" not in said
    assert "T0K3N" not in said
    return status_of(caught.value), said


def test_keys_of_a_secret_are_the_locations() -> None:
    given = {"region": "eu-central-1", "endpoint": "http://minio:9000", "prefetch": "a* b/*"}
    result = found(given, KEYS, gid=7)
    assert result.location.secrets == {"access_key": "key", "secret_key": "S3CR3T"}
    assert result.location.options == {
        "region": "eu-central-1",
        "endpoint_override": "minio:9000",
        "scheme": "http",
    }
    assert result.prefetch == ["a*", "b/*"]
    assert (result.volume.gid, result.volume.lends, result.volume.owner) == (7, False, "team")
    assert result.volume.id == result.publication.key
    of_azure = found({"uri": AZURE}, {"azure_storage_sas_token": "S3CR3T"})
    assert of_azure.location.secrets == {"sas_token": "S3CR3T"}
    of_google = found({"uri": "gs://bucket/run"}, {"service_account_key": '{"S3CR3T": 1}'})
    assert of_google.location.secrets == {"service_account_key": '{"S3CR3T": 1}'}
    of_hub = found({"uri": "hf://org/model"}, {"HF_TOKEN": "S3CR3T"})
    assert of_hub.location.secrets == {"token": "S3CR3T"}


def test_web_identity_of_aws_has_the_token_in_memory() -> None:
    by_audience = tokens(**{"sts.amazonaws.com": "T0K3N", "vault": "other"})
    for secrets, token in (({}, by_audience), ({TOKENS: by_audience}, ""), ({}, ONE_TOKEN)):
        location = found({**ROLE, "stsEndpoint": "http://sts:1/"}, secrets, token).location
        assert location.secrets == {"web_identity_token": "T0K3N"}
        assert location.options == {
            "role_arn": ROLE["roleArn"],
            "session_name": "ckptfs-team-account-pod-0",
            "sts_endpoint_url": "http://sts:1",
        }
        assert location.uri == "s3://bucket/run"
        assert "T0K3N" not in repr(location)


def test_web_identity_of_azure_has_the_token_in_memory() -> None:
    location = found({"uri": AZURE, **APPLICATION}, token=ONE_TOKEN).location
    assert location.secrets == {"federated_token": "T0K3N"}
    assert location.options["client_id"] == "client"
    assert location.options["tenant_id"] == "tenant"


def test_web_identity_of_google_has_the_token_in_memory() -> None:
    provider = "projects/1/locations/global/workloadIdentityPools/p/providers/c"
    given = {"uri": "gs://bucket/run", "workloadProvider": provider, "serviceAccount": "a@b"}
    result = found(given, token=tokens(**{f"//iam.googleapis.com/{provider}": "T0K3N", "x": "y"}))
    assert result.location.secrets == {"federated_token": "T0K3N"}
    assert result.location.options == {
        "workload_provider": provider,
        "target_service_account": "a@b",
    }
    assert not result.volume.lends


def test_the_nodes_credentials_are_for_listed_namespaces_only() -> None:
    status, said = refusal({})
    assert status == "PERMISSION_DENIED"
    assert "nodePublishSecretRef or roleArn, or start ckptfs csi with" in said
    assert "--node-credentials-namespace team" in said
    assert refusal({}, namespaces=["other"])[0] == "PERMISSION_DENIED"
    assert "podInfoOnMount" in refusal({}, namespace="", namespaces=[""])[1]
    for namespaces in (["team"], ["*"]):
        assert found({}, namespaces=namespaces).volume.lends
    # A token that the kubelet adds to each volume does not choose the pod's identity by itself.
    assert refusal({}, token=ONE_TOKEN)[0] == "PERMISSION_DENIED"
    assert not found({"uri": "s3://bucket/run?anonymous=true"}).volume.lends


def test_a_named_store_is_the_nodes() -> None:
    given = {"store": "prod", "uri": "/run7/"}
    assert refusal(given)[0] == "PERMISSION_DENIED"
    location = found(given, namespaces=["team"]).location
    assert (location.kind, location.path) == ("named", "run7")
    assert refusal(given, KEYS, namespaces=["team"])[0] == "INVALID_ARGUMENT"
    assert refusal({"store": "prod", "uri": "../x"}, namespaces=["team"])[0] == "INVALID_ARGUMENT"


def test_a_plan_is_read_from_its_attribute() -> None:
    plan = Plan(uri="s3://b/c", version="1", files=[], steps=[])
    assert found({"plan": encode(plan).decode()}, KEYS).plan == plan
    assert refusal({"plan": "nonsense"}, KEYS)[0] == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("attributes", "secrets", "token", "said"),
    [
        ({"uri": "file:///etc"}, {}, "", "a directory of the node"),
        ({"uri": "/etc"}, {}, "", ""),
        ({"uri": "prod:run"}, {}, "", "store: prod and uri: run"),
        ({"uri": "s3://key:S3CR3T@bucket/run"}, {}, "", "nodePublishSecretRef"),
        ({"uri": "s3://bucket/run?tls_ca_file_path=/etc/shadow"}, KEYS, "", "tls_ca_file_path"),
        ({"uri": "s3://bucket/run?region=a", "region": "b"}, KEYS, "", "region"),
        ({"uri": "gs://bucket/run", "region": "b"}, {}, "", "region is for s3://"),
        ({"uri": "https://host/run", "endpoint": "x"}, {}, "", "no endpoint"),
        ({"uri": "s3://b/c?endpoint_override=x", "endpoint": "y"}, KEYS, "", "both name"),
        ({"endpoint": "http://"}, KEYS, "", ""),
        ({"store": "prod", "region": "eu"}, {}, "", "its own region"),
        ({"store": "prod"}, {}, "", "uri is a path in that store"),
        (ROLE, KEYS, ONE_TOKEN, "not both"),
        ({"uri": AZURE, **ROLE}, {}, ONE_TOKEN, "roleArn is not for this store"),
        ({"uri": AZURE, "clientId": "x"}, {}, ONE_TOKEN, "clientId and tenantId"),
        ({"uri": "s3://b/c?role_arn=x", **ROLE}, {}, ONE_TOKEN, "role_arn already"),
        ({"stsEndpoint": "http://sts"}, KEYS, "", "needs roleArn"),
        (ROLE, {}, "nonsense", "not a JSON object"),
        ({"uri": "s4://bucket/run"}, KEYS, "", "unknown scheme"),
    ],
)
def test_contradictions_are_refused(
    attributes: dict[str, str], secrets: dict[str, str], token: str, said: str
) -> None:
    status, message = refusal(attributes, secrets, token, namespaces=["*"])
    assert status == "INVALID_ARGUMENT"
    assert said in message


def test_a_missing_token_names_its_audience() -> None:
    for token in ("", tokens(a="x", b="y"), '{"a": 1}'):
        status, said = refusal(ROLE, token=token)
        assert status == "FAILED_PRECONDITION"
        assert "sts.amazonaws.com" in said


@pytest.mark.parametrize(
    ("secrets", "said"),
    [
        (AWS, "unknown awsAccessKeyId"),
        ({"AWS_ACCESS_KEY_ID": "key"}, "incomplete; set aws_access_key_id and"),
    ],
)
def test_an_unusable_secret_is_refused(secrets: dict[str, str], said: str) -> None:
    status, message = refusal({}, secrets)
    assert status == "PERMISSION_DENIED"
    assert said in message
