"""LitServe, which batches and runs the model in a process of its own."""

import litserve as ls
import numpy as np
from fastapi import UploadFile

from jobs.peers.common import BATCH, WAIT_SECONDS, PeerOptions, decoded, load


class Peer(ls.LitAPI):  # type: ignore[misc]
    """Classifies uploads in batches.

    Args:
        options: as given.
    """

    def __init__(self, options: PeerOptions) -> None:
        super().__init__(max_batch_size=BATCH, batch_timeout=WAIT_SECONDS)
        self.options = options

    def setup(self, device: str) -> None:
        """Load the model."""
        self.spec, self.answers = load(self.options)

    def decode_request(self, request: UploadFile) -> np.ndarray:
        """Return pixels_SS of an upload."""
        return decoded(request.file.read(), self.spec)

    def batch(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Return the batch as it is."""
        return inputs

    def predict(self, x: list[np.ndarray]) -> list[dict[str, float]]:
        """Return the probabilities of each class for each."""
        return self.answers(x)

    def unbatch(self, output: list[dict[str, float]]) -> list[dict[str, float]]:
        """Return the answers as they are."""
        return output

    def encode_response(self, output: dict[str, float]) -> dict[str, float]:
        """Return an answer as it is."""
        return output


if __name__ == "__main__":
    given = PeerOptions.from_command()
    server = ls.LitServer(Peer(given), accelerator="cpu", workers_per_device=1)
    server.run(port=given.port, generate_client_file=False, log_level="warning")
