"""`bt demo`: the whole chain on one archive, in one Ray session."""

import os
from typing import Annotated

import typer

from bt_core import storage
from bt_core.errors import EXIT_INCOMPLETE, EXIT_OK, UsageError
from bt_core.scans.archives import list_scans, read_member
from jobs import ensemble, evaluate, prepare, score, train
from jobs.recipes_folder import RECIPES

_PHANTOMS_PER_CLASS = 150
_PHANTOM_SETTINGS = ["train.batch_size=16"]
_SCRATCH_SETTINGS = ["train.epochs=10"]
"""What helps on a few hundred synthetic scans, and without initial weights."""


def run(
    data: Annotated[
        str, typer.Option(metavar="SOURCE", help="Labelled archive. [default: synthetic scans]")
    ] = "",
    weights: Annotated[
        str, typer.Option(help="Of MobileNetV2: hub, local-dir:PATH or none.")
    ] = "none",
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder for all results.")] = "runs/demo",
) -> int:
    """Run the whole chain: prepare, train two, ensemble, evaluate, score, serve one scan."""
    from bt_core.data.catalog import Dataset
    from cluster.session import session

    out = storage.absolute(out)
    if data and os.path.realpath(data).startswith(f"{os.path.realpath(out)}/"):
        raise UsageError(
            f"--data lies in {out}, which the demo clears; copy it elsewhere, or use --out"
        )
    _check(data, weights)
    _clear(out)
    source = storage.absolute(data) if data else _phantoms(out, "archive.zip", _PHANTOMS_PER_CLASS)
    unlabelled = source if data else _phantoms(out, "unlabelled.zip", 25, seed=1, labelled=False)
    dataset, bundle = storage.join(out, "data"), storage.join(out, "bundle")
    runs = [storage.join(out, "runs", name) for name in ("cnn_small", "mobilenetv2")]
    common = [] if data else _PHANTOM_SETTINGS
    scratch = _SCRATCH_SETTINGS if weights == "none" else []
    with session():
        _say("1/6", f"prepare {source}")
        codes = [prepare.run(source, dataset, ["cnn_small", "mobilenetv2"])]
        common = [*common, f"task={Dataset(dataset).info.label_space.task}"]
        _say("2/6", "train cnn_small from scratch")
        train.run("cnn_small", dataset, runs[0], common)
        _say("3/6", f"train mobilenetv2 with weights {weights}")
        train.run("mobilenetv2", dataset, runs[1], [f"model.weights={weights}", *common, *scratch])
        _say("4/6", "ensemble and evaluate")
        # So few phantoms can promise no more: it takes 100 tumours to bound missed ones by 1 %.
        ensemble.run(runs, bundle, max_missed_tumors=0.01 if data else 0.05)
        codes.append(evaluate.run([bundle], dataset, storage.join(out, "report")))
        _say("5/6", f"score {unlabelled}")
        codes.append(score.run(bundle, unlabelled, storage.join(out, "scores")))
        _say("6/6", "serve the bundle and send it one scan")
        _serve_one(bundle, unlabelled, storage.join(out, "scores"))
    _summary(out)
    return EXIT_INCOMPLETE if EXIT_INCOMPLETE in codes else EXIT_OK


def _check(data: str, weights: str) -> None:
    """Refuse what would fail later, before an earlier demo's results are removed."""
    from bt_core.data.catalog import label_refs
    from bt_core.models.backbones import build_backbone
    from bt_core.training.recipe import load_recipe

    if data:
        label_refs(list_scans(data).refs, None)
    recipe = load_recipe("mobilenetv2", RECIPES, [f"model.weights={weights}"])
    build_backbone(recipe.model, recipe.preprocess.size_px)


def _clear(out: str) -> None:
    """Remove an earlier demo's results; refuse a folder that holds something else."""
    marker = storage.join(out, ".bt-demo")
    if not storage.exists(marker) and (storage.list_dirs(out) or storage.list_files(out)):
        raise UsageError(f"{out} is not empty and not an earlier demo's; choose another folder")
    storage.remove_dir(out)
    storage.write_bytes(marker, b"results of bt demo; removed by the next one\n")


def _phantoms(out: str, name: str, num_per_class: int, seed: int = 0, labelled: bool = True) -> str:
    from bt_core.scans.phantom import write_archive

    path = storage.join(out, name)
    write_archive(path, num_per_class, seed, labelled=labelled)
    return path


def _serve_one(bundle: str, source: str, scores: str) -> None:
    import requests
    from ray import serve

    from cluster.local import free_port
    from serve.app import start
    from serve.settings import ServeSettings

    answered = storage.read_table(storage.join(scores, "scores"), ["scan_id", "confidence"])
    good = {row["scan_id"] for row in answered.to_pylist() if row["confidence"] is not None}
    ref = next(ref for ref in list_scans(source).refs if ref.scan_id in good)
    try:
        url = start(ServeSettings(bundle=bundle), free_port())
        answer = requests.post(
            f"{url}/v1/predictions", files={"files": (ref.member, read_member(ref))}, timeout=60
        )
        answer.raise_for_status()
        result = answer.json()["results"][0]
        print(f"POST /v1/predictions: {result['predicted_label']} ({result['confidence']:.3f})")
    finally:
        serve.shutdown()


def _summary(out: str) -> None:
    produced = {
        "data": "catalog, split and shards",
        "runs": "two trained classifiers with curves.png",
        "bundle": "the ensemble, with MODEL_CARD.md",
        "report": "report.html, metrics.json",
        "scores": "one Parquet row per scan, review.csv, manifest.json",
    }
    print("\nproduced:")
    for name, what in produced.items():
        print(f"  {storage.join(out, name)}: {what}")
    print(
        f"next: .venv/bin/bt serve {storage.join(out, 'bundle')}   then open http://127.0.0.1:8000/docs"
    )


def _say(step: str, text: str) -> None:
    print(f"\n[{step}] {text}", flush=True)


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("demo")
