"""Nobody but this server's own page, with the token, gets anything."""

from __future__ import annotations

import re

import pytest
from starlette.testclient import TestClient

from pellucid.workbench.guard import LARGE, SMALL, Door
from tests.workbench.conftest import TOKEN, live

ROUTES = ["/", "/static/views.js", "/api/models", "/api/jobs", "/api/workspaces", "/api/workspaces/x"]


@pytest.fixture
def stranger(page: TestClient) -> TestClient:
    """A client that knows the address and nothing else."""
    return TestClient(page.app, base_url="http://localhost:8000", raise_server_exceptions=False)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "given", [{}, {"X-Pellucid-Token": "wrong"}, {"X-Pellucid-Token": ""}, {"X-Pellucid-Token": "é"}]
)
def test_without_the_right_token_nothing_is_given_out(stranger: TestClient, route: str, given: dict[str, str]) -> None:
    encoded = {k: v.encode("latin-1") for k, v in given.items()}
    found = stranger.get(route, headers=encoded)
    assert found.status_code == 403
    assert "token" in found.json()["error"]


@pytest.mark.parametrize("route", ["/api/live", "/api/view", "/api/jobs", "/api/export/html", "/api/export/notebook"])
def test_a_token_in_the_query_does_not_open_what_changes_something(stranger: TestClient, route: str) -> None:
    assert stranger.post(f"{route}?token={TOKEN}", json=live()).status_code == 403


def test_the_query_opens_the_page_its_scripts_and_downloads(stranger: TestClient, page: TestClient) -> None:
    page.put("/api/workspaces/mine", json={"state": {"panes": []}})
    for route in ("/", "/static/views.js", "/api/workspaces/mine"):
        assert stranger.get(route, params={"token": "wrong"}).status_code == 403
    for route in ("/", "/static/views.js", "/api/workspaces/mine"):
        assert stranger.get(route, params={"token": TOKEN}).status_code == 200
    assert stranger.get("/api/models", params={"token": TOKEN}).status_code == 403


def test_the_page_can_be_reloaded_without_the_token_in_its_address_but_the_cookie_opens_no_api(
    stranger: TestClient,
) -> None:
    first = stranger.get("/", params={"token": TOKEN})
    cookie = first.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and "domain" not in cookie
    assert stranger.get("/").status_code == 200
    assert stranger.get("/static/views.js").status_code == 200
    assert stranger.get("/api/models").status_code == 403
    assert stranger.post("/api/live", json=live()).status_code == 403


@pytest.mark.parametrize(
    "host", ["evil.example:8000", "evil.example", "localhost", "localhost:8001", "127.0.0.1.evil.example:8000", ""]
)
def test_a_name_that_was_rebound_to_this_address_is_turned_away(page: TestClient, host: str) -> None:
    for route in ROUTES:
        assert page.get(route, headers={"Host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST:8000"])
def test_every_name_of_loopback_is_served(page: TestClient, host: str) -> None:
    assert page.get("/api/models", headers={"Host": host, "Origin": f"http://{host}"}).status_code == 200


def test_a_server_bound_elsewhere_knows_the_names_it_was_given() -> None:
    assert "10.0.0.5:9000" in Door("t", 9000, ("10.0.0.5",)).hosts
    assert "[fe80::1]:9000" in Door("t", 9000, ("fe80::1",)).hosts
    assert {"localhost", "localhost:80"} <= Door("t", 80).hosts


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "https://localhost:8000",
        "http://localhost:8001",
        "http://localhost:8000.evil.example",
    ],
)
def test_other_origins_are_refused_even_with_the_token(page: TestClient, origin: str) -> None:
    assert page.post("/api/live", json=live(), headers={"Origin": origin}).status_code == 403
    assert page.get("/api/models", headers={"Origin": origin}).status_code == 403


def test_what_a_browser_calls_cross_site_is_refused_unless_it_is_the_page(page: TestClient) -> None:
    for kind in ("cross-site", "same-site"):
        assert page.get("/api/models", headers={"Sec-Fetch-Site": kind}).status_code == 403
        assert page.get("/static/views.js", headers={"Sec-Fetch-Site": kind}).status_code == 403
        assert page.get("/", headers={"Sec-Fetch-Site": kind}).status_code == 200
    assert page.get("/api/models", headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200


def test_no_answer_can_be_read_framed_or_sniffed_by_others(page: TestClient, stranger: TestClient) -> None:
    answers = [page.get(route) for route in ROUTES] + [
        stranger.get("/"),
        page.options("/api/live"),
        page.get("/nothing"),
    ]
    answers.append(page.post("/api/live", json=live()))
    for found in answers:
        names = {name.lower() for name in found.headers}
        assert not any(name.startswith("access-control-") for name in names)
        policy = found.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy and "frame-ancestors 'none'" in policy
        assert "unsafe-eval" not in policy and "http" not in policy
        assert found.headers["x-content-type-options"] == "nosniff"
        assert found.headers["referrer-policy"] == "no-referrer"
        assert found.headers["cache-control"] == "no-store"


def test_the_page_runs_only_its_own_two_scripts(page: TestClient) -> None:
    text = page.get("/").text
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", text)
    assert scripts == ["", ""]
    assert re.findall(r'src="(/static/\w+\.js)\?token=', text) == ["/static/views.js", "/static/workbench.js"]
    assert not re.search(r"https?://", text)
    assert " on" + "click" not in text


def test_bodies_beyond_the_limit_are_refused_whether_announced_or_not(page: TestClient) -> None:
    found = page.post("/api/live", content=b"x" * (SMALL + 1))
    assert found.status_code == 413
    assert "1 MB" in found.json()["error"]

    def stream():
        for _ in range(SMALL // 65536 + 1):
            yield b"x" * 65536

    assert page.post("/api/live", content=stream()).status_code == 413
    assert page.put("/api/workspaces/large", content=b"x" * (SMALL + 1)).status_code == 422  # read, and no workspace
    assert page.put("/api/workspaces/large", content=b"", headers={"content-length": str(LARGE + 1)}).status_code == 413


@pytest.mark.parametrize(
    "name", ["..%2Fschema.py", "%2e%2e/schema.py", "schema.py", "views.js.map", "views.js%00", ".js", "Views.js"]
)
def test_no_other_file_is_served(page: TestClient, name: str) -> None:
    assert page.get(f"/static/{name}").status_code == 404


def test_the_server_does_not_describe_itself(page: TestClient) -> None:
    for route in ("/docs", "/redoc", "/openapi.json"):
        found = page.get(route)
        assert found.status_code == 404
        assert found.json() == {"error": "there is nothing at this address", "superseded": False}
