// The table: sorted, filtered, and of each row the command that made it.

const PAGE_ROWS = 100;

const COLUMNS = [
  { key: "label", name: "result", text: true },
  { key: "kind", name: "kind", text: true },
  { key: "bits", name: "bits/weight", show: (row) => number(row.bits, 3) },
  { key: "claimed", name: "claimed", show: (row) => number(row.claimed, 2), narrow: "hide" },
  { key: "perplexity", name: "perplexity", show: (row) => number(row.perplexity, 2) },
  { key: "gap", name: "gap", show: (row) => row.gap == null ? "—" : `${row.gap >= 0 ? "+" : ""}${row.gap.toFixed(4)}` },
  { key: "spread", name: "±", show: (row) => number(row.spread, 4), narrow: "hide" },
  { key: "kl", name: "KL", show: (row) => number(row.kl, 4), narrow: "hide" },
  { key: "top1", name: "top-1", show: (row) => row.top1 == null ? "—" : `${(100 * row.top1).toFixed(1)} %`, narrow: "hide" },
  { key: "bytes", name: "MB", show: (row) => (row.bytes / 1e6).toFixed(2) },
  { key: "train_tokens", name: "tokens", show: (row) => row.train_tokens ? row.train_tokens.toLocaleString("en") : "—", narrow: "hide" },
  { key: "quantize_seconds", name: "quantize s", show: (row) => number(row.quantize_seconds, 1), narrow: "hide" },
];

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value != null) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

class RunTable {
  constructor(section, rows) {
    this.section = section;
    this.rows = rows.map((row) => ({ ...row, spread: row.gap_interval ? (row.gap_interval[1] - row.gap_interval[0]) / 2 : null,
      words: [row.label, row.kind, row.family, row.model, row.command, row.folder, row.git].join("\n").toLowerCase() }));
    this.columns = COLUMNS.filter((column) => this.rows.some((row) => row[column.key] != null && row[column.key] !== 0));
    this.sort = { key: "perplexity", up: true };
    this.filter = { text: "", kind: "", bits: Infinity };
    this.limit = PAGE_ROWS;
    this.open = new Set();
    this.body = section.querySelector("tbody");
    this.head();
    this.controls();
    this.draw();
  }

  head() {
    this.headings = new Map(this.columns.map((column) => {
      const button = element("button", { type: "button" }, column.name);
      button.addEventListener("click", () => this.sortBy(column.key));
      return [column.key, element("th", { scope: "col", "data-narrow": column.narrow }, button)];
    }));
    this.section.querySelector("thead").append(element("tr", {}, ...this.headings.values()));
  }

  controls() {
    const pick = (name) => this.section.querySelector(`[data-filter="${name}"]`);
    pick("text").addEventListener("input", (event) => this.change({ text: event.target.value.trim().toLowerCase() }));
    pick("bits").addEventListener("input", (event) => this.change({ bits: event.target.value === "" ? Infinity : Number(event.target.value) }));
    const kinds = ["", ...["PTQ", "QAT", "dense"].filter((kind) => this.rows.some((row) => row.kind === kind))];
    const buttons = kinds.map((kind) => {
      const button = element("button", { type: "button", "aria-pressed": String(kind === "") }, kind || "all");
      button.addEventListener("click", () => {
        for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
        this.change({ kind });
      });
      return button;
    });
    pick("kind").append(...buttons);
    this.more = this.section.querySelector("[data-more]");
    this.more.addEventListener("click", () => { this.limit += PAGE_ROWS * 5; this.draw(); });
    this.section.querySelector("[data-csv]").addEventListener("click", () => this.save());
  }

  change(filter) { Object.assign(this.filter, filter); this.limit = PAGE_ROWS; this.draw(); }

  sortBy(key) { this.sort = { key, up: this.sort.key === key ? !this.sort.up : true }; this.draw(); }

  chosen() {
    const { text, kind, bits } = this.filter, words = text.split(/\s+/), { key, up } = this.sort;
    const fits = (row) => (!kind || row.kind === kind) && row.bits <= bits && words.every((word) => row.words.includes(word));
    const order = (a, b) => {
      if (a[key] == null || b[key] == null) return (a[key] == null) - (b[key] == null); // unknown comes last, either way
      const step = typeof a[key] === "string" ? a[key].localeCompare(b[key], "en", { numeric: true }) : a[key] - b[key];
      return up ? step : -step;
    };
    return this.rows.filter(fits).sort(order);
  }

