// What was dropped or chosen, as files; folders are gone through.

/** Return the files of a drop, those of folders too. */
export async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files];
  return (await Promise.all(entries.map(filesOf))).flat();
}

async function filesOf(entry) {
  if (entry.isFile) return [await new Promise((done, fail) => entry.file(done, fail))];
  const reader = entry.createReader();
  const found = [];
  for (;;) {
    const some = await new Promise((done, fail) => reader.readEntries(done, fail));
    if (!some.length) break; // a folder is given in portions
    found.push(...some);
  }
  return (await Promise.all(found.map(filesOf))).flat().filter((file) => !file.name.startsWith("."));
}

/** Take from the front of waiting scans as many as one request may carry. */
export function takeChunk(waiting, maxFiles, maxBytes) {
  const room = maxBytes - 64 * 1024; // for what multipart puts between the files
  let total = 0;
  let count = 0;
  while (count < waiting.length && count < maxFiles) {
    total += waiting[count].file.size + 512;
    if (count && total > room) break;
    count += 1;
  }
  return waiting.splice(0, count);
}
