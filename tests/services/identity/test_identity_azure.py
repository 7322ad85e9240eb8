"""Azure's own clients, unmodified: challenge, roles, credentials against the development issuer."""

from __future__ import annotations

import base64
import json
import ssl
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from azure import identity as azure_identity
from azure.core.credentials import AccessToken
from azure.core.exceptions import (
    ClientAuthenticationError,
    HttpResponseError,
    ResourceNotFoundError,
)
from azure.keyvault import administration
from azure.keyvault.administration._internal import HttpChallengeCache
from joserfc import jwt as jose_jwt
from joserfc.jwk import KeySet

from pyenclave.services.identity.authenticate import Authenticator
from pyenclave.services.identity.issuer import ADMINISTRATOR, MANAGED_IDENTITY, DevIssuer
from pyenclave.services.identity.rbac import PART, Rbac
from pyenclave.services.identity.rbac_rest import API_VERSIONS, AccessControl
from pyenclave.services.identity.trust import TrustedIssuer
from pyenclave.services.storage.database import Database
from pyenclave.services.web.kit import Answer, Call, Service
from pyenclave.services.web.run import Server
from pyenclave.services.web.tls import DevCa

AUDIENCE = "https://vault.azure.net"
ADMINISTRATOR_ROLE = "00482a5a-887f-4fb3-b363-3b7fe8e74483"
RELEASE_USER = "08bbd89e-9f13-488c-ac41-acfcb10c90ab"


