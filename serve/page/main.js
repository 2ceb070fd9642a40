// What happens on the page: scans come in, are sent in portions, and their answers are shown.

import { ApiError, ask, formOf, hasKey, useKey } from "./api.js";
import { Card } from "./card.js";
import { csvOf, jsonOf, save } from "./download.js";
import { dropped, takeChunk } from "./files.js";
import { bytes, whyOf } from "./words.js";

const byId = (name) => document.getElementById(name);

let data = null; // limits, and reasons by their codes
let model = null;
let waiting = []; // scans without an answer yet
let scans = []; // all of this tab
let isSending = false;
let oneByOne = false;

async function start() {
  try {
    data ??= await ask("static/data.json");
    model ??= await ask("v1/model");
  } catch (error) {
    blocked(error);
    return false;
  }
  sayModel();
  return true;
}

function sayModel() {
  byId("model").textContent =
    `Bundle ${model.bundle_id} with ${model.members.length} ` +
    `${model.members.length === 1 ? "member" : "members"}. ${model.notice}`;
}

function add(files) {
  if (!files.length) return;
  const batch = newBatch(files.length);
  const added = files.map((file) => ({ file, at: new Date(), batch, result: null }));
  batch.scans = added;
  waiting.push(...added);
  scans.push(...added);
  byId("results").hidden = false;
  send();
}

function newBatch(count) {
  for (const own of document.querySelectorAll(".batch")) own.open = false;
  const node = byId("batch-template").content.firstElementChild.cloneNode(true);
  const time = new Date().toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  node.querySelector("h3").textContent = `${time}, ${counted(count, "scan")}`;
  byId("batches").prepend(node);
  return { node, scans: [] };
}

/** Send what waits, portion by portion, until all is answered or something stands in the way. */
async function send() {
  if (isSending) return;
  isSending = true;
  byId("alert").hidden = true;
  try {
    sayLeft(waiting.length);
    if (!(await start())) return;
    while (waiting.length) {
      for (const scan of waiting) if (!scan.card) showCard(scan);
      refuseTooLarge();
      const chunk = takeChunk(waiting, oneByOne ? 1 : data.max_files, data.max_body_bytes);
      if (!chunk.length) break;
      sayLeft(chunk.length + waiting.length);
      if (!(await sendChunk(chunk))) return;
    }
    say();
  } finally {
    isSending = false;
    refresh();
  }
}

async function sendChunk(chunk) {
  try {
    const form = formOf(chunk.map((scan) => scan.file));
    const { results } = await ask("v1/predictions?pictures=true", form);
    if (results.some((result) => result.bundle_id !== model.bundle_id)) {
      model = await ask("v1/model"); // another bundle answers by now
      sayModel();
      for (const scan of chunk) scan.card.labels = model.labels;
    }
    chunk.forEach((scan, i) => finish(scan, results[i]));
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 413 && chunk.length > 1) {
      oneByOne = true; // something on the way takes less than the server
      waiting.unshift(...chunk);
    } else if (error.asksForKey || error.mayPass || chunk.length > 1) {
      waiting.unshift(...chunk);
      blocked(error);
      return false;
    } else {
      finish(chunk[0], refusalOf(error));
    }
  }
  return true;
}

function refusalOf(error) {
  const isWhole = data.rejected.includes(error.code) || !(error.code in data.reasons);
  return { status: isWhole ? "rejected" : "failed", reason: error.code, detail: error.message };
}

function refuseTooLarge() {
  const isTooLarge = (scan) => scan.file.size > data.max_body_bytes - 64 * 1024;
  const limit = bytes(data.max_body_bytes);
  for (const scan of waiting.filter(isTooLarge)) {
    const detail = `the file has ${bytes(scan.file.size)}, the server takes ${limit}`;
    finish(scan, { status: "rejected", reason: "body_too_large", detail });
  }
  waiting = waiting.filter((scan) => !isTooLarge(scan));
}

