"""`bt weights`: initial weights for sites without internet."""

from collections import defaultdict
from typing import Annotated

import typer

from bt_core import storage
from bt_core.errors import EXIT_OK
from jobs.options import OutOption
from jobs.recipes_folder import RECIPES


def run_list() -> int:
    """List the pretrained backbones that the recipes start from, and whether they are here."""
    from bt_core.config import load_yaml
    from bt_core.models.weights import hub_id, is_cached
    from bt_core.training.recipe import recipe_names

    users = defaultdict(list)
    for name in recipe_names(RECIPES):
        model = load_yaml(str(RECIPES / f"{name}.yaml"))["model"]
        if model.get("weights", "hub") == "hub":
            users[model["backbone"]].append(name)
    for backbone, names in sorted(users.items()):
        here = "downloaded" if is_cached(backbone) else "not here"
        print(f"{backbone:<20}{here:<12}{hub_id(backbone)}  for {', '.join(names)}")
    print("with internet: bt weights stage BACKBONE -o DIR; then --set model.weights=local-dir:DIR")
    return EXIT_OK


def run_stage(
    backbone: Annotated[str, typer.Argument(metavar="BACKBONE", help="A name of timm's.")],
    out: OutOption,
    source: Annotated[
        str, typer.Option("--from", help="hub (timm's download) or local-dir:PATH.")
    ] = "hub",
) -> int:
    """Write a backbone's weights to a folder: config.json, model.safetensors and SHA256SUMS."""
    from bt_core.models.weights import stage_weights

    digest = stage_weights(backbone, source, out)
    print(f"weights of {backbone} in {storage.absolute(out)}, sha256 {digest}")
    return EXIT_OK


def run_check(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="Folder with config.json and model.safetensors.")
    ],
) -> int:
    """Check a folder of weights: digests against SHA256SUMS, and the shape of every tensor."""
    from bt_core.models.weights import check_weights

    facts = check_weights(folder)
    compared = "as staged" if facts["digests_compared"] else "no SHA256SUMS to compare with"
    print(f"{facts['architecture']}: {facts['num_parameters']:,} parameters, every shape fits")
    print(f"sha256 {facts['sha256']} ({compared})")
    return EXIT_OK


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("weights")
