"use strict";
// Specifications of the charts. Colours are CSS variables, so that dark mode and print need no second drawing.

const CHARTS = {
  narrow: () => matchMedia("(max-width: 640px)").matches,
  SPAN: 3,           // nats: what a published gap may add to the axis
  GAPS: 40,          // rows of the interval chart
};

const SHAPES = { PTQ: ["circle", "square", "triangle-up", "triangle-down"], QAT: ["diamond", "cross", "wedge"] };

function colourOf(row) { return row.kind === "dense" ? "var(--dense)" : `var(--c${row.look % 7})`; }

function shapeOf(row) {
  const shapes = SHAPES[row.kind] || ["circle"];
  return shapes[Math.floor(row.look / 7) % shapes.length];
}

function familyName(row) { return row.kind === "dense" ? row.family : `${row.family} (${row.kind})`; }

// Colour and shape scales: a family looks the same in every chart. The legend is HTML (it wraps on a phone).
function looks(rows) {
  const found = familiesOf(rows), domain = [...found.keys()], examples = [...found.values()];
  return {
    color: { field: "familyName", type: "nominal", scale: { domain, range: examples.map(colourOf) }, legend: null },
    shape: { field: "familyName", type: "nominal", scale: { domain, range: examples.map(shapeOf) }, legend: null },
  };
}

// Family names, each with a row that looks like it: trained ones first, full precision last.
function familiesOf(rows) {
  const order = { QAT: 0, PTQ: 1, dense: 2 }, found = new Map();
  for (const row of [...rows].sort((a, b) => order[a.kind] - order[b.kind] || a.look - b.look))
    if (!found.has(familyName(row))) found.set(familyName(row), row);
  return found;
}

const OUTLINES = { circle: "M6 2a4 4 0 1 0 0 8a4 4 0 1 0 0-8z", square: "M2.5 2.5h7v7h-7z", "triangle-up": "M6 2l4.5 8h-9z",
  "triangle-down": "M6 10l4.5-8h-9z", diamond: "M6 .8l3.8 5.2l-3.8 5.2l-3.8-5.2z", cross: "M4.5 1h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5v-3h3.5z", wedge: "M6 1l3 10h-6z", line: "M0 5h12v2h-12z" };

// The mark of a row's family, as it stands in the charts.
function swatch(row) {
  const space = "http://www.w3.org/2000/svg", svg = document.createElementNS(space, "svg"), path = document.createElementNS(space, "path");
  svg.setAttribute("viewBox", "0 0 12 12");
  svg.setAttribute("class", "swatch");
  svg.setAttribute("aria-hidden", "true");
  path.setAttribute("d", OUTLINES[row.kind === "dense" ? "line" : shapeOf(row)]);
  path.style.fill = colourOf(row);
  svg.append(path);
  return svg;
}

function config() {
  const font = getComputedStyle(document.body).fontFamily;
  return {
    font, background: "transparent", padding: { left: 4, right: 10, top: 8, bottom: 4 },
    view: { stroke: null },
    axis: { labelColor: "var(--muted)", titleColor: "var(--muted)", labelFontSize: 12, titleFontSize: 12, titleFontWeight: 400,
      gridColor: "var(--faint)", domainColor: "var(--rule)", tickColor: "var(--rule)", titlePadding: 8 },
    legend: { labelColor: "var(--ink)", labelFontSize: 12.5, titleColor: "var(--muted)", rowPadding: 5, columnPadding: 18 },
    text: { color: "var(--ink)", fontSize: 12 },
    header: { labelColor: "var(--ink)", labelFontSize: 13, titleColor: "var(--muted)" },
  };
}

const number = (value, digits) => value == null ? "—" : value.toFixed(digits);
const small = (value) => value == null ? "—" : Math.abs(value) >= 0.0095 ? value.toFixed(3) : String(+value.toPrecision(2));
const megabytes = (value) => value >= 1e9 ? `${(value / 1e9).toFixed(2)} GB` : `${(value / 1e6).toFixed(2)} MB`;