class Credential:
    """The least that Azure's clients take, and what they asked it for."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.scopes: list[str] = []
        self.options: list[Any] = []

    def get_token(self, *scopes: str, **options: Any) -> AccessToken:
        self.scopes += scopes
        self.options.append(options)
        return AccessToken(self.token, int(time.time()) + 3600)


@dataclass
class Running:
    vault: Server
    identity: Server
    metadata: Server
    issuer: DevIssuer
    ca: str
    requests: list[tuple[str, bool]]

    def roles(self, credential: Any) -> Any:
        return administration.KeyVaultAccessControlClient(
            self.vault.url,
            credential,
            verify_challenge_resource=False,
            connection_verify=self.ca,
            retry_total=0,
        )


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """An issuer, its managed identity, and a vault of roles alone."""
    state = tmp_path_factory.mktemp("state")
    ca, issuer = DevCa(state), DevIssuer(state)
    db = Database.open("sqlite://", parts=[PART])
    rbac = Rbac()
    db.submit(lambda tx: rbac.bootstrap(tx, [f"{issuer.tenant}/{ADMINISTRATOR}"])).result(20)
    identity = Server(issuer.service(), tls=ca.server())
    issuer.url = identity.listen()
    authenticator = Authenticator(
        [issuer.trusted()], [AUDIENCE], challenge=issuer.challenge(AUDIENCE)
    )
    requests: list[tuple[str, bool]] = []

    class Seen(Service):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                names = {name for name, _ in scope["headers"]}
                requests.append((scope["method"], b"authorization" in names))
            await super().__call__(scope, receive, send)

    async def echo(call: Call) -> Answer:
        return Answer({"who": call.require_caller().object_id, "size": len(call.body)})

    vault = Seen("vault", api_versions=API_VERSIONS, authenticator=authenticator)
    AccessControl(db, rbac).routes(vault)
    vault.route("POST", "/echo", echo)
    with (
        identity,
        Server(vault, tls=ca.server()) as served,
        Server(issuer.metadata_service(), dangerous_no_tls=True) as metadata,
    ):
        assert ca.path
        yield Running(served, identity, metadata, issuer, ca.path, requests)
    db.close()


def test_the_first_request_has_no_token_and_the_challenge_is_followed(running: Running) -> None:
    """Spec 10.6: 401, scope from the resource, tenant from the authority, then the same again."""
    credential = Credential(running.issuer.token())
    running.requests.clear()
    HttpChallengeCache.clear()
    client = running.roles(credential)
    assert list(client.list_role_assignments("/"))
    assert running.requests == [("GET", False), ("GET", True)]
    assert credential.scopes == [f"{AUDIENCE}/.default"]
    assert credential.options[0]["tenant_id"] == running.issuer.tenant
    list(client.list_role_assignments("/"))
    assert running.requests[2:] == [("GET", True)]


def test_a_body_is_sent_again_after_the_challenge(running: Running) -> None:
    """The first attempt of a PUT has no body; the second has it."""
    client = running.roles(Credential(running.issuer.token()))
    running.requests.clear()
    HttpChallengeCache.clear()
    made = client.create_role_assignment("/", RELEASE_USER, "11111111-0000-4000-8000-000000000001")
    assert [method for method, _ in running.requests] == ["PUT", "PUT"]
    assert made.properties.principal_id == "11111111-0000-4000-8000-000000000001"
    assert made.properties.role_definition_id.endswith(RELEASE_USER)
    assert made.properties.scope == "/"
    client.delete_role_assignment("/", made.name)


@pytest.mark.parametrize("scope", ["/", "/keys", "/keys/my-key"])
def test_assignments_are_made_read_listed_and_removed(running: Running, scope: str) -> None:
    """KeyVaultAccessControlClient, unmodified, at each kind of scope."""
    client = running.roles(Credential(running.issuer.token()))
    definition = next(
        role for role in client.list_role_definitions("/") if role.name == RELEASE_USER
    )
    assert definition.role_name == "Key Vault Crypto Service Release User"
    principal = "22222222-0000-4000-8000-000000000001"
    made = client.create_role_assignment(scope, definition.id, principal)
    assert client.get_role_assignment(scope, made.name).properties.principal_id == principal
    assert made.name in {item.name for item in client.list_role_assignments("/keys/my-key")}
    other = running.roles(Credential(running.issuer.token(object_id=principal)))
    with pytest.raises(HttpResponseError) as caught:
        list(other.list_role_assignments("/"))
    assert caught.value.status_code == 403
    assert caught.value.error.innererror["code"] == "ForbiddenByRbac"
    client.delete_role_assignment(scope, made.name)
    client.delete_role_assignment(scope, made.name)  # the client forgives what is gone
    with pytest.raises(ResourceNotFoundError):
        client.get_role_assignment(scope, made.name)


def test_custom_roles_are_defined_changed_and_removed(running: Running) -> None:
    """With the constants of the client."""
    client = running.roles(Credential(running.issuer.token()))
    permission = administration.KeyVaultPermission(
        data_actions=[administration.KeyVaultDataAction.RELEASE_KEY]
    )
    made = client.set_role_definition(
        "/", role_name="releases", description="d", permissions=[permission]
    )
    assert made.role_type == "CustomRole"
    again = client.set_role_definition(
        "/", name=made.name, role_name="other", permissions=[permission]
    )
    assert (again.name, again.role_name) == (made.name, "other")
    assert client.get_role_definition("/", made.name).role_name == "other"
    # A role is the whole vault's: who has the right at one key does not take it away.
    holder = str(uuid.uuid4())
    held = client.create_role_assignment("/keys/my-key", ADMINISTRATOR_ROLE, holder)
    of_a_key = running.roles(Credential(running.issuer.token(object_id=holder)))
    for scope, status in (("/", 403), ("/keys/my-key", 400), ("/keys", 403)):
        with pytest.raises(HttpResponseError) as refused:
            of_a_key.delete_role_definition(scope, made.name)
        assert refused.value.status_code == status
    client.delete_role_assignment("/keys/my-key", held.name)
    assert client.get_role_definition("/", made.name).role_name == "other"
    client.delete_role_definition("/", made.name)
    with pytest.raises(ResourceNotFoundError):
        client.get_role_definition("/", made.name)
    with pytest.raises(HttpResponseError) as caught:
        client.delete_role_definition("/", RELEASE_USER)
    assert caught.value.status_code == 409


def put(running: Running, body: Any, name: str = "33333333-0000-4000-8000-000000000001") -> int:
    path = f"/providers/Microsoft.Authorization/roleAssignments/{name}?api-version=7.4"
    reply = httpx.put(
        running.vault.url + path,
        content=json.dumps(body),
        headers={
            "content-type": "application/json",
            "authorization": f"Bearer {running.issuer.token()}",
        },
        verify=ssl.create_default_context(cafile=running.ca),
    )
    return reply.status_code


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"properties": []},
        {"properties": {}},
        {"properties": {"principalId": "a"}},
        {"properties": {"principalId": 1, "roleDefinitionId": RELEASE_USER}},
        {"properties": {"principalId": "a", "roleDefinitionId": RELEASE_USER, "scope": "/"}},
        {"properties": {"principalId": "a", "roleDefinitionId": RELEASE_USER}, "x": 1},
    ],
)
def test_a_malformed_assignment_over_rest_is_refused(running: Running, body: Any) -> None:
    """Unknown members are not ignored: what one writer meant by them is not what happens."""
    assert put(running, body) == 400


def test_a_client_secret_credential_gets_a_token_that_the_vault_takes(running: Running) -> None:
    """azure-identity, unmodified: its authority is the development issuer."""
    principal = running.issuer.register("client-1", "a secret of it", object_id=ADMINISTRATOR)
    assert principal == ADMINISTRATOR
    credential = azure_identity.ClientSecretCredential(
        running.issuer.tenant,
        "client-1",
        "a secret of it",
        authority=running.issuer.url,
        connection_verify=running.ca,
        disable_instance_discovery=True,
    )
    assert list(running.roles(credential).list_role_assignments("/"))


@pytest.mark.parametrize(("client", "secret"), [("client-2", "wrong"), ("nobody", "wrong")])
def test_a_wrong_secret_gets_nothing(running: Running, client: str, secret: str) -> None:
    """Unknown client and wrong secret read the same."""
    running.issuer.register("client-2", "the right secret")
    credential = azure_identity.ClientSecretCredential(
        running.issuer.tenant,
        client,
        secret,
        authority=running.issuer.url,
        connection_verify=running.ca,
        disable_instance_discovery=True,
    )
    with pytest.raises(ClientAuthenticationError, match="unknown client or wrong secret"):
        credential.get_token(f"{AUDIENCE}/.default")


def test_a_managed_identity_credential_gets_its_own_token(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AZURE_POD_IDENTITY_AUTHORITY_HOST; the identity has no role until it is given one."""
    monkeypatch.setenv("AZURE_POD_IDENTITY_AUTHORITY_HOST", running.metadata.url)
    credential = azure_identity.ManagedIdentityCredential()
    with pytest.raises(HttpResponseError) as caught:
        list(running.roles(credential).list_role_assignments("/"))
    assert caught.value.status_code == 403
    admin = running.roles(Credential(running.issuer.token()))
    made = admin.create_role_assignment(
        "/", "00482a5a-887f-4fb3-b363-3b7fe8e74483", MANAGED_IDENTITY
    )
    assert list(running.roles(credential).list_role_assignments("/"))
    admin.delete_role_assignment("/", made.name)


