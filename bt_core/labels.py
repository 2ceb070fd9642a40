"""Label spaces: the classes, their fixed order, and the folder names that mean them."""

import re
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

from bt_core.errors import SourceError

Task = Literal["four_class", "binary"]


class LabelSpace(BaseModel):
    """The classes of a task in the order of every probability vector."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Task
    names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes, K."""
        return len(self.names)

    @property
    def healthy(self) -> int:
        """Position of the class without a tumour."""
        return next(k for k, name in enumerate(self.names) if name in ("no_tumor", "healthy"))

    def index(self, name: str) -> int:
        """Return the position of class `name`; raises ValueError if it is not one of `names`."""
        return self.names.index(name)


LABEL_SPACES: Final[dict[str, LabelSpace]] = {
    "four_class": LabelSpace(
        task="four_class", names=("glioma", "meningioma", "no_tumor", "pituitary")
    ),
    "binary": LabelSpace(task="binary", names=("healthy", "tumor")),
}

_ALIASES: Final[dict[str, tuple[str, ...]]] = {
    "glioma": ("glioma", "gliomatumor", "gliomatumour", "gl"),
    "meningioma": ("meningioma", "meningiomatumor", "meningiomatumour", "me"),
    "pituitary": ("pituitary", "pituitarytumor", "pituitarytumour", "pi"),
    "no_tumor": ("notumor", "notumour", "no", "normal", "healthy", "none", "negative"),
    "tumor": ("tumor", "tumour", "braintumor", "braintumour", "yes", "positive"),
}
_BY_ALIAS: Final = {alias: name for name, aliases in _ALIASES.items() for alias in aliases}
_TO_BINARY: Final = {
    "glioma": "tumor",
    "meningioma": "tumor",
    "pituitary": "tumor",
    "tumor": "tumor",
    "no_tumor": "healthy",
}


def class_of_folder(folder: str) -> str | None:
    """Return the class that a folder name means, or None.

    Case, spaces, dashes and underscores do not matter ("No Tumor" is "notumor"). The answer is one
    of glioma, meningioma, no_tumor, pituitary, or `tumor` for sets that name no type.
    """
    return _BY_ALIAS.get(re.sub(r"[\s_\-]+", "", folder).lower())


def to_task(class_name: str, task: Task) -> str | None:
    """Return the label of a class in a task; None if the task cannot tell (`tumor` of no type)."""
    if task == "binary":
        return _TO_BINARY[class_name]
    return class_name if class_name in LABEL_SPACES["four_class"].names else None


def infer_task(class_names: set[str]) -> Task:
    """Return `binary` if some scans are only known as `tumor`, else `four_class`.

    Raises:
        SourceError: if untyped and typed tumours are mixed, which would make a guess necessary.
    """
    if "tumor" not in class_names:
        return "four_class"
    typed = class_names & {"glioma", "meningioma", "pituitary"}
    if typed:
        raise SourceError(
            f"the source mixes folders of tumour types ({', '.join(sorted(typed))}) with one of "
            "untyped tumours; pass --task binary to pool them"
        )
    return "binary"


def known_folder_names() -> str:
    """Return the accepted folder names as one readable line."""
    return "; ".join(f"{name}: {', '.join(aliases)}" for name, aliases in _ALIASES.items())
