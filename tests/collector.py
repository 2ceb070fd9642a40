"""A collector of OpenTelemetry's traces, as far as tests need one."""

import gzip
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Collector(ThreadingHTTPServer):
    """Takes OTLP over HTTP; `spans` are protobuf spans, `resources` what each batch was of."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans, self.resources, self.received = [], [], b""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def take(self, content):
        self.received += content
        for batch in ExportTraceServiceRequest.FromString(content).resource_spans:
            self.resources.append({a.key: a.value.string_value for a in batch.resource.attributes})
            self.spans += [span for scope in batch.scope_spans for span in scope.spans]

    def named(self, name):
        return [span for span in self.spans if span.name.startswith(name)]


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        is_packed = self.headers.get("Content-Encoding") == "gzip"
        assert self.path == "/v1/traces"
        self.server.take(gzip.decompress(content) if is_packed else content)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@contextmanager
def collector():
    """Run one while a block runs."""
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
