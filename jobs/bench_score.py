"""`bt bench score`: an archive to Parquet, against the loop that a user would write."""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from bt_core import storage
from bt_core.errors import EXIT_INCOMPLETE, EXIT_OK, RunError, UsageError
from jobs.bench import JsonOption, apart, medians_line

if TYPE_CHECKING:
    import pyarrow as pa

_MEMBERS: Final = {"mobilenetv2_100": 3, "resnet50": 4, "densenet121": 4}
"""Backbones of the ensemble that is made if none is given, with the epochs of each."""
_SIDE_PX: Final = 224
_FORWARD_SECONDS: Final = 20.0
_FORWARD_BATCH: Final = 64
_FORWARD_SCANS: Final = 512
_FEW_SCANS: Final = 16


def run_score(
    data: Annotated[
        str, typer.Option("--data", metavar="ARCHIVE", help="Zip of class folders to score.")
    ],
    bundle: Annotated[
        str | None,
        typer.Option(
            "--bundle",
            metavar="BUNDLE",
            help="Bundle to score with. [default: MobileNetV2, ResNet50 and DenseNet121 at 224 px, "
            "trained on the archive first, which takes 40 minutes on two cores]",
        ),
    ] = None,
    work: Annotated[
        str | None,
        typer.Option("--work", metavar="DIR", help="Keep the trained bundle there, or find it."),
    ] = None,
    weights: Annotated[
        str,
        typer.Option(help="Initial weights of the MobileNetV2; the others start from none."),
    ] = os.environ.get("BT_WEIGHTS", "none"),
    num_plain: Annotated[
        int, typer.Option(min=1, help="Scans of the plain loop, whose rate is steady.")
    ] = 300,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the sides take turns.")] = 2,
    price: Annotated[
        float, typer.Option(min=0, metavar="X", help="Of a core for an hour, in any currency.")
    ] = 0.05,
    as_json: JsonOption = False,
) -> int:
    """Score a zip by `bt score` with and without its cascade, by a plain loop, and forward only.

    Each side is a process of its own on all cores; starting it, Ray, loading and writing count. The
    plain loop is a DataLoader and eager float32; its start is spread over as many scans as the
    others score. Forward only is what the bundle's runtimes do with scans of the archive that are
    decoded already, one process for each core. The start is a job of a few scans. How often the
    cascade agrees is also given for the scans that neither trained nor chose the members.
    """
    with tempfile.TemporaryDirectory() as scratch:
        source = storage.absolute(data)
        chosen = (
            storage.absolute(bundle) if bundle else _own_bundle(source, work or scratch, weights)
        )
        sides: dict[str, list[float]] = {
            "plain": [], "ensemble": [], "cascade": [], "forward only": [], "without start": []
        }  # fmt: skip
        agreements = []
        few = _first_scans(source, f"{scratch}/few.zip")
        for number in range(rounds):
            folder = os.path.join(scratch, f"round{number}")
            os.mkdir(folder)
            sides["plain"].append(apart(_plain_rate, chosen, source, folder, num_plain))
            sides["forward only"].append(_forward_rate(chosen, source))
            for side, options in (("ensemble", ["--no-cascade"]), ("cascade", [])):
                num, seconds = _our_job(chosen, source, f"{folder}/{side}", options)
                sides[side].append(num / seconds)
                if side == "ensemble":
                    num_few, start = _our_job(chosen, few, f"{folder}/few", options)
                    sides["without start"].append((num - num_few) / (seconds - start))
            agreements.append(_agreements(folder))
            print(f"round {number + 1}: " + medians_line(sides), flush=True)
    _report(sides, agreements, price, as_json)
    return EXIT_OK


