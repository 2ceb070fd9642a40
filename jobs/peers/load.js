// What k6 does for `bt bench serve`: one scan again and again, from clients that wait for their
// answer or, with RATE, so many times a second at even distances, whatever becomes of them.
import http from "k6/http";
import { Counter } from "k6/metrics";

const { TARGET, SCAN, FIELD, CLIENTS, LASTING, RATE } = __ENV;
const boundary = "a-boundary-that-no-scan-holds";
const headers = { "Content-Type": `multipart/form-data; boundary=${boundary}` };
const body = formOf(new Uint8Array(open(SCAN, "b"))); // once: it costs more than to send it
const vus = Number(CLIENTS);
const rate = Number(RATE);
const counts = Object.fromEntries(
  ["answered", "refused", "failed"].map((name) => [name, new Counter(name)]),
);
const answeredMs = "http_req_duration{expected_response:true}";
const refusedMs = "http_req_duration{expected_response:false}";

export const options = {
  discardResponseBodies: true,
  scenarios: {
    load: rate
      ? { executor: "constant-arrival-rate", rate, duration: LASTING, preAllocatedVUs: vus }
      : { executor: "constant-vus", vus, duration: LASTING },
  },
  summaryTrendStats: ["med", "p(99)"],
  thresholds: { [answeredMs]: ["med>=0"], [refusedMs]: ["med>=0"] }, // or they are not told apart
};

export default function () {
  const { status } = http.post(TARGET, body, { headers, timeout: "30s" });
  const kind = { 200: "answered", 429: "refused", 503: "refused" }[status] ?? "failed";
  counts[kind].add(1);
}

function formOf(scan) {
  const ascii = (text) => Uint8Array.from([...text].map((letter) => letter.charCodeAt(0)));
  const head = `--${boundary}\r\nContent-Disposition: form-data; name="${FIELD}"; filename="scan"\r\n\r\n`;
  const parts = [ascii(head), scan, ascii(`\r\n--${boundary}--\r\n`)];
  const form = new Uint8Array(parts.reduce((length, part) => length + part.length, 0));
  parts.reduce((at, part) => (form.set(part, at), at + part.length), 0);
  return form.buffer;
}

export function handleSummary({ metrics }) {
  const count = (name) => metrics[name]?.values.count ?? 0;
  const told = {
    p50_ms: metrics[answeredMs].values.med,
    p99_ms: metrics[answeredMs].values["p(99)"],
    refused_p99_ms: metrics[refusedMs].values["p(99)"],
    not_sent: count("dropped_iterations"), // no client was free
    ...Object.fromEntries(Object.keys(counts).map((name) => [name, count(name)])),
  };
  return { stdout: `${JSON.stringify(told)}\n` };
}