def test_the_metadata_endpoint_is_not_for_browsers_and_proxies(running: Running) -> None:
    """Without the header, through a proxy, of another version: no token."""
    url = f"{running.metadata.url}/metadata/identity/oauth2/token"
    good = {"api-version": "2018-02-01", "resource": AUDIENCE}
    assert httpx.get(url, params=good, headers={"Metadata": "true"}).status_code == 200
    assert httpx.get(url, params=good).status_code == 400
    forwarded = {"Metadata": "true", "X-Forwarded-For": "1.2.3.4"}
    assert httpx.get(url, params=good, headers=forwarded).status_code == 400
    for wrong in ({"api-version": "2017-01-01"}, {"resource": ""}, {"client_id": "x"}):
        reply = httpx.get(url, params=good | wrong, headers={"Metadata": "true"})
        assert reply.status_code == 400


@pytest.mark.parametrize(
    "named",
    [
        {"object_id": ADMINISTRATOR},
        {"principal_id": ADMINISTRATOR},
        {"mi_res_id": "/subscriptions/1"},
        {"msi_res_id": "/subscriptions/1"},
        {"client_id": MANAGED_IDENTITY, "object_id": ADMINISTRATOR},
    ],
)
def test_who_names_an_identity_is_given_no_other(running: Running, named: dict[str, str]) -> None:
    """The metadata endpoint knows one identity and the registered clients."""
    url = f"{running.metadata.url}/metadata/identity/oauth2/token"
    query = {"api-version": "2018-02-01", "resource": AUDIENCE}
    reply = httpx.get(url, params=query | named, headers={"Metadata": "true"})
    assert (reply.status_code, reply.json()["error_description"]) == (400, "Identity not found")
    for right in ({"object_id": MANAGED_IDENTITY}, {"client_id": MANAGED_IDENTITY}):
        reply = httpx.get(url, params=query | right, headers={"Metadata": "true"})
        assert reply.json()["client_id"] == MANAGED_IDENTITY