def _report(
    sides: dict[str, list[float]],
    agreements: list[dict[str, float]],
    price: float,
    as_json: bool,
) -> None:
    medians = {side: statistics.median(rates) for side, rates in sides.items()}
    result: dict[str, Any] = {
        "ratio_ensemble": medians["ensemble"] / medians["plain"],
        "ratio_cascade": medians["cascade"] / medians["plain"],
        "of_forward_only": medians["ensemble"] / medians["forward only"],
        "of_forward_only_without_start": medians["without start"] / medians["forward only"],
        "core_hours_per_million": {
            side: len(os.sched_getaffinity(0)) * 1e6 / 3600 / medians[side]
            for side in ("plain", "ensemble", "cascade")
        },
        **{name: min(one[name] for one in agreements) for name in agreements[0]},
        "scans_per_second": sides,
    }
    print(
        f"ensemble {result['ratio_ensemble']:.1f} times the plain loop's scans/s, with the cascade "
        f"{result['ratio_cascade']:.1f} times; {result['of_forward_only']:.2f} of forward only, "
        f"{result['of_forward_only_without_start']:.2f} without the start"
    )
    print(
        f"a million scans, at {price:g} for a core and an hour: "
        + ", ".join(
            f"{side} {hours:.1f} core-hours, {hours * price:.2f}"
            for side, hours in result["core_hours_per_million"].items()
        )
    )
    print(
        f"the cascade's decisions are the ensemble's in {result['agreement']:.2%} of scans, "
        f"{result['answered_alone']:.1%} answered by the first member alone ("
        f"{result['agreement_unseen']:.2%} and {result['answered_alone_unseen']:.1%} of those that "
        "neither trained nor chose a member); classes are the plain "
        f"loop's in {result['agreement_plain']:.2%}"
    )
    if as_json:
        print(json.dumps(result))


def _own_bundle(source: str, work: str, weights: str) -> str:
    """Train the three members, put them into a bundle and choose its runtimes; or find it."""
    from bt_core.data.catalog import Dataset
    from jobs import ensemble, optimise, prepare, train

    dataset, bundle = f"{work}/data", f"{work}/bundle"
    if not storage.exists(f"{dataset}/dataset.json"):
        prepare.run(source, dataset)
    elif Dataset(dataset).info.source != source:
        raise UsageError(f"--work {work} is of {Dataset(dataset).info.source}; choose another")
    if storage.exists(f"{bundle}/bundle.json"):
        return bundle
    for backbone, epochs in _MEMBERS.items():
        own = weights if backbone.startswith("mobilenetv2") else "none"
        settings = {
            "preprocess.size_px": _SIDE_PX, "model.backbone": backbone, "model.weights": own,
            "train.epochs": epochs, "train.precision": "bf16",
        }  # fmt: skip
        train.run(
            "mobilenetv2", dataset, f"{work}/{backbone}", [f"{k}={v}" for k, v in settings.items()]
        )
    # By log loss those from scratch get no share beside one from ImageNet weights.
    runs = [f"{work}/{name}" for name in _MEMBERS]
    ensemble.run(runs, f"{work}/plain_bundle", weights="equal", overwrite=True)
    optimise.run(f"{work}/plain_bundle", dataset, bundle)
    return bundle


def _first_scans(source: str, path: str) -> str:
    """Write a zip of the first scans of another, which takes little more than starting."""
    with zipfile.ZipFile(source) as all_scans, zipfile.ZipFile(path, "w") as few:
        names = [name for name in all_scans.namelist() if not name.endswith("/")]
        for name in names[:_FEW_SCANS]:
            few.writestr(name, all_scans.read(name))
    return path