// What hovering shows, the same in every chart.
function hover(row) {
  const lines = { title: row.label, kind: row.kind === "dense" ? "full precision" : row.kind, model: row.model,
    "bits a weight": number(row.bits, 3), perplexity: number(row.perplexity, 2) };
  if (row.claimed != null) lines["bits claimed"] = number(row.claimed, 2);
  if (row.gap != null) lines.gap = `${row.gap >= 0 ? "+" : ""}${small(row.gap)} nats`;
  if (row.gap_interval) lines["95 % interval"] = `${small(row.gap_interval[0])} to ${small(row.gap_interval[1])}`;
  lines.size = megabytes(row.bytes);
  if (row.train_tokens) lines["tokens trained"] = row.train_tokens.toLocaleString("en");
  return lines;
}

function shown(row, only) { return { ...row, familyName: familyName(row), off: only != null && only !== familyName(row), hover: hover(row) }; }

const FIT = { width: "container", autosize: { type: "fit-x", contains: "padding" } };
const TIP = { value: { expr: "datum.hover" } };

// Rounded places on an axis: few, and readable over less than a decade too.
function ticks(low, high, most = 7) {
  if (high / low > 8) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const step of [1, 2, 5]) found.push(step * 10 ** power);
    return found.filter((each) => each >= low && each <= high);
  }
  const rough = (high - low) / most, unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((each) => each * unit).find((each) => each >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high; value += step) found.push(+value.toPrecision(8));
  return found;
}

const BITS = [0.5, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 12, 16, 32];

function bitsAxis(values, title) {
  const low = Math.min(...values) / 1.14, high = Math.max(...values) * 1.1;
  return { field: "bits", type: "quantitative", title,
    scale: { type: "log", domain: [low, high], nice: false },
    axis: { values: BITS.filter((each) => each >= low && each <= high), format: "~g", grid: false, labelOverlap: "greedy" } };
}

function logAxis(field, values, title) {
  const low = Math.min(...values), high = Math.max(...values), margin = Math.max((high / low) ** 0.06, 1.004);
  const places = ticks(low / margin, high * margin);
  return { field, type: "quantitative", title, scale: { type: "log", domain: [low / margin, high * margin], nice: false },
    axis: { values: places, format: "~g", labelOverlap: "greedy" } };
}

// Logarithmic down to a power of ten, linear from there through full precision at zero.
function gapAxis(field, values, title) {
  const sizes = values.map(Math.abs).filter((each) => each > 0);
  const least = Math.max(1e-4, Math.min(0.1, 10 ** Math.floor(Math.log10(Math.min(...sizes, 0.1)))));
  const high = Math.max(...values, least) * 1.25, low = Math.min(0, ...values) * 1.25 || -least / 4;
  const places = [0];
  for (let power = Math.round(Math.log10(least)); power <= Math.ceil(Math.log10(high)); power++)
    for (const step of [1, 3]) {
      const place = +(step * 10 ** power).toPrecision(3);
      if (place <= high) places.push(place);
      if (-place >= low) places.push(-place);
    }
  return { field, type: "quantitative", title, scale: { type: "symlog", constant: least, domain: [low, high], nice: false },
    axis: { values: places, format: "~g", labelOverlap: "greedy" } };
}

function frontOf(rows, height) {
  const best = [];
  for (const row of [...rows].sort((a, b) => a.bits - b.bits || a[height] - b[height]))
    if (!best.length || row[height] < best.at(-1)[height]) best.push(row);
  return best;
}

function pointLayer(rows, look) {
  return { data: { values: rows }, mark: { type: "point", filled: true, stroke: "var(--bg)", strokeWidth: 1 },
    encoding: { ...look, size: { condition: { test: "datum.kind === 'QAT'", value: 190 }, value: 95 },
      opacity: { condition: { test: "datum.off", value: 0.12 }, value: 0.95 },
      tooltip: TIP, description: { field: "label" } } };
}

// Names beside their marks: to the left below, where the front leaves room, but inside the picture.
function nameLayers(rows, domain, style) {
  const place = (row) => Math.log(row.bits / domain[0]) / Math.log(domain[1] / domain[0]);
  const layer = (values, align) => ({ data: { values }, mark: { type: "text", align, limit: 210, dx: align === "right" ? -8 : 9, dy: style.dy, ...style },
    encoding: { text: { field: "label" } } });
  return [layer(rows.filter((row) => place(row) >= style.turn), "right"), layer(rows.filter((row) => place(row) < style.turn), "left")];
}