def ask_with(running: Running, header: str, **form: str) -> httpx.Response:
    """Ask for a token as a client of OAuth that proves itself in the header."""
    url = f"{running.issuer.url}/{running.issuer.tenant}/oauth2/v2.0/token"
    fields = {"grant_type": "client_credentials", "scope": f"{AUDIENCE}/.default"}
    context = ssl.create_default_context(cafile=running.ca)
    headers = {"authorization": header}
    return httpx.post(url, data=fields | form, headers=headers, verify=context)


def _pair(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


def test_a_client_may_prove_itself_in_the_header(running: Running) -> None:
    """Discovery says `client_secret_basic`, which is OpenID Connect's default."""
    running.issuer.register("client:3", "100% a secret")
    header = _pair("client%3A3:100%25+a+secret")
    assert ask_with(running, header).json()["token_type"] == "Bearer"
    assert ask_with(running, header, client_id="client:3").status_code == 200
    wrong = ask_with(running, _pair("client%3A3:wrong"))
    assert wrong.status_code == 401
    assert wrong.headers["www-authenticate"] == "Basic"
    for malformed in ("Bearer x", "Basic", "Basic !", _pair("no colon"), _pair("%ff:%ff")):
        assert ask_with(running, malformed).status_code == 400
    for twice in ({"client_id": "other"}, {"client_secret": "100% a secret"}):
        assert ask_with(running, header, **twice).json()["error"] == "invalid_request"


def test_the_issuer_is_found_by_discovery_as_by_any_client(running: Running) -> None:
    """An authenticator that knows the address alone, and PyJWT's and joserfc's key clients."""
    trusted = TrustedIssuer(
        issuer=running.issuer.issuer,
        ca_file=running.ca,
        version="2.0",
        tenants=frozenset({running.issuer.tenant}),
    )
    authenticator = Authenticator([trusted], [AUDIENCE], challenge=None)
    token = running.issuer.token(roles=["r"])
    caller = authenticator.authenticate({"authorization": f"Bearer {token}"})
    assert caller.object_id == ADMINISTRATOR
    context = ssl.create_default_context(cafile=running.ca)
    metadata = httpx.get(trusted.discovery_url, verify=context).json()
    assert metadata["issuer"] == running.issuer.issuer
    key = jwt.PyJWKClient(metadata["jwks_uri"], ssl_context=context).get_signing_key_from_jwt(token)
    claims = jwt.decode(token, key.key, algorithms=["RS256"], audience=AUDIENCE)
    assert claims["roles"] == ["r"]
    keys = KeySet.import_key_set(httpx.get(metadata["jwks_uri"], verify=context).json())
    assert jose_jwt.decode(token, keys).claims == claims


def test_the_issuers_key_is_kept_and_private(tmp_path: Path) -> None:
    """Two issuers of one state directory are one; of another, another."""
    first, second = DevIssuer(tmp_path), DevIssuer(tmp_path)
    assert first.jwks == second.jwks
    assert (tmp_path / "dev/issuer-key.pem").stat().st_mode & 0o777 == 0o600
    assert DevIssuer(None).jwks != first.jwks
    with pytest.raises(ValueError, match="lifetime"):
        first.token(lifetime=1e9)
