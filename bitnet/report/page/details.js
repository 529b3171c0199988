// Charts of what stands beside the records: layers, codes, curves; and the samples.

const LEVELS = 8; // shades of the heat map

function errorText(error) { return error >= 0.001 ? String(+error.toPrecision(2)) : error.toExponential(0); }

// The same shades for every result, so that two of them can be compared; a layer without error stays blank.
function shadesOf(entries) {
  const logs = entries.flatMap((each) => each.cells.map((cell) => cell[2])).filter((error) => error > 0).map(Math.log10);
  const high = Math.max(...logs), low = Math.min(Math.min(...logs), high - 1);
  const step = (high - low) / LEVELS || 1;
  return { level: (error) => error > 0 ? Math.min(LEVELS - 1, Math.floor((Math.log10(error) - low) / step)) : null,
    from: (level) => 10 ** (low + level * step) };
}

function layersSpec(entry, shades) {
  const kinds = [...new Set(entry.cells.map((cell) => cell[1]))];
  const values = entry.cells.map(([block, kind, error, bits, name]) => ({ block: block < 0 ? "other" : String(block), kind, error,
    level: shades.level(error), text: errorText(error), dark: shades.level(error) >= 5,
    hover: { title: name, error: error.toPrecision(3), "bits a weight": bits.toFixed(3) } }));
  const blocks = [...new Set(values.map((each) => each.block))].sort((a, b) => a === "other" ? 1 : b === "other" ? -1 : a - b);
  const levels = [...Array(LEVELS).keys()], narrow = CHARTS.narrow();
  const shared = { x: { field: "block", type: "ordinal", sort: blocks, title: "block", axis: { labelAngle: 0, domain: false, ticks: false, labelOverlap: true } },
    y: { field: "kind", type: "nominal", sort: kinds, title: null, axis: { domain: false, ticks: false, labelLimit: narrow ? 110 : 220, labelColor: "var(--ink)" } } };
  const layers = [{ mark: { type: "rect", stroke: "var(--bg)", strokeWidth: 2 },
    encoding: { tooltip: TIP, description: { field: "hover.title" },
      color: { field: "level", type: "ordinal", scale: { domain: levels, range: levels.map((each) => `var(--h${each})`) },
        legend: { title: `${entry.measure} error, from`, orient: "bottom", direction: "horizontal", columns: narrow ? 3 : LEVELS, symbolType: "square", symbolSize: 220, symbolStrokeWidth: 0,
          labelExpr: `[${levels.map((each) => `'${errorText(shades.from(each))}'`).join(",")}][datum.value]` } } } }];
  if (blocks.length <= (narrow ? 6 : 16))
    layers.push({ mark: { type: "text", fontSize: narrow ? 9.5 : 11 }, encoding: { text: { field: "text" },
      color: { condition: { test: "datum.dark", value: "var(--bg)" }, value: "var(--ink)" } } });
  return { ...FIT, height: 30 * kinds.length, data: { values }, encoding: shared, layer: layers };
}

// One small chart a result; each has codes of its own.
function codesSpec(entries, rows, width) {
  const values = entries.flatMap((entry) => entry.codes.map((code, index) => ({ run: rows[entry.id].label, code, share: entry.shares[index],
    colour: colourOf(rows[entry.id]), hover: { title: rows[entry.id].label, code: entry.width > 1 ? `${code} to ${code + entry.width - 1}` : code,
      share: `${(100 * entry.shares[index]).toFixed(2)} %`, weights: entry.weights.toLocaleString("en") } })));
  const columns = Math.max(1, Math.min(4, Math.floor(width / 250))), own = Math.floor(width / columns) - 62;
  const runs = entries.map((entry) => rows[entry.id].label);
  return { data: { values }, columns, spacing: { row: 22, column: 20 },
    facet: { field: "run", type: "nominal", sort: runs, title: null, header: { labelAnchor: "start", labelLimit: own + 30, labelFontWeight: 600 } },
    spec: { width: own, height: 110, mark: { type: "bar", binSpacing: 1 },
      encoding: { x: { field: "code", type: "ordinal", title: null, axis: { labelAngle: 0, labelOverlap: "greedy", ticks: false } },
        y: { field: "share", type: "quantitative", title: null, axis: { format: "~%", tickCount: 3 } },
        color: { field: "colour", type: "nominal", scale: null }, tooltip: TIP } },
    resolve: { scale: { x: "independent", y: "independent" } } };
}

