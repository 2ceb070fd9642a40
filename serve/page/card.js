// One scan on the page, from waiting to its answer. Text from outside is set as text, never markup.

import { drawMap, drawScale } from "./heat.js";
import { DECISIONS, badgeOf, percent, readable, whyOf } from "./words.js";

const template = document.getElementById("card-template");

const FIGURES = {
  outside_head: ["Heat outside the head", percent],
  mirror_agreement: ["Agreement with the mirrored scan's map", (value) => value.toFixed(2)],
  deletion: ["Probability kept while the hottest places go", (value) => value.toFixed(2)],
  insertion: ["Probability reached while the hottest places come", (value) => value.toFixed(2)],
  randomised_similarity: ["Likeness to an untrained model's map", (value) => value.toFixed(2)],
};

export class Card {
  /** @param onExplain called with the scan when its explanation is asked for; resolves to it. */
  constructor(scan, labels, reasons, onExplain) {
    this.scan = scan;
    this.labels = labels;
    this.reasons = reasons;
    this.onExplain = onExplain;
    this.node = template.content.firstElementChild.cloneNode(true);
    this.find(".file").textContent = scan.file.name;
    this.find(".blank").textContent = "No picture yet";
    this.find(".why").textContent = "Waiting for its answer";
    this.find(".show-map").addEventListener("click", () => this.explain());
    this.find("input[type=range]").addEventListener("input", (event) => this.fade(event.target));
  }

  find(selector) {
    return this.node.querySelector(selector);
  }

  /** Show the result of the scan. */
  update() {
    const { result } = this.scan;
    this.node.dataset.decision = DECISIONS[result.status] ?? "refused";
    this.find(".badge").textContent = badgeOf(result.status);
    const others = result.prediction_set?.length > 1 ? result.prediction_set : [];
    this.find(".why").textContent = whyOf(result, this.reasons) +
      (others.length ? ` Not ruled out: ${others.map(readable).join(", ")}.` : "") +
      (result.seen_in_training ? " The models learnt from this scan or a copy of it: the answer proves little." : "");
    this.showPicture(result);
    if (!result.probabilities) return;
    this.find(".label").textContent = readable(result.predicted_label);
    this.find(".confidence").textContent = `${percent(result.confidence)} calibrated confidence`;
    this.find(".bars").replaceChildren(...this.labels.map((label) => this.bar(label, result)));
    this.find(".explain").hidden = false;
    this.find(".more").hidden = false;
    this.find(".more dl").replaceChildren(...terms(detailsOf(result)));
    const about = `heat map and votes for ${this.scan.file.name}`;
    this.find(".show-map").setAttribute("aria-label", `Show ${about}`);
  }

  showPicture(result) {
    this.find(".blank").textContent = result.picture ? "" : "No picture";
    if (!result.picture) return;
    const image = this.find(".frame img");
    image.src = `data:image/png;base64,${result.picture}`;
    image.alt = `Slice of ${this.scan.file.name}`;
    image.hidden = false;
    if (result.num_frames > 1) {
      const place = `Slice ${result.frame_index + 1} of ${result.num_frames}`;
      this.find("figcaption").textContent = place;
    }
  }

  bar(label, result) {
    const share = result.probabilities[label];
    const item = document.createElement("li");
    item.classList.toggle("likeliest", label === result.predicted_label);
    const fill = element("span", "fill");
    fill.style.inlineSize = `${100 * share}%`;
    const track = element("span", "track");
    track.setAttribute("aria-hidden", "true");
    track.append(fill);
    item.append(element("span", "name", readable(label)), track,
      element("span", "number", percent(share)));
    return item;
  }

  async explain() {
    if (this.isAsking) return;
    this.isAsking = true;
    const button = this.find(".show-map");
    const status = this.find(".explain-status");
    button.setAttribute("aria-disabled", "true");
    status.textContent = "Being explained. After a pause this takes up to half a minute.";
    try {
      this.scan.explained = await this.onExplain(this.scan);
      if (this.scan.explained.bundle_id !== this.scan.result.bundle_id) {
        this.scan.result = this.scan.explained; // another bundle answers by now
        this.update();
      }
      await this.showMap(this.scan.explained);
      status.textContent = "";
      if (document.activeElement === button) this.find("input[type=range]").focus();
      button.hidden = true;
    } catch (error) {
      const wait = error.retryAfter ? ` in about ${error.retryAfter} s` : "";
      status.textContent = error.isOverload ? `The server is busy. Try again${wait}.` : error.message;
    } finally {
      this.isAsking = false;
      button.removeAttribute("aria-disabled");
    }
  }

  async showMap(explained) {
    this.showPicture({ ...this.scan.result, picture: explained.picture });
    const map = this.find(".map");
    await drawMap(map, explained.heat);
    map.hidden = false;
    map.setAttribute("aria-label", `Heat map for ${readable(explained.predicted_label)}`);
    drawScale(this.find(".scale canvas"));
    const figures = Object.entries(FIGURES)
      .filter(([name]) => typeof explained.figures[name] === "number")
      .map(([name, [words, shown]]) => [words, shown(explained.figures[name])]);
    this.find(".method").textContent =
      `${explained.method.split(", ").map(readable).join(", ")} of ` +
      `${explained.heat_members.join(", ")}. It shows what moved the answer, not where a tumour is.`;
    this.find(".opacity").hidden = false;
    this.fade(this.find("input[type=range]"));
    this.showVotes(explained.members);
    this.find(".more dl").append(...terms(figures));
  }

  fade(slider) {
    this.find(".map").style.opacity = String(slider.value / 100);
    slider.setAttribute("aria-valuetext", `${slider.value} per cent`);
  }

  showVotes(members) {
    const head = row("th", "Member", this.labels.map(readable));
    head.querySelectorAll("th").forEach((own) => own.setAttribute("scope", "col"));
    this.find("thead").replaceChildren(head);
    const rows = Object.entries(members).map(([name, probs]) => {
      const likeliest = Math.max(...Object.values(probs));
      const own = row("td", name, this.labels.map((label) => percent(probs[label])));
      this.labels.forEach((label, i) => {
        own.children[i + 1].classList.toggle("likeliest", probs[label] === likeliest);
      });
      return own;
    });
    this.find("tbody").replaceChildren(...rows);
    this.find(".votes").hidden = false;
  }
}

function row(tag, name, cells) {
  const own = document.createElement("tr");
  const first = element("th", "", name);
  first.setAttribute("scope", "row");
  own.append(first, ...cells.map((text) => element(tag, "", text)));
  return own;
}

function detailsOf(result) {
  const shown = [
    ["Classes not ruled out", result.prediction_set.map(readable).join(", ")],
    ["Members that answered", result.members_used.join(", ")],
    ["They ran as", [...new Set(result.runtimes)].join(", ")],
    ["Seen in training", result.seen_in_training ? "Yes, or a copy of it" : "No"],
    ["Entropy", `${result.entropy.toFixed(3)} nats`],
  ];
  if (result.distance !== null) {
    shown.push(["Distance from training scans", `${result.distance.toFixed(2)} (about 1 for scans like them)`]);
  }
  return [...shown, ["SHA-256, first digits", result.content_sha256.slice(0, 20)], ["Bundle", result.bundle_id]];
}

function terms(pairs) {
  return pairs.map(([term, text]) => {
    const own = document.createElement("div");
    own.append(element("dt", "", term), element("dd", "", text));
    return own;
  });
}

function element(tag, name, text = "") {
  const own = document.createElement(tag);
  if (name) own.className = name;
  own.textContent = text;
  return own;
}
