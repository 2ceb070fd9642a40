"""Ways to run a member: equal to the reference, alone or among others, and what a host lacks."""

import logging
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from shutil import which

import numpy as np
import pytest
import torch

from bt_core.errors import BundleError, UnavailableError
from bt_core.evaluation.model_card import runtimes_sentence
from bt_core.inference import openvino_runtime
from bt_core.inference.compiled_runtime import CompiledRuntime, _cpu_has_bf16
from bt_core.inference.fidelity import (
    Limits,
    Measured,
    compare,
    doubtful_below,
    flip_bound,
    judge,
)
from bt_core.inference.openvino_runtime import OpenVINORuntime, export, files_of, quantize
from bt_core.inference.optimise import Scans, choose_runtime, name_of
from bt_core.inference.predictor import Predictor
from bt_core.inference.runtime import (
    TorchRuntime,
    confidence,
    golden_change,
    start,
)
from bt_core.models.bundle import INT8_EXPORTS, Bundle, RuntimeInfo
from bt_core.models.bundle_writer import rewrite_bundle
from bt_core.models.classifier import build_classifier
from bt_core.models.inputs import Preprocessor
from bt_core.models.spec import HeadSpec, ModelSpec
from bt_core.scans.preprocess import PreprocessSpec
from cluster.session import Resources
from tests.tiny_bundle import TINY, make_bundle

FLAT = HeadSpec(pool="flatten", hidden=(8,))
KINDS = {
    "from scratch": (TINY, PreprocessSpec(size_px=32)),
    "flattened": (
        TINY.model_copy(update={"backbone_args": {"width": 24}, "head": FLAT}),
        PreprocessSpec(size_px=80),
    ),
    "flips": (TINY.model_copy(update={"test_time_flips": "both"}), PreprocessSpec(size_px=32)),
    "standardised": (TINY, PreprocessSpec(size_px=64, normalize="zscore")),
    "one channel": (TINY, PreprocessSpec(size_px=32, channels=1, normalize="unit")),
    "mobilenet": (
        ModelSpec(backbone="mobilenetv2_050", backbone_args={"pad_type": "same"}, weights="none"),
        PreprocessSpec(size_px=64),
    ),
    "transformer": (
        ModelSpec(backbone="vit_tiny_patch16_224", backbone_args={"depth": 2}, weights="none"),
        PreprocessSpec(size_px=32, channels=1, mean=(0.4,) * 3, std=(0.2,) * 3),
    ),
}


def started(classifier, preprocessor, info, files):
    device = next(classifier.parameters()).device
    return start(lambda: classifier, preprocessor, info, files, device)


def member_of(kind):
    torch.manual_seed(0)
    classifier, _, preprocess = build_classifier(*KINDS[kind], 4)
    return classifier.eval(), Preprocessor(preprocess)


def scans_of(preprocessor, num, seed=0):
    side = preprocessor.spec.size_px
    return np.random.default_rng(seed).integers(0, 256, (num, side, side), dtype=np.uint8)


def openvino_of(classifier, preprocessor, precision="fp32", batch_size=4):
    model = export(classifier, preprocessor, batch_size)
    if precision == "int8":
        model = quantize(model, scans_of(preprocessor, 12, seed=9), preprocessor)
    info = RuntimeInfo(kind="openvino", precision=precision, batch_size=batch_size)
    return started(classifier, preprocessor, info, files_of(model, info.exports))


