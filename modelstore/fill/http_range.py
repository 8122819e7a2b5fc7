"""One ranged GET, for bytes by the gigabyte: the standard library's HTTP, with as little Python a byte as can be.

Proxies of the environment are used, redirects are not followed and no status is an error here: the meaning of an answer
is the caller's business. `HTTPResponse.readinto` fills a buffer in C with the interpreter's lock released; on loopback
one connection takes 4 GB/s and httpx 1.3, and four of them 1.1 and httpx 0.5 (two cores, measured).
"""

from __future__ import annotations

import ssl
import urllib.request
from collections.abc import Mapping
from functools import cache
from http.client import HTTPResponse
from typing import cast
from urllib.parse import urlsplit

from modelstore.environment import trust_authorities
from modelstore.errors import InvalidSetting


def open_url(url: str, headers: Mapping[str, str], *, timeout_s: float) -> HTTPResponse:
    """GET `url`; the response is a context manager whose `readinto` gives the body. Raises OSError, HTTPException.

    `timeout_s` bounds connecting and each wait for bytes, not the whole.
    """
    request = urllib.request.Request(url, headers=dict(headers))  # noqa: S310  http and https alone, see _opener
    return cast(HTTPResponse, _opener().open(request, timeout=timeout_s))


@cache
def _opener() -> urllib.request.OpenerDirector:
    """An opener that speaks http and https, through proxies if the environment names them, and nothing else."""
    opener = urllib.request.OpenerDirector()
    handlers = (
        urllib.request.ProxyHandler(proxies()),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(context=_tls()),
    )
    for handler in handlers:
        opener.add_handler(handler)
    return opener


def proxies() -> dict[str, str]:
    """The proxy for each scheme, as HTTP_PROXY, HTTPS_PROXY and, for what those leave out, ALL_PROXY name it.

    Raises InvalidSetting for one of SOCKS.
    """
    proxies = urllib.request.getproxies()
    others = {"http": proxies["all"], "https": proxies["all"]} if "all" in proxies else {}
    chosen = others | {scheme: proxy for scheme, proxy in proxies.items() if scheme in ("http", "https")}
    for scheme, proxy in chosen.items():
        if proxy.lower().startswith("socks"):
            raise InvalidSetting(f"the proxy for {scheme} is one of SOCKS, which is not served: name one of HTTP")
    return chosen


def proxy_of(url: str) -> str:
    """The host and port of the proxy that an address is asked through; empty without one."""
    parts = urlsplit(url)
    proxy = proxies().get(parts.scheme, "")
    if not proxy or urllib.request.proxy_bypass(parts.netloc):
        return ""
    place = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    return f"{place.hostname}:{place.port}" if place.port else str(place.hostname)


def _tls() -> ssl.SSLContext:
    """Verified TLS against the system's authorities (or SSL_CERT_FILE's); certifi's in an image that has none."""
    trust_authorities()
    context = ssl.create_default_context()
    if not context.cert_store_stats()["x509_ca"]:
        import certifi

        context.load_verify_locations(certifi.where())
    return context
