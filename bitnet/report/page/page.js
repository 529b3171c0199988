// Puts the page together: one group of results after the other, each chart in its section.

const DATA = JSON.parse(document.getElementById("data").textContent);
const EMBED = { renderer: "svg", actions: false, ast: true, defaultStyle: false, tooltip: { disableDefaultStyle: true } };

class Group {
  constructor(node, data) {
    Object.assign(this, { node, data, axis: "perplexity", published: false, only: null });
    this.table = new RunTable(this.part("table"), data.rows);
    this.offer();
  }

  part(name) { return this.node.querySelector(`[data-chart="${name}"]`); }

  plot(name) { return this.node.querySelector(`[data-plot="${name}"]`); }

  note(name, words) { const node = this.node.querySelector(`[data-note="${name}"]`); node.textContent = words; node.hidden = !words; }

  offer() {
    const { rows, layers } = this.data, quality = this.part("quality");
    const quantized = rows.filter((row) => row.kind !== "dense" && row.perplexity != null);
    const gaps = quantized.some((row) => row.gap != null);
    quality.querySelector(".switch").hidden = !gaps;
    for (const button of quality.querySelectorAll("[data-axis]")) button.addEventListener("click", () => {
      this.axis = button.dataset.axis;
      for (const other of quality.querySelectorAll("[data-axis]")) other.setAttribute("aria-pressed", String(other === button));
      quality.querySelector('[data-needs="gap"]').hidden = this.axis !== "gap";
      this.quality();
    });
    quality.querySelector("[data-published]").addEventListener("change", (event) => { this.published = event.target.checked; this.quality(); });
    const select = this.node.querySelector('[data-run="layers"]');
    for (const entry of [...layers].sort((a, b) => rows[a.id].bits - rows[b.id].bits))
      select.append(new Option(`${rows[entry.id].label} · ${rows[entry.id].bits.toFixed(2)} bits`, entry.id));
    select.addEventListener("change", () => this.layers());
    this.shades = layers.length ? ["output", "weight"].reduce((all, measure) => {
      const entries = layers.filter((entry) => entry.measure === measure && entry.cells.some((cell) => cell[2] > 0));
      return entries.length ? { ...all, [measure]: shadesOf(entries) } : all;
    }, {}) : {};
    this.legend();
    if (this.data.samples.length) drawSamples(this.plot("samples"), this.data.samples, rows);
    else this.part("samples").hidden = true;
  }

  // One legend a chart, all of one mind: a family that is pressed stands out in each of them.
  legend() {
    const lists = this.node.querySelectorAll("[data-legend]"), families = familiesOf(this.data.rows);
    for (const list of lists) for (const [family, row] of families) {
      if (row.kind === "dense" && !list.dataset.legend) continue;
      const button = element("button", { type: "button", "aria-pressed": "false", "data-family": family }, swatch(row), family);
      button.addEventListener("click", () => {
        this.only = this.only === family ? null : family;
        for (const other of this.node.querySelectorAll("[data-legend] button")) other.setAttribute("aria-pressed", String(other.dataset.family === this.only));
        for (const name of ["quality", "gaps", "bytes"]) this[name]();
      });
      list.append(button);
    }
  }

  async embed(name, spec) {
    this.part(name).hidden = !spec;
    if (!spec) return;
    this.views ??= {};
    this.views[name]?.finalize();
    const result = await vegaEmbed(this.plot(name), { config: config(), ...spec }, EMBED);
    result.view.addEventListener("click", (_, item) => { if (item?.datum?.id != null && item.datum.label) this.table.reveal(item.datum.id); });
    this.views[name] = result;
  }

  async quality() {
    const { rows } = this.data, on = this.axis === "gap" && this.published;
    const near = on ? DATA.published.filter((each) => each.gap <= CHARTS.SPAN) : [], left = on ? DATA.published.filter((each) => each.gap > CHARTS.SPAN) : [];
    this.note("published", on ? "Hollow marks are published results: other models, other texts, gaps to the papers' own full precision, bits as the papers claim them. "
      + "They show the order of magnitude and are no comparison." + left.map((each) => ` Off the scale: ${each.label} in ${each.bits} bits, +${each.gap.toFixed(2)} nats.`).join("") : "");
    await this.embed("quality", qualitySpec(rows, near, this.axis, this.only));
  }

  async gaps() {
    const { rows } = this.data, known = rows.filter((row) => row.gap != null && row.kind !== "dense").length;
    if (known > CHARTS.GAPS) this.note("gaps", `The ${CHARTS.GAPS} results nearest to full precision, of ${known}. Bars are 95 % bootstrap intervals over windows of text, paired with the original's.`);
    await this.embed("gaps", gapsSpec(rows, this.only));
  }

  async bytes() { await this.embed("bytes", bytesSpec(this.data.rows, this.only)); }

  async layers() {
    const entry = this.data.layers.find((each) => each.id === Number(this.node.querySelector('[data-run="layers"]').value));
    if (entry) this.note("layers", `${this.data.rows[entry.id].label}, ${this.data.rows[entry.id].bits.toFixed(2)} bits. ` + { output: "Squared error of each layer's outputs on the calibration text, as a share of their square.",
      weight: "Squared error of each layer's weights, as a share of their square." }[entry.measure] + " The shades are the same for every result.");
    await this.embed("layers", entry && this.shades[entry.measure] ? layersSpec(entry, this.shades[entry.measure]) : null);
  }

  async codes() {
    const { codes, rows } = this.data;
    await this.embed("codes", codes.length ? codesSpec(codes, rows, this.plot("codes").clientWidth || this.node.clientWidth) : null);
  }

  async curves() { await this.embed("curves", this.data.curves.length ? curvesSpec(this.data.curves, this.data.rows) : null); }

  // One after the other, so that the page can be scrolled meanwhile.
  async draw() {
    for (const name of ["quality", "gaps", "bytes", "layers", "codes", "curves"]) {
      try { await this[name](); } catch (error) { this.failed(name, error); }
      await new Promise((resume) => setTimeout(resume));
    }
  }

  failed(name, error) {
    console.error(name, error);
    this.part(name).hidden = false;
    this.plot(name).replaceChildren(element("p", { class: "warning" }, `This chart could not be drawn: ${error.message}`));
  }
}

const GROUPS = [...document.querySelectorAll(".group")].map((node) => new Group(node, DATA.groups[Number(node.dataset.group)]));

async function drawAll() {
  document.body.removeAttribute("data-ready");
  for (const group of GROUPS) await group.draw();
  document.body.setAttribute("data-ready", "true");
}

matchMedia("(max-width: 640px)").addEventListener("change", drawAll);
drawAll();