// Labels at the ends of the lines, moved apart where they would overlap.
function endsOf(lines, low, high, height) {
  const gap = 15 * (high - low) / height;
  let least = -Infinity;
  return lines.map((line) => ({ ...line, place: line.y })).sort((a, b) => a.y - b.y)
    .map((line) => { line.place = Math.max(line.y, least); least = line.place + gap; return line; });
}

function curvesSpec(entries, rows) {
  const narrow = CHARTS.narrow(), height = narrow ? 300 : 380, unit = entries[0].x;
  const alike = entries.filter((entry) => entry.x === unit);
  const flat = (name) => alike.flatMap((entry) => entry[name].map(([x, y]) => ({ id: entry.id, run: rows[entry.id].label, x, y, colour: colourOf(rows[entry.id]),
    hover: { title: rows[entry.id].label, [unit]: Math.round(x).toLocaleString("en"), [`${name} loss`]: y.toFixed(4) } })));
  const train = flat("train"), validation = flat("validation");
  const last = Math.max(...[...train, ...validation].map((each) => each.x));
  const batches = train.filter((each) => each.x >= last / 10).map((each) => each.y).sort((a, b) => a - b);
  const usual = batches.slice(Math.floor(batches.length * 0.03), Math.ceil(batches.length * 0.97)); // one easy batch shall not squeeze all others
  const late = [...usual, ...validation.filter((each) => each.x >= last / 10).map((each) => each.y)];
  const margin = 0.06 * (Math.max(...late) - Math.min(...late)) || 0.1, low = Math.min(...late) - margin, high = Math.max(...late) + margin;
  const dashes = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3]]; // runs of one family share its colour
  const turn = {}, dashOf = {};
  for (const entry of alike) { const family = rows[entry.id].family; dashOf[rows[entry.id].label] = dashes[(turn[family] = (turn[family] ?? -1) + 1) % dashes.length]; }
  const dash = { field: "run", type: "nominal", scale: { domain: Object.keys(dashOf), range: Object.values(dashOf) }, legend: null };
  const ends = endsOf(alike.map((entry) => { const [x, y] = (entry.validation.length ? entry.validation : entry.train).at(-1);
    return { x, y, text: `${rows[entry.id].label}  ${y.toFixed(3)}`, colour: colourOf(rows[entry.id]) }; }).filter((each) => each.y <= high), low, high, height);
  const labelled = !narrow && ends.length <= 14;
  const x = { field: "x", type: "quantitative", title: unit === "tokens" ? "tokens seen in training" : "step", scale: { domain: [0, last], nice: false }, axis: { format: "~s", grid: false } };
  const y = { field: "y", type: "quantitative", title: "nats a token", scale: { domain: [low, high], zero: false, nice: false }, axis: { tickCount: 6 } };
  const colour = { field: "colour", type: "nominal", scale: null };
  return { ...FIT, height, encoding: { x, y }, layer: [
      { data: { values: train }, mark: { type: "line", strokeWidth: 1.1, opacity: 0.55, clip: true }, encoding: { color: colour, detail: { field: "run" }, strokeDash: dash } },
      { data: { values: validation }, mark: { type: "line", strokeWidth: 2, clip: true }, encoding: { color: colour, detail: { field: "run" }, strokeDash: dash } },
      { data: { values: validation }, mark: { type: "point", filled: true, size: 42, opacity: 1, clip: true }, encoding: { color: colour, tooltip: TIP } },
      ...(labelled ? [{ data: { values: ends }, mark: { type: "text", align: "left", dx: 8, limit: 230 }, encoding: { x: { datum: last }, y: { field: "place", type: "quantitative" }, text: { field: "text" }, color: colour } }] : []),
    ] };
}

function drawSamples(node, entries, rows) {
  for (const entry of entries) {
    const figure = document.createElement("figure"), caption = document.createElement("figcaption"), step = document.createElement("span");
    caption.textContent = `${rows[entry.id].label} `;
    step.textContent = `step ${entry.step.toLocaleString("en")}`;
    caption.append(step);
    figure.append(caption, ...entry.texts.map((text) => { const block = document.createElement("pre"); block.textContent = text; return block; }));
    node.append(figure);
  }
}
