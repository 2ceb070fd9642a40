// All results as a file. Nothing leaves the browser for it.

const COLUMNS = [
  "status", "reason", "predicted_label", "confidence", "entropy", "frame_index", "num_frames",
  "prediction_set", "members_used", "runtimes", "seen_in_training", "nearest_family",
  "nearest_correlation", "distance", "content_sha256", "bundle_id", "preprocess_digest",
];

/** Return a cell: a spreadsheet takes text that begins with one of these for a formula. */
export function cell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number" || typeof value === "boolean") return String(value);
  let text = Array.isArray(value) ? value.join(" ") : String(value);
  if (/^\s*[=+\-@]|^[\t\r\n]/.test(text)) text = `'${text}`;
  return /[",;\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

/** Return results as CSV; `labels` gives the classes their order. */
export function csvOf(scans, labels, whyOf) {
  const heads = ["file", "answered_at", "reason_in_words", ...labels.map((l) => `prob_${l}`)];
  const rows = scans.map(({ file, at, result }) => [
    file.name, at.toISOString(), whyOf(result), ...labels.map((l) => result.probabilities?.[l]),
    ...COLUMNS.map((name) => result[name]),
  ]);
  return [[...heads, ...COLUMNS], ...rows].map((row) => `${row.map(cell).join(",")}\r\n`).join("");
}

export function jsonOf(scans, model, whyOf) {
  const results = scans.map(({ file, at, result, explained }) => {
    const { picture, heat, ...own } = { ...result, ...explained };
    return { file: file.name, answered_at: at.toISOString(), reason_in_words: whyOf(result), ...own };
  });
  const notice = "For research. Not a medical device.";
  return JSON.stringify({ notice, model, results }, null, 1);
}

export function save(text, name, type) {
  // The mark at the start tells spreadsheets that the text is UTF-8.
  const start = type === "text/csv" ? "\ufeff" : "";
  const address = URL.createObjectURL(new Blob([start, text], { type: `${type};charset=utf-8` }));
  const link = Object.assign(document.createElement("a"), { href: address, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}
