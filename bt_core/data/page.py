"""What every report shares: figures as PNG without a display, and self-contained HTML pages."""

import base64
import io
from typing import Any, Final

import jinja2
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLUE: Final = "#1f5fa8"
ORANGE: Final = "#c8641e"
_DPI: Final = 120


def figure_png(figure: Figure) -> bytes:
    """Return a figure, made without pyplot so that no window system is asked for, as PNG."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def readable(name: str) -> str:
    """Return a class or feature name without underscores, and safe from matplotlib's mathtext."""
    return name.replace("_", " ").replace("$", r"\$")


def render(package: str, template: str, **values: Any) -> bytes:
    """Return an HTML page of a package's template, with every value escaped.

    Templates may include `style.css.j2` and show PNG bytes by the filter `data_uri`.

    Raises:
        jinja2.UndefinedError: if the template names a value that is not given.
    """
    places = [jinja2.PackageLoader(package, "."), jinja2.PackageLoader("bt_core.data", ".")]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(places),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = _data_uri
    return environment.get_template(template).render(**values).encode()


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