def assert_same_alone_and_among_others(runtime, scans):
    together = runtime.run(scans)
    for i, scan in enumerate(scans):
        for got, wanted in zip(runtime.run(scan[None]), together, strict=True):
            np.testing.assert_array_equal(got[0], wanted[i])
    for got, wanted in zip(runtime.run(scans[::-1]), together, strict=True):
        np.testing.assert_array_equal(got[::-1], wanted)
    nothing = runtime.run(scans[:0])
    assert [len(one) for one in nothing] == [0, 0]
    assert nothing[0].shape[1:] == together[0].shape[1:]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_member_is_exported_and_equals_the_reference(kind):
    classifier, preprocessor = member_of(kind)
    scans = scans_of(preprocessor, 7)
    scans[0] = 100 + scans[0] % 3  # a faint one
    runtime = openvino_of(classifier, preprocessor)
    wanted = TorchRuntime(classifier, preprocessor).run(scans)
    for got, reference in zip(runtime.run(scans), wanted, strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, reference, atol=1e-4, rtol=1e-4)
    assert_same_alone_and_among_others(runtime, scans)
    assert runtime.num_threads == 1


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("kind", ["mobilenet", "standardised", "transformer"])
def test_lower_precisions_run_and_answer_the_same_alone(kind, precision):
    classifier, preprocessor = member_of(kind)
    capabilities = openvino_runtime._capabilities(openvino_runtime._core())
    if openvino_runtime._CAPABILITY[precision] not in capabilities:
        pytest.skip(f"this CPU has no {precision} instructions")
    scans = scans_of(preprocessor, 6)
    runtime = openvino_of(classifier, preprocessor, precision)
    assert runtime.info.precision == precision
    reference = TorchRuntime(classifier, preprocessor)
    assert not np.array_equal(runtime.run(scans)[0], reference.run(scans)[0]), "it is float32"
    assert 0 < golden_change(runtime, reference, preprocessor.spec, 1.0) < 0.2
    assert_same_alone_and_among_others(runtime, scans)


def test_a_standardised_faint_scan_keeps_its_float64_statistics_in_bf16():
    classifier, preprocessor = member_of("standardised")
    faint = 100 + scans_of(preprocessor, 4) % 3
    wanted = TorchRuntime(classifier, preprocessor).run(faint)[0]
    runtime = openvino_of(classifier, preprocessor, "bf16")
    np.testing.assert_allclose(runtime.run(faint)[0], wanted, atol=0.005)


