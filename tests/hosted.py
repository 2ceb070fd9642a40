"""A bundle hosted in this process, as the deployments do on theirs, and the HTTP API over it."""

import asyncio
from contextlib import contextmanager

from starlette.testclient import TestClient

from bt_core.ensemble.ensemble import Ensemble
from bt_core.models.bundle import Bundle
from bt_core.scans.phantom import encode_picture, phantom_slice
from serve.api import build_api
from serve.explaining import LazyExplainer
from serve.hosted import HostedBundle, OverloadedError
from serve.service import Service
from serve.settings import ServeSettings
from tests.tiny_bundle import make_bundle

SCANS = [
    encode_picture(phantom_slice(name, 1, 96), ".png")
    for name in ("glioma", "meningioma", "pituitary")
]


class LocalBundle:
    """An ensemble and an explainer in this process; can be held up, and put out of reach."""

    def __init__(self, location):
        bundle = Bundle(location)
        self.location = location
        self.ensemble = Ensemble(bundle)
        self.explainer = LazyExplainer(num_threads=1)
        self.hosted = HostedBundle(
            location, bundle.info, self.predict, self.loaded_id, self.explain
        )
        self.is_there = True
        self.seconds = 0.0

    def _reach(self):
        if not self.is_there:
            raise OverloadedError

    async def predict(self, scan):
        await asyncio.sleep(self.seconds)
        self._reach()
        pixels, digest, gate = scan
        answers = await asyncio.to_thread(
            self.ensemble.answer, [p[None] for p in pixels], [digest], [gate]
        )
        return answers[0]

    async def loaded_id(self):
        self._reach()
        return self.hosted.info.bundle_id

    async def explain(self, scan, answer, draw):
        self._reach()
        bundle_id = self.hosted.info.bundle_id
        return await asyncio.to_thread(
            self.explainer.explain, self.location, bundle_id, scan, answer, draw
        )


def tiny_hosted(tmp_path_factory, *sizes):
    """Return a small bundle, one member for each size in pixels, that answers in this process."""
    location = str(tmp_path_factory.mktemp("serve") / "bundle")
    make_bundle(location, sizes=sizes)
    return LocalBundle(location)


def files(*contents):
    return [("files", (f"scan{i}", content)) for i, content in enumerate(contents)]


@contextmanager
def client_of(hosted, added=None, **settings):
    """Give a client of an API with settings, and with what `added` does to it."""
    service = Service(ServeSettings(bundle="unused", **settings), hosted)
    try:
        api = build_api(service)
        if added is not None:
            added(api)
        with TestClient(api, raise_server_exceptions=False) as client:
            yield client
    finally:
        service.close()
        if (log := getattr(api.state, "audit_log", None)) is not None:
            log.close()


def bearer(key):
    return {"Authorization": f"Bearer {key}"}