// The rows whose names do not cover one that stands already, the trained ones first.
function apart(rows, x, y, height) {
  const [least, most] = x.scale.domain.map(Math.log), bend = (value) => y.scale.type === "log" ? Math.log(value) : Math.sign(value) * Math.log1p(Math.abs(value) / y.scale.constant);
  const [low, high] = y.scale.domain.map(bend), kept = [];
  const placed = rows.map((row) => ({ row, across: 900 * (Math.log(row.bits) - least) / (most - least), down: height * (bend(row[y.field]) - low) / (high - low) }));
  for (const one of placed.sort((a, b) => (a.row.kind !== "QAT") - (b.row.kind !== "QAT") || a.row.bits - b.row.bits))
    if (kept.every((other) => Math.abs(other.down - one.down) > 15 || Math.abs(other.across - one.across) > 170)) kept.push(one);
  return kept.map((each) => each.row);
}

// The one full-precision row that all gaps are to, or null.
function anchorOf(rows) {
  const quantized = rows.filter((row) => row.kind !== "dense" && row.nll != null);
  const near = (dense, row) => row.gap != null && Math.abs(row.nll - dense.nll - row.gap) < 1e-6;
  return rows.find((dense) => dense.kind === "dense" && dense.nll != null && quantized.every((row) => near(dense, row))) ?? null;
}

// The axis of gaps, with the perplexities they stand for: 4 bits and 2 bits are both told apart from full precision.
function perplexityAxis(values, full) {
  const axis = gapAxis("gap", values, "perplexity");
  const round = (gap) => {
    for (let digits = 2; digits < 8; digits++) {
      const rounded = +(full * Math.exp(gap)).toPrecision(digits), place = Math.log(rounded / full);
      if (Math.abs(place - gap) < 0.2 * Math.abs(gap)) return [place, rounded];
    }
    return [gap, +(full * Math.exp(gap)).toPrecision(6)];
  };
  const places = axis.axis.values.map((gap) => gap === 0 ? [0, +full.toPrecision(4)] : round(gap));
  const words = places.map(([place, rounded]) => `abs(datum.value - ${place}) < 1e-9 ? '${rounded}' : `).join("");
  return { ...axis, axis: { ...axis.axis, values: places.map(([place]) => place), labelExpr: `${words}''` } };
}

function heightAxis(rows, anchor, view, values) {
  if (view === "gap") return gapAxis("gap", values, "nats a token above full precision");
  return anchor ? perplexityAxis(values, Math.exp(anchor.nll)) : logAxis("perplexity", values, "perplexity");
}

// From end to end by data: a rule that spans the picture's own width makes Vega's fitting of that width collapse.
function denseLayers(rows, height, words, [left, right]) {
  const line = { data: { values: rows }, mark: { type: "rule", color: "var(--dense)", strokeWidth: 1.2, strokeDash: [5, 3] },
    encoding: { x: { datum: left }, x2: { datum: right }, y: { field: height, type: "quantitative" }, tooltip: TIP } };
  if (rows.length > 3) return [line];
  return [line, { data: { values: rows.map((row) => ({ ...row, words: words(row) })) },
    mark: { type: "text", align: "right", dy: -7, color: "var(--muted)" },
    encoding: { x: { datum: right }, y: { field: height, type: "quantitative" }, text: { field: "words" } } }];
}

// Perplexity or gap over bits; null where there is nothing to draw.
function qualitySpec(rows, published, view, only) {
  const anchor = anchorOf(rows), height = view === "gap" || anchor ? "gap" : "perplexity";
  const points = rows.filter((row) => row.kind !== "dense" && row[height] != null).map((row) => shown(row, only));
  if (!points.length) return null;
  const dense = rows.filter((row) => row.kind === "dense" && row.perplexity != null).map((row) => shown(row));
  const lines = height !== "gap" ? dense : anchor ? dense.map((row) => ({ ...row, gap: row.nll - anchor.nll })) : dense.slice(0, 1).map((row) => ({ ...row, gap: 0 }));
  const front = frontOf(points, height), narrow = CHARTS.narrow();
  const x = bitsAxis([...points, ...published].map((row) => row.bits), narrow ? "bits a weight" : "bits per quantized weight, every stored bit counted");
  const y = heightAxis(rows, anchor, view, [...points, ...lines, ...published].map((row) => row[height]));
  const several = dense.length > 1;
  const words = (row) => height === "gap" && !anchor ? "full precision" : `${several ? row.label : "full precision"}, perplexity ${row.perplexity.toFixed(2)}`;
  const layers = [
    ...denseLayers(lines, height, words, x.scale.domain),
    { data: { values: front }, mark: { type: "line", interpolate: "step-after", color: "var(--front)", strokeWidth: 1.5 },
      encoding: { order: { field: "bits", type: "quantitative" } } },
    ...publishedLayers(published, x.scale.domain, narrow),
    pointLayer(points, looks(points)),
  ];
  if (!narrow)
    layers.push(...nameLayers(apart(front, x, y, 440), x.scale.domain, { turn: 0.2, baseline: "top", dy: 4 }));
  return { ...FIT, height: narrow ? 330 : 440, layer: layers, encoding: { x, y } };
}