function showCard(scan) {
  scan.card = new Card(scan, model.labels, data.reasons, explain);
  scan.batch.node.querySelector(".cards").append(scan.card.node);
}

function finish(scan, result) {
  scan.result = result;
  scan.at = new Date();
  scan.card.update();
  const { node, scans: own } = scan.batch;
  node.querySelector(".counts").textContent = tally(own);
}

async function explain(scan) {
  try {
    return await ask("v1/explanations", formOf([scan.file]));
  } catch (error) {
    if (error.asksForKey) showKey(error);
    throw error;
  }
}

function tally(own) {
  const count = (...statuses) => own.filter((s) => statuses.includes(s.result?.status)).length;
  const parts = [
    [count("scored"), "auto"],
    [count("deferred"), "for review"],
    [count("rejected", "failed"), "not classified"],
    [own.filter((s) => !s.result).length, "waiting"],
  ];
  return parts.filter(([num]) => num).map(([num, words]) => `${num} ${words}`).join(", ");
}

function sayLeft(left) {
  if (left) byId("status").textContent = `Being classified: ${counted(left, "scan")} left.`;
}

function say() {
  const done = scans.filter((scan) => scan.result);
  if (done.length) byId("status").textContent = `Done. ${counted(done.length, "scan")}: ${tally(done)}.`;
}

function refresh() {
  const isEmpty = !scans.some((scan) => scan.result);
  for (const name of ["csv", "json"]) byId(name).disabled = isEmpty;
  byId("results").hidden = !scans.length;
}

/** Say what stands in the way, and offer to go on. */
function blocked(error) {
  byId("status").textContent = waiting.length ? `${counted(waiting.length, "scan")} waiting.` : "";
  if (error.asksForKey) {
    showKey(error);
    return;
  }
  const wait = error.retryAfter ? ` in about ${error.retryAfter} s` : " shortly";
  const why = error.isOverload ? "The server is busy." : error.message;
  byId("alert-text").textContent = `${why} Nothing is lost; try again${wait}.`;
  byId("alert").hidden = false;
}

function showKey(error) {
  const isWrong = hasKey();
  byId("key-why").textContent =
    (isWrong ? `The key was not accepted: ${error.message} ` : "This server asks for a key. ") +
    "A key is kept until this tab is closed, and nowhere else.";
  byId("key").hidden = false;
  byId("key-field").focus();
}

function clear() {
  waiting = [];
  scans = [];
  byId("batches").replaceChildren();
  byId("alert").hidden = true;
  byId("status").textContent = "All results are cleared.";
  refresh();
  byId("files").focus();
}

function counted(number, word) {
  return `${number} ${word}${number === 1 ? "" : "s"}`;
}

function answered() {
  return scans.filter((scan) => scan.result);
}

function listen() {
  const words = (result) => whyOf(result, data.reasons);
  byId("files").addEventListener("change", (event) => {
    add([...event.target.files]);
    event.target.value = ""; // so that the same file can be chosen again
  });
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    useKey(byId("key-field").value);
    byId("key-field").value = "";
    byId("key").hidden = true;
    byId("files").focus();
    send();
  });
  byId("again").addEventListener("click", () => {
    byId("files").focus(); // the button goes
    send();
  });
  byId("clear").addEventListener("click", clear);
  byId("csv").addEventListener("click", () =>
    save(csvOf(answered(), model.labels, words), "brain-mri-results.csv", "text/csv"));
  byId("json").addEventListener("click", () =>
    save(jsonOf(answered(), model, words), "brain-mri-results.json", "application/json"));
  const intake = byId("intake");
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    intake.classList.add("over");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) intake.classList.remove("over");
  });
  document.addEventListener("drop", async (event) => {
    event.preventDefault();
    intake.classList.remove("over");
    add(await dropped(event.dataTransfer));
  });
}

listen();
start();