def _our_job(bundle: str, source: str, out: str, options: list[str]) -> tuple[int, float]:
    """Return the scans of one `bt score` and its seconds, its start included."""
    words = [sys.executable, "-m", "jobs.score", bundle, source, "-o", out, *options]
    started = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode not in (EXIT_OK, EXIT_INCOMPLETE):
        raise RunError(f"bt score ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return len(storage.read_table(f"{out}/scores", ["scan_id"])), seconds


def _plain_rate(bundle: str, source: str, folder: str, num_scans: int) -> float:
    started = time.perf_counter()
    import torch

    from bt_core.ensemble.calibration import calibration_of
    from bt_core.inference.predictor import distinct_specs
    from bt_core.models.bundle import Bundle
    from bt_core.models.inputs import Preprocessor
    from bt_core.scans.archives import list_scans
    from jobs.baselines import plain_probs, plain_score

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    opened = Bundle(bundle)
    info = opened.info
    specs, _ = distinct_specs([m.preprocess for m in info.members])
    if len(specs) != 1:
        raise UsageError(
            "the plain loop has one preprocessing; use a bundle whose members share one"
        )
    models = [(opened.load_member(m), Preprocessor(m.preprocess)) for m in info.members]
    calibration = calibration_of(info, [m.name for m in info.members])
    names = [ref.member for ref in list_scans(source).refs]
    chosen = names[:: max(1, len(names) // num_scans)][:num_scans]
    loaded = time.perf_counter()
    num = plain_score(
        source,
        chosen,
        specs[0],
        plain_probs(models, calibration),
        info.label_space.names,
        f"{folder}/plain.parquet",
        num_workers=2,
    )
    seconds = time.perf_counter() - loaded
    return len(names) / (loaded - started + seconds / num * len(names))


def _forward_rate(bundle: str, source: str) -> float:
    """Return the scans/s of all members' runtimes on decoded scans, a process for each core."""
    cores = len(os.sched_getaffinity(0))
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Manager().Barrier(cores)
    with ProcessPoolExecutor(cores, mp_context=spawn) as pool:
        return sum(pool.map(_forward_alone, [bundle] * cores, [source] * cores, [barrier] * cores))


def _forward_alone(bundle: str, source: str, barrier: Any) -> float:
    """Take real scans: those about which a fast runtime is in doubt cost more, and are few."""
    import numpy as np

    from bt_core.data.catalog import ref_columns
    from bt_core.data.decode_stage import DecodeStage
    from bt_core.inference.predictor import Predictor
    from bt_core.models.bundle import Bundle
    from bt_core.scans.archives import list_scans

    predictor = Predictor(Bundle(bundle))
    refs = list_scans(source).refs
    columns = ref_columns(refs[:: max(1, len(refs) // _FORWARD_SCANS)][:_FORWARD_SCANS])
    decoded = DecodeStage(predictor.specs)({name: np.array(v) for name, v in columns.items()})
    good = np.flatnonzero(decoded["reason"] == "")
    pixels = [decoded[f"pixels_{i}"][good] for i in range(len(predictor.specs))]
    predictor.logits([own[:_FORWARD_BATCH] for own in pixels])
    barrier.wait()  # all cores are loaded before any is measured
    started, num, at = time.perf_counter(), 0, 0
    while time.perf_counter() - started < _FORWARD_SECONDS:
        predictor.logits([own[at : at + _FORWARD_BATCH] for own in pixels])
        num += len(pixels[0][at : at + _FORWARD_BATCH])
        at = (at + _FORWARD_BATCH) % len(good)
    return num / (time.perf_counter() - started)


def _agreements(folder: str) -> dict[str, float]:
    """Return shares of scans: decisions of the cascade, its savings, classes of the plain loop."""
    columns = [
        "scan_id", "member", "status", "predicted_label", "members_used", "seen_in_training"
    ]  # fmt: skip
    ours, quick = (
        storage.read_table(f"{folder}/{side}/scores", columns).sort_by("scan_id")
        for side in ("ensemble", "cascade")
    )
    answers = [
        (a == b, len(used) == 1, seen)
        for a, b, used, seen in zip(
            *(_decisions(table) for table in (ours, quick)),
            quick["members_used"].to_pylist(),
            quick["seen_in_training"].to_pylist(),
            strict=True,
        )
        if a[1] is not None
    ]
    unseen = [answer for answer in answers if not answer[2]]
    plain = storage.read_table(f"{folder}/plain.parquet")
    names = [name for name in plain.column_names if name.startswith("prob_")]
    rows = plain.to_pylist()
    labels = {r["member"]: max(names, key=r.__getitem__).removeprefix("prob_") for r in rows}
    known = dict(zip(ours["member"].to_pylist(), ours["predicted_label"].to_pylist(), strict=True))
    return {
        "agreement": sum(same for same, _, _ in answers) / len(answers),
        "answered_alone": sum(alone for _, alone, _ in answers) / len(answers),
        "agreement_unseen": sum(same for same, _, _ in unseen) / max(1, len(unseen)),
        "answered_alone_unseen": sum(alone for _, alone, _ in unseen) / max(1, len(unseen)),
        "agreement_plain": sum(known[m] == label for m, label in labels.items()) / len(labels),
    }


def _decisions(table: "pa.Table") -> list[tuple[str, str | None]]:
    """Return status and class of each row."""
    return list(zip(table["status"].to_pylist(), table["predicted_label"].to_pylist(), strict=True))