@pytest.mark.skipif(not which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_member_equals_the_reference(precision):
    classifier, preprocessor = member_of("flips")
    info = RuntimeInfo(kind="compiled", precision=precision)
    if precision == "bf16" and not _cpu_has_bf16():
        pytest.skip("this CPU has no bf16 instructions")
    runtime = started(classifier, preprocessor, info, {})
    scans = scans_of(preprocessor, 6)
    wanted = TorchRuntime(classifier, preprocessor).run(scans)
    tolerance = 1e-4 if precision == "fp32" else 0.02
    for got, reference in zip(runtime.run(scans), wanted, strict=True):
        np.testing.assert_allclose(got, reference, atol=tolerance)
    assert_same_alone_and_among_others(runtime, scans)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu_a_compiled_member_is_a_cuda_graph_that_equals_the_reference(precision):
    classifier, preprocessor = member_of("mobilenet")
    scans = scans_of(preprocessor, 70)  # more than one graph takes
    wanted = TorchRuntime(classifier, preprocessor).run(scans)
    runtime = CompiledRuntime(
        classifier.to("cuda"), preprocessor, RuntimeInfo(kind="compiled", precision=precision)
    )
    for got, reference in zip(runtime.run(scans), wanted, strict=True):
        np.testing.assert_allclose(got, reference, atol=0.01 if precision == "fp32" else 0.3)
    assert_same_alone_and_among_others(runtime, scans[:5])


def test_without_a_compiler_a_member_is_not_compiled(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (str(tmp_path / "no-compiler"),))
    classifier, preprocessor = member_of("standardised")
    with pytest.raises(UnavailableError, match=r"torch.compile: "):
        CompiledRuntime(classifier, preprocessor, RuntimeInfo(kind="compiled"))


def optimised(tmp_path, precision="fp32", max_change=0.05, sizes=(32,)):
    """A bundle whose first member asks for OpenVINO."""
    make_bundle(tmp_path / "plain", sizes=sizes)
    bundle = Bundle(str(tmp_path / "plain"))
    first = bundle.info.members[0]
    model = export(bundle.load_member(first), Preprocessor(first.preprocess), 4)
    wanted = RuntimeInfo(kind="openvino", precision=precision, max_change=max_change)
    member = first.model_copy(update={"runtime": wanted})
    info = bundle.info.model_copy(update={"members": (member, *bundle.info.members[1:])})
    exports = {f"members/{first.name}/{n}": c for n, c in files_of(model).items()}
    rewrite_bundle(str(tmp_path / "fast"), bundle, info, exports, "a card")
    return tmp_path / "fast"


def test_a_bundle_runs_the_member_as_it_says_and_the_export_is_digested(tmp_path):
    fast = optimised(tmp_path, sizes=(32, 48))
    bundle, plain = Bundle(str(fast)), Bundle(str(tmp_path / "plain"))
    assert bundle.info.bundle_id != plain.info.bundle_id, "the runtime decides answers"
    assert bundle.training_index() == plain.training_index()
    predictor = Predictor(bundle)
    assert [type(r) for r in predictor.runtimes] == [OpenVINORuntime, TorchRuntime]
    pixels = [scans_of(Preprocessor(m.preprocess), 5) for m in bundle.info.members]
    np.testing.assert_allclose(predictor.logits(pixels), Predictor(plain).logits(pixels), atol=1e-4)
    for name in ("openvino.xml", "openvino.bin"):
        path = fast / "members" / "m0" / name
        content = path.read_bytes()
        path.write_bytes(content[:-9] + b"x" + content[-8:])
        with pytest.raises(BundleError, match=f"{name} differs from its digest"):
            Bundle(str(fast))
        path.write_bytes(content)


@pytest.fixture
def warned():
    """What this project's logger says."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("bt").addHandler(handler)
    yield lines
    logging.getLogger("bt").removeHandler(handler)


def assert_reference_runs(location, warned, reason):
    predictor = Predictor(Bundle(str(location)))
    assert predictor.runtimes[0].info.kind == "torch"
    (line,) = [line for line in warned if "torch fp32 instead of openvino" in line]
    assert line.startswith("member m0 runs as torch fp32")
    assert reason in line
    pixels = [scans_of(Preprocessor(predictor.specs[0]), 3)]
    plain = Predictor(Bundle(str(location.parent / "plain")))
    np.testing.assert_array_equal(predictor.logits(pixels), plain.logits(pixels))


def test_a_cpu_without_bf16_runs_the_reference_and_says_so(tmp_path, monkeypatch, warned):
    fast = optimised(tmp_path, "bf16")
    monkeypatch.setattr(openvino_runtime, "_capabilities", lambda core: ["FP32", "INT8"])
    assert_reference_runs(fast, warned, "finds no bf16 instructions on this CPU (only FP32, INT8)")


def test_a_host_without_openvino_runs_the_reference_and_says_so(tmp_path, monkeypatch, warned):
    fast = optimised(tmp_path)
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert_reference_runs(fast, warned, "openvino is not installed here")


def test_an_export_that_does_not_compile_leaves_the_reference(tmp_path, warned):
    make_bundle(tmp_path / "plain", sizes=(32,))
    bundle = Bundle(str(tmp_path / "plain"))
    wanted = RuntimeInfo(kind="openvino")
    member = bundle.info.members[0].model_copy(update={"runtime": wanted})
    info = bundle.info.model_copy(update={"members": (member,)})
    exports = {"members/m0/openvino.xml": b"<net/>", "members/m0/openvino.bin": b""}
    rewrite_bundle(str(tmp_path / "fast"), bundle, info, exports, "a card")
    assert_reference_runs(tmp_path / "fast", warned, "cannot compile the export")


def test_a_host_whose_golden_picture_comes_out_otherwise_runs_the_reference(tmp_path, warned):
    """Float32 of other kernels differs by some last bits, and here none may."""
    fast = optimised(tmp_path, max_change=0.0)
    assert_reference_runs(fast, warned, "a probability of the golden picture is")


def test_openvino_is_not_for_gpus(monkeypatch):
    classifier, preprocessor = member_of("from scratch")
    with pytest.raises(UnavailableError, match="OpenVINO runs on the CPU"):
        started(classifier.to("meta"), preprocessor, RuntimeInfo(kind="openvino"), {})


def test_figures_are_of_tempered_probabilities():
    wanted_NK = np.log([[0.6, 0.4], [0.2, 0.8], [0.7, 0.3], [0.51, 0.49]])
    logits_NK = np.log([[0.6, 0.4], [0.3, 0.7], [0.7, 0.3], [0.49, 0.51]])
    row = Measured("openvino bf16", 4)
    compare(row, logits_NK, wanted_NK, 1.0, golden=0.0)
    assert row.label_flips == 0.25
    assert row.max_change == pytest.approx(0.1)
    assert row.mean_change == pytest.approx((0.1 + 0.02) / 4)
    compare(row, 2 * logits_NK, 2 * wanted_NK, 2.0, golden=0.3)
    assert row.max_change == 0.3, "the golden picture counts"
    compare(row, np.full((4, 2), np.nan), wanted_NK, 1.0, golden=0.0)
    assert row.max_change == 1.0, "no number is as wrong as can be"


@pytest.mark.parametrize(
    ("flips", "change", "why_not"),
    [
        (0.001, 0.05, ""),
        (0.0011, 0.05, "0.11% of labels flip, 0.10% may"),
        (0.0, 0.051, "a probability moves by 0.051, 0.05 may"),
    ],
)
def test_a_candidate_is_judged_by_both_limits(flips, change, why_not):
    row = Measured("openvino int8", 4, label_flips=flips, max_change=change)
    judge(row, Limits())
    assert (row.accepted, row.why_not) == (not why_not, why_not)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_doubtful_answers_are_the_ones_of_float32(precision):
    classifier, preprocessor = member_of("mobilenet")
    scans = scans_of(preprocessor, 20)
    model = export(classifier, preprocessor, 4)
    files = files_of(model)
    if precision == "int8":
        files |= files_of(quantize(model, scans, preprocessor), INT8_EXPORTS)
    info = RuntimeInfo(kind="openvino", precision=precision)
    fast = started(classifier, preprocessor, info, files)
    exact = started(classifier, preprocessor, RuntimeInfo(kind="openvino"), files)
    sure = float(np.median(confidence(fast.run(scans)[0])))
    checked = started(
        classifier, preprocessor, info.model_copy(update={"exact_below": sure}), files
    )
    doubtful = confidence(fast.run(scans)[0]) < sure
    assert 0 < doubtful.sum() < len(scans)
    for got, quick, right in zip(*(r.run(scans) for r in (checked, fast, exact)), strict=True):
        np.testing.assert_array_equal(got[doubtful], right[doubtful])
        np.testing.assert_array_equal(got[~doubtful], quick[~doubtful])
        assert not np.array_equal(quick[doubtful], right[doubtful])
    assert_same_alone_and_among_others(checked, scans)
    assert set(checked.info.exports) == set(files), "it has what it needs, and no more"


def test_the_confidence_below_which_float32_answers_is_as_low_as_the_limits_allow():
    wanted_NK = np.log([[0.99, 0.01], [0.55, 0.45], [0.85, 0.15], [0.2, 0.8]])
    logits_NK = np.log([[0.985, 0.015], [0.48, 0.52], [0.80, 0.20], [0.2, 0.8]])
    args = (logits_NK, wanted_NK, 1.0)
    assert doubtful_below(*args, Limits(max_flips=0, max_change=0.2)) == 0.6
    assert doubtful_below(*args, Limits(max_flips=0, max_change=0.09)) == 0.9, "half is 0.045"
    assert doubtful_below(*args, Limits(max_flips=0, max_change=0.002)) == 0.99
    sure_NK = np.log([[0.999, 0.001], [0.001, 0.999]])
    none = doubtful_below(sure_NK, sure_NK[::-1], 1.0, Limits())
    assert none is None, "what is wrong though it is sure cannot be told"


@pytest.mark.slow
def test_int8_is_taken_or_refused_by_its_figures():
    classifier, preprocessor = member_of("mobilenet")
    compared, ranges = scans_of(preprocessor, 40), scans_of(preprocessor, 16, seed=1)
    kinds = [("openvino", "int8"), ("openvino", "fp32")]
    args = (classifier, preprocessor, 1.0, Scans(compared, ranges))
    strict = choose_runtime(*args, Limits(max_flips=0, max_change=1e-4), kinds)
    assert strict.runtime.precision == "fp32"
    by_name = {m.name: m for m in strict.measured}
    assert set(by_name) >= {"torch fp32", "openvino int8", "openvino fp32"}
    refused = by_name["openvino int8"]
    assert "a probability moves by" in refused.why_not
    assert refused.max_change > 1e-4
    assert by_name["openvino fp32"].accepted
    assert all(m.images_per_second > 0 for m in strict.measured)
    few = choose_runtime(*args, Limits(max_flips=1, max_change=1), kinds)
    assert few.runtime.precision == "fp32", "40 scans prove nothing of lower precision"
    assert {m.name: m.why_not for m in few.measured}["openvino int8"].startswith("it takes 300")
    loose = choose_runtime(*args, Limits(max_flips=1, max_change=1, min_scans=40), kinds)
    assert all(m.accepted for m in loose.measured)
    rates = {m.name: m.images_per_second for m in loose.measured}
    assert name_of(loose.runtime) == max(rates, key=rates.get)


def test_what_few_flips_say_of_all_scans():
    assert flip_bound(0, 300) == pytest.approx(1 - 0.05 ** (1 / 300)), "the rule of three"
    assert flip_bound(3, 3) == 1.0
    assert 0.002 < flip_bound(1, 2000) < 0.003


def test_without_nncf_int8_is_left_out_with_the_reason(monkeypatch):
    classifier, preprocessor = member_of("from scratch")
    monkeypatch.setitem(sys.modules, "nncf", None)
    scans = scans_of(preprocessor, 8)
    kinds = [("openvino", "int8")]
    choice = choose_runtime(classifier, preprocessor, 1.0, Scans(scans, scans), Limits(), kinds)
    assert choice.runtime.kind == "torch"
    assert choice.measured[1].images_per_second is None
    assert "int8 needs NNCF" in choice.measured[1].why_not


_HOME_CALLS = """
import sys
seen = []
def refuse(event, args):
    if event in ("os.fork", "urllib.Request", "socket.getaddrinfo", "socket.connect") or (
        event == "open" and "openvino_ga_cid" in str(args[0])
    ):
        seen.append(event)
        raise OSError("not from here")
sys.addaudithook(refuse)
{work}
import atexit, time
time.sleep(1)  # telemetry sends from a thread
print(sorted(set(seen)), "openvino_telemetry.main" in sys.modules)
"""

_OUR_WORK = """
import numpy as np
from tests.unit.test_runtimes import member_of, openvino_of, scans_of
classifier, preprocessor = member_of("from scratch")
for precision in ("fp32", "int8"):
    openvino_of(classifier, preprocessor, precision).run(scans_of(preprocessor, 4))
"""


def home_calls(work, home):
    """Run code in a fresh process without a say on telemetry; return what tried to call home."""
    assert version("openvino-telemetry"), "else there is nothing to turn off"
    home.mkdir()
    keep = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", _HOME_CALLS.format(work=work)],
        env={**keep, "HOME": str(home), "OMP_NUM_THREADS": "1", "CI": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()[-1]


def test_nothing_calls_home(tmp_path):
    as_it_comes = home_calls("import openvino", tmp_path / "as it comes")
    assert as_it_comes.endswith("True")
    assert "os.fork" in as_it_comes, "it sends from a child process"
    assert home_calls(_OUR_WORK, tmp_path / "ours") == "[] False"
    assert not list((tmp_path / "ours").glob("intel*"))


_BUSY_THREADS = """
import psutil, torch
from tests.unit.test_runtimes import member_of, openvino_of, scans_of
torch.set_num_threads(1)
classifier, preprocessor = member_of("mobilenet")
runtime, scans = openvino_of(classifier, preprocessor), scans_of(preprocessor, 4)
def spent():
    return {t.id: t.user_time + t.system_time for t in psutil.Process().threads()}
before = spent()
while sum(spent().values()) - sum(before.values()) < 1:
    runtime.run(scans)
grown = {i: s - before.get(i, 0) for i, s in spent().items()}
print(sum(s > 0.05 for s in grown.values()))
"""


def test_a_runtime_keeps_one_thread_busy():
    """Several actors share a host, each with a thread of its own."""
    path = {"PYTHONPATH": ":".join(p for p in sys.path if p), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", _BUSY_THREADS], env=path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1"]


@pytest.mark.parametrize("num_cpus", [1.0, 2.0, 3.5, 64.0])
def test_scoring_actors_of_one_thread_are_no_more_than_the_cores(num_cpus):
    resources = Resources(num_cpus, 0.0, 1, num_cpus)
    assert 1 <= resources.scorers("cpu")[0] <= num_cpus


def test_the_model_card_says_how_members_run(tmp_path):
    info = make_bundle(tmp_path / "b", sizes=(32,))
    assert "eager PyTorch in float32, the reference" in runtimes_sentence(info)
    rows = [
        asdict(Measured("torch fp32", 4, images_per_second=50.0)),
        asdict(Measured("openvino bf16", 4, images_per_second=210.0)),
    ]
    measured = {
        "cpu": "some CPU", "num_scans": 900, "chosen": {"m0": "openvino bf16"},
        "members": {"m0": rows}, "ensemble": {"label_flips": 0.0011, "max_change": 0.02},
    }  # fmt: skip
    sentence = runtimes_sentence(info.model_copy(update={"provenance": {"runtimes": measured}}))
    assert "m0 as openvino bf16 (4.2 times the reference's rate)" in sentence
    assert "900 validation scans 0.11% differ" in sentence
