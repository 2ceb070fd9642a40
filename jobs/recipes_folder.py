"""Where the recipes are."""

from pathlib import Path
from typing import Final

RECIPES: Final = Path(__file__).parent / "recipes"
