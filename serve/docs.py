"""The API's description as a page without any script, at `/docs`.

FastAPI's own page loads its scripts from a public host, which sites without internet have not, and
whose owner could read the keys that are typed into it; the packages that carry these scripts are
kept by one person each, and they would run beside the page in which users show their keys. A
program reads `/openapi.json`; this is for people who write one.
"""

import base64
import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any, Final

import jinja2
from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from markupsafe import Markup, escape

docs = APIRouter(include_in_schema=False)

_TEMPLATE: Final = Path(__file__).with_name("docs.html.j2")
_STYLE: Final = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid; }
code, pre { font-family: ui-monospace, monospace; font-size: 0.9rem; }
pre { overflow-x: auto; padding: 0.75rem; border: 1px solid; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 0.3rem 0.75rem 0.3rem 0; }
h2, code { overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  thead { display: none; }
  tr, td { display: block; padding: 0; }
  tr { padding-block: 0.5rem; border-bottom: 1px dotted; }
}
"""
_CODE: Final = re.compile(r"`([^`]+)`")
_POLICY: Final = (
    "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; style-src 'sha256-"
    + base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    + "'"
)


@docs.get("/docs")
async def page(request: Request) -> HTMLResponse:
    """Show the OpenAPI document as a page."""
    text = _template().render(api=request.app.openapi(), style=_STYLE)
    return HTMLResponse(text, headers={"Content-Security-Policy": _POLICY})


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"type_of": _type_of, "pretty": _pretty, "marked": _marked}
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))


def _pretty(value: object) -> str:
    return json.dumps(value, indent=2)


def _marked(text: str) -> Markup:
    """Return a description as HTML, with what stands between backticks as code."""
    return Markup(_CODE.sub(r"<code>\1</code>", str(escape(text))))


def _type_of(schema: dict[str, Any]) -> str:
    """Return a JSON schema's type in words, such as `array of Prediction or Refusal`."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "enum" in schema:
        return " or ".join(json.dumps(value) for value in schema["enum"])
    if "const" in schema:
        return json.dumps(schema["const"])
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            return " or ".join(_type_of(one) for one in schema[several])
    kind = str(schema.get("type", "any"))
    if kind == "array":
        return f"array of {_type_of(schema.get('items', {}))}"
    return kind
