"""Asks a Prefect server for a sign of life before anything depends on it: else each miss is a long traceback."""

from __future__ import annotations

from http import HTTPStatus

import httpx
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL

from tasks.errors import UserError

EXAMPLE = "the address of a Prefect server, with /api, as http://127.0.0.1:4200/api"
NO_PROFILES = "profiles of Prefect in ~/.prefect are not read"  # flows/__init__.py says why


def require_server() -> None:
    """Raise `UserError` where PREFECT_API_URL names no Prefect server that answers us; without it nothing is asked."""
    url = PREFECT_API_URL.value()
    if not url:
        return
    try:
        with get_client(sync_client=True) as client:
            client.request("POST", "/work_pools/filter", json={"limit": 1}).json()
    except httpx.HTTPStatusError as error:
        raise _refused(url, error.response) from None
    except ValueError:  # a page, for people
        raise _no_api(url, "with something else than a Prefect server's API does") from None
    except (httpx.RequestError, httpx.InvalidURL) as error:
        raise UserError(f"no server answers at {url}: {error or type(error).__name__}", where="PREFECT_API_URL",
                        allowed=EXAMPLE, todo="start it, or correct the address; without PREFECT_API_URL "
                        "`make pipeline` needs none, and `make serve` starts one") from None  # fmt: skip


def _refused(url: str, answer: httpx.Response) -> UserError:
    said = f"{answer.status_code} {answer.reason_phrase}"
    if answer.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return UserError(
            f"the server at {url} does not know us: {said}",
            where="PREFECT_API_URL",
            todo="set in the environment PREFECT_API_AUTH_STRING=user:password, or PREFECT_API_KEY where the server "
            f"wants a key; {NO_PROFILES}",
        )
    return _no_api(url, said)


def _no_api(url: str, said: str) -> UserError:
    return UserError(f"{url} answers {said}", where="PREFECT_API_URL", allowed=EXAMPLE,
                     todo="correct the address, or look at the server's log")  # fmt: skip