  draw() {
    const found = this.chosen(), shown = found.slice(0, this.limit);
    for (const [key, heading] of this.headings) {
      if (key === this.sort.key) heading.setAttribute("aria-sort", this.sort.up ? "ascending" : "descending");
      else heading.removeAttribute("aria-sort");
    }
    this.body.replaceChildren(...shown.flatMap((row) => this.lines(row)));
    const all = this.rows.length;
    this.section.querySelector("[data-count]").textContent = (found.length === all ? `${all} results` : `${found.length} of ${all} results`)
      + (found.length > shown.length ? `, the first ${shown.length} shown` : "") + ".";
    this.more.hidden = found.length <= shown.length;
    this.more.textContent = `Show ${Math.min(found.length - shown.length, PAGE_ROWS * 5)} more`;
  }

  lines(row) {
    const open = this.open.has(row.id);
    const name = element("button", { type: "button", class: "name", "aria-expanded": String(open) }, swatch(row), row.label);
    name.addEventListener("click", () => { this.toggle(row.id); });
    const line = element("tr", { class: open ? "row open" : "row", "data-id": row.id }, ...this.columns.map((column, index) =>
      element("td", { "data-narrow": column.narrow }, index === 0 ? name : column.text ? row[column.key] : column.show(row))));
    return open ? [line, this.detail(row)] : [line];
  }

  toggle(id) {
    if (!this.open.delete(id)) this.open.add(id);
    this.draw();
    this.body.querySelector(`[data-id="${id}"] .name`)?.focus();
  }

  detail(row) {
    const code = element("code", {}, row.command), copy = element("button", { type: "button", class: "plain" }, "Copy");
    copy.addEventListener("click", async () => { copy.textContent = await copied(row.command, code) ? "Copied" : "Press Ctrl+C"; });
    const facts = { model: row.model, data: row.data, folder: row.folder, commit: row.git || "unknown", seed: row.seed, started: row.started,
      took: `${row.seconds} s`, steps: row.steps || null, "nats a token": number(row.nll, 5),
      "95 % interval": row.gap_interval ? `${small(row.gap_interval[0])} to ${small(row.gap_interval[1])} nats` : null,
      "bits a byte": row.bits_per_byte == null ? null : number(row.bits_per_byte, 4), "share quantized": row.share == null ? null : `${(100 * row.share).toFixed(1)} %` };
    const list = element("dl", { class: "facts" }, ...Object.entries(facts).filter(([, value]) => value != null)
      .map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, String(value)))));
    return element("tr", { class: "detail" }, element("td", { colspan: this.columns.length }, element("div", { class: "command" }, code, copy), list));
  }

  // Make one row visible, whatever the filter hides.
  reveal(id) {
    if (!this.chosen().slice(0, this.limit).some((row) => row.id === id)) {
      Object.assign(this.filter, { text: "", kind: "", bits: Infinity });
      for (const input of this.section.querySelectorAll("input")) input.value = "";
      for (const button of this.section.querySelectorAll('[data-filter="kind"] button')) button.setAttribute("aria-pressed", String(button.textContent === "all"));
      this.limit = Math.max(this.limit, this.chosen().findIndex((row) => row.id === id) + 1);
    }
    this.open.add(id);
    this.draw();
    const name = this.body.querySelector(`[data-id="${id}"] .name`);
    name?.focus({ preventScroll: true });
    name?.scrollIntoView({ block: "center", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
  }

  save() {
    const quoted = (value) => {
      const text = value == null ? "" : String(value);
      const safe = typeof value === "string" && /^[=+\-@\t\r]/.test(text) ? `'${text}` : text; // a spreadsheet would run it
      return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
    };
    const keys = ["label", "kind", "family", "model", "bits", "claimed", "perplexity", "nll", "gap", "spread", "kl", "top1", "bytes", "train_tokens", "quantize_seconds", "seed", "git", "folder", "command"];
    const lines = [keys.join(","), ...this.chosen().map((row) => keys.map((key) => quoted(row[key])).join(","))];
    const link = element("a", { download: "results.csv", href: URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "text/csv" })) });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }
}

async function copied(text, node) {
  try { await navigator.clipboard.writeText(text); return true; } catch { /* no permission, or a page from a file */ }
  getSelection().selectAllChildren(node);
  return document.execCommand("copy");
}