function publishedLayers(published, domain, narrow) {
  if (!published.length) return [];
  const values = published.map((each) => ({ ...each, hover: { title: each.label, gap: `+${small(each.gap)} nats`,
    "bits claimed": each.bits, text: each.text, source: each.source, note: "another model and text; bits as the paper claims them" } }));
  const layers = [{ data: { values }, mark: { type: "point", filled: false, shape: "circle", color: "var(--published)", size: 70, strokeWidth: 1.4 },
    encoding: { tooltip: TIP, description: { field: "label" } } }];
  if (!narrow) layers.push(...nameLayers(values, domain, { turn: 0.75, dy: 0, color: "var(--published)", fontSize: 11, fontStyle: "italic" }));
  return layers;
}

function bytesSpec(rows, only) {
  const anchor = anchorOf(rows), height = anchor ? "gap" : "perplexity";
  const points = rows.filter((row) => row.perplexity != null && row.bytes > 0)
    .map((row) => ({ ...shown(row, only), gap: anchor && row.kind === "dense" ? row.nll - anchor.nll : row.gap, size: row.bytes / 1e6 }));
  if (points.length < 2) return null;
  return { ...FIT, height: CHARTS.narrow() ? 300 : 360, layer: [pointLayer(points, looks(points))],
    encoding: { x: logAxis("size", points.map((row) => row.size), CHARTS.narrow() ? "megabytes" : "megabytes of the whole model (10⁶ bytes)"),
      y: heightAxis(rows, anchor, "perplexity", points.map((row) => row[height])) } };
}

// One line a result, the nearest to full precision on top.
function gapsSpec(rows, only) {
  const found = rows.filter((row) => row.gap != null && row.kind !== "dense").sort((a, b) => a.gap - b.gap).slice(0, CHARTS.GAPS)
    .map((row) => ({ ...shown(row, only), name: `${row.label} · ${row.bits.toFixed(2)}`, low: row.gap_interval?.[0], high: row.gap_interval?.[1] }));
  if (!found.length) return null;
  const values = found.flatMap((row) => [row.gap, row.low ?? row.gap, row.high ?? row.gap]);
  const x = gapAxis("gap", values, CHARTS.narrow() ? "nats a token" : "nats a token above full precision"), look = looks(found);
  const names = found.map((row) => row.name); // said, since the layer of intervals does not hold all of them
  return { ...FIT, height: 23 * found.length, data: { values: found },
    layer: [
      { data: { values: [{}] }, mark: { type: "rule", color: "var(--dense)", strokeDash: [5, 3] }, encoding: { x: { datum: 0 } } },
      { transform: [{ filter: "isValid(datum.low)" }], mark: { type: "rule", strokeWidth: 2.5, strokeCap: "round" },
        encoding: { opacity: { condition: { test: "datum.off", value: 0.08 }, value: 0.55 }, y: nameAxis(names), x: { ...x, field: "low" }, x2: { field: "high" }, color: look.color, tooltip: TIP } },
      { mark: { type: "point", filled: true, stroke: "var(--bg)", strokeWidth: 0.8 },
        encoding: { y: nameAxis(names), x, ...look, size: { value: 90 }, opacity: { condition: { test: "datum.off", value: 0.12 }, value: 1 }, tooltip: TIP, description: { field: "label" } } },
    ] };
}

function nameAxis(names) {
  return { field: "name", type: "nominal", sort: names, title: "result · bits a weight",
    axis: { labelLimit: CHARTS.narrow() ? 185 : 330, labelFontSize: CHARTS.narrow() ? 11 : 12, ticks: false, domain: false, grid: true, labelColor: "var(--ink)",
      titleAngle: 0, titleAlign: "left", titleAnchor: "start", titleY: -8, titleX: CHARTS.narrow() ? -120 : -180 } };
}
