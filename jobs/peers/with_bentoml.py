"""BentoML, which batches in a process of its own, and imports this by its name."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import bentoml

from jobs.peers.common import BATCH, PeerOptions, decoded, load

_OPTIONS: Final = "BT_PEER"
"""Environment variable by which its processes are told what to load."""


@bentoml.service(workers=1, traffic={"timeout": 60})
class Peer:
    """Classifies uploads in batches."""

    def __init__(self) -> None:
        self.spec, self.answers = load(PeerOptions(**json.loads(os.environ[_OPTIONS])))

    @bentoml.api(batchable=True, max_batch_size=BATCH, max_latency_ms=1000)  # type: ignore[untyped-decorator]
    def predict(self, request: list[Path]) -> list[dict[str, Any]]:
        """Return the probabilities of each class for each upload."""
        return list(self.answers([decoded(path.read_bytes(), self.spec) for path in request]))


if __name__ == "__main__":
    given = PeerOptions.from_command()
    words = ["-m", "bentoml", "serve", "jobs.peers.with_bentoml:Peer", "--port", str(given.port)]
    os.environ[_OPTIONS] = json.dumps(asdict(given))
    os.execv(sys.executable, [sys.executable, *words])
