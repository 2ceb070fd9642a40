// Numbers and codes in words.

export const DECISIONS = { scored: "auto", deferred: "review", rejected: "refused", failed: "refused" };

const BADGES = { rejected: "Not classified", failed: "Not read", scored: "Auto", deferred: "Review" };

export function badgeOf(status) {
  return BADGES[status] ?? status;
}

export function readable(name) {
  const words = String(name).replaceAll("_", " ");
  return words.charAt(0).toUpperCase() + words.slice(1);
}

/** Return a share as per cent that never says 0 or 100 of what is neither. */
export function percent(share) {
  const value = 100 * share;
  if (value > 0 && value < 0.05) return "< 0.1 %";
  if (value < 100 && value >= 99.95) return "> 99.9 %";
  return `${value.toFixed(1)} %`;
}

export function sentence(text) {
  return text ? text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".") : "";
}

/** Return why a scan was decided on as it was, in words; `reasons` holds them by their codes. */
export function whyOf(result, reasons) {
  if (result.status === "scored") return "Sure enough by the bundle's rule to need no review.";
  const words = reasons[result.reason] ?? readable(result.reason);
  if (result.status === "deferred") return `A person should look: ${words}.`;
  // The detail says the same with the numbers of this file, after its code.
  const detail = String(result.detail ?? "").replace(/^[a-z_]+: /, "");
  return sentence(detail || words);
}

export function bytes(count) {
  return count < 1024 ** 2 ? `${Math.ceil(count / 1024)} KiB` : `${(count / 1024 ** 2).toFixed(1)} MiB`;
}
