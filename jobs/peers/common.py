"""What the servers share that `bt bench serve` measures besides the project's own.

They are what a user would write around the same model; its weights and the decoding are the same,
so that only the way of serving differs. `python -m jobs.peers.with_fastapi BUNDLE 8001` starts one.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

BATCH: Final = 8
WAIT_SECONDS: Final = 0.005
Answers = Callable[[list[np.ndarray]], list[dict[str, float]]]


@dataclass(frozen=True)
class PeerOptions:
    """What a peer is started with.

    Attributes:
        bundle: folder.
        port: to listen on.
        own_runtime: run what the bundle chose; else eager PyTorch in float32.
        num_threads: of the model.
    """

    bundle: str
    port: int
    own_runtime: bool
    num_threads: int

    @classmethod
    def from_command(cls) -> "PeerOptions":
        """Return those of the command line."""
        parser = argparse.ArgumentParser()
        parser.add_argument("bundle")
        parser.add_argument("port", type=int)
        parser.add_argument("--own-runtime", action="store_true")
        parser.add_argument("--num-threads", type=int, default=1)
        return cls(**vars(parser.parse_args()))


def load(options: PeerOptions) -> tuple[Any, Answers]:
    """Return the spec of a bundle's first member, and what answers pixels_SS by it."""
    import torch

    from bt_core.ensemble.calibration import calibration_of
    from bt_core.inference.predictor import Predictor
    from bt_core.models.bundle import Bundle
    from bt_core.models.inputs import Preprocessor
    from jobs.baselines import plain_probs

    torch.set_num_threads(options.num_threads)
    opened = Bundle(options.bundle)
    member = opened.info.members[0]
    calibration = calibration_of(opened.info, [member.name])
    names = opened.info.label_space.names
    if options.own_runtime:
        predictor = Predictor(opened, "cpu", options.num_threads)

        def probs(pixels_BSS: np.ndarray) -> np.ndarray:
            return calibration.probs(predictor.runtimes[0].run(pixels_BSS)[0][None])
    else:
        model = opened.load_member(member)
        to_probs = plain_probs([(model, Preprocessor(member.preprocess))], calibration)

        @torch.inference_mode()
        def probs(pixels_BSS: np.ndarray) -> np.ndarray:
            return to_probs(pixels_BSS)

    def answers(pixels: list[np.ndarray]) -> list[dict[str, float]]:
        return [dict(zip(names, row, strict=True)) for row in probs(np.stack(pixels)).tolist()]

    return member.preprocess, answers


def decoded(content: bytes, spec: Any) -> np.ndarray:
    """Return pixels_SS uint8 of an upload."""
    from bt_core.scans.formats import decode_scan
    from bt_core.scans.preprocess import preprocess_pixels

    return preprocess_pixels(decode_scan(content, "").image_HW, spec)
