// Requests to the server that gave this page; the key lives in this module's memory only.

let key = "";

export class ApiError extends Error {
  /** What went wrong in words; status 0 says that no answer came. */
  constructor(status, detail, code = "", retryAfter = 0) {
    super(detail);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }

  get asksForKey() {
    return this.status === 401 || this.status === 403;
  }

  get isOverload() {
    return this.status === 429 || this.status === 503;
  }

  get mayPass() {
    return this.isOverload || this.status === 0 || this.status === 408 || this.status >= 500;
  }
}

export function useKey(text) {
  key = text.trim();
}

export function hasKey() {
  return key !== "";
}

/** Return the JSON of a path; a form is posted. Raise ApiError. */
export async function ask(path, form) {
  const headers = { Accept: "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const options = { headers, cache: "no-store", credentials: "same-origin", redirect: "error" };
  if (form) Object.assign(options, { method: "POST", body: form });
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new ApiError(0, "The server did not answer.");
  }
  let content = null;
  try {
    content = await answer.json();
  } catch {
    // Not of the API, but of what stands before it; the status says enough.
  }
  if (answer.ok && content !== null) return content;
  const wait = Number.parseInt(answer.headers.get("retry-after") ?? "", 10) || 0;
  const detail = content?.detail ?? `The server answered with status ${answer.status}.`;
  throw new ApiError(answer.status || 0, String(detail), String(content?.code ?? ""), wait);
}

/** Return scans as a form. Their names stay here: a name of a file may be a patient's. */
export function formOf(files) {
  const form = new FormData();
  files.forEach((file, i) => form.append("files", file, `scan${i}${suffixOf(file.name)}`));
  return form;
}

function suffixOf(name) {
  return name.match(/\.(nii\.gz|[a-z0-9]{1,4})$/i)?.[0].toLowerCase() ?? "";
}
