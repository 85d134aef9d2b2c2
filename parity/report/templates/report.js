"use strict";
// The page of one run: filters, heat maps, the table of cells, one cell in full.
// Data: words.* are lists of strings; cells and entries are arrays that refer to them by number.
// Easy to get wrong: text from the run only ever reaches the page as text, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const words = data.words;
  // Written out, not looped over keys: 100,000 entries are made before the first picture.
  const entryOf = (v) => ({ quantity: v[0], family: v[1], run: v[2], against: v[3], verdict: v[4],
    count: v[5], scale: v[6], error: v[7], threshold: v[8], ratio: v[9], residual: v[10], tensor: v[11], step: v[12], worst: v[13] });
  const cellOf = (v) => ({ id: v[0], implementation: v[1], shape: v[2], stage: v[3], optimizer: v[4], dtype: v[5],
    verdict: v[6], causes: v[7], reasons: v[8], seconds: v[9], rerun: v[10], settings: v[11], entries: v[12].map(entryOf),
    bad: v[13], badCount: v[14], findings: v[15] });
  const cells = data.cells.map(cellOf);
  const PASS = words.verdict.indexOf("pass"), SKIPPED = words.verdict.indexOf("skipped");
  const MODEL = words.family.indexOf("model");
  const ROWS = 150;
  const isBad = (verdict) => verdict !== PASS && verdict !== SKIPPED;
  const used = (entry) => entry.threshold ? (entry.error ?? Infinity) / entry.threshold : 0;
  const SVG = "http://www.w3.org/2000/svg";
  const $ = (id) => document.getElementById(id);

  function node(name, attributes = {}, ...children) {
    const made = name.startsWith("svg:") ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  }
  const small = (value) => value === null || value === undefined ? "–" : value === 0 ? "0" : Number(value).toExponential(1);
  const plain = (value) => value === null || value === undefined ? "–" : Number(value).toFixed(6);
  const factor = (value) => Math.abs(value) >= 100 || (value && Math.abs(value) < 0.01) ? small(value) : value.toFixed(3);
  const NEW = words.finding.indexOf("new");
  const isKnown = (cell) => cell.findings.length > 0 && !cell.findings.includes(NEW);
  const known = (cell) => cell.findings.length
    ? node("span", { class: "known", title: isKnown(cell) ? "fails as known" : "fails in more than is known" }, cell.findings.map((i) => words.finding[i]).join(", ")) : null;
  const tag = (verdict) => node("span", { class: `tag ${words.verdict[verdict]}` }, words.verdict[verdict]);

  // --- filters ---------------------------------------------------------------------------------

  const form = $("filters");
  const filter = { verdict: "", family: "", implementation: "", optimizer: "", quantity: "", text: "" };
  let place = null; // {shape, stage, family}: the heat cell that was chosen
  let limit = ROWS;
  for (const name of ["verdict", "family", "implementation", "optimizer", "quantity"]) {
    const present = new Set();
    for (const cell of cells) {
      if (name in cell) present.add(cell[name]);
      else for (const entry of cell.entries) present.add(entry[name]);
    }
    const select = form.elements[name];
    select.append(node("option", { value: "" }, "any"));
    if (name === "verdict") select.append(node("option", { value: "bad" }, "not pass"));
    if (name === "verdict" && cells.some(isKnown)) select.append(node("option", { value: "new" }, "new failures"));
    words[name].forEach((word, i) => present.has(i) && select.append(node("option", { value: i }, word)));
  }

  function relevant(cell) {
    const family = filter.family === "" ? null : +filter.family;
    const quantity = filter.quantity === "" ? null : +filter.quantity;
    return cell.entries.filter((entry) =>
      (family === null || entry.family === family) && (quantity === null || entry.quantity === quantity));
  }
  // A cell that errored or was refused as a whole has no entry; it stays under every family.
  function verdictOf(cell, entries) {
    if (!cell.entries.length || (filter.family === "" && filter.quantity === "")) return cell.verdict;
    return entries.reduce((worst, entry) => Math.min(worst, entry.verdict), SKIPPED);
  }
  function matching() {
    const text = filter.text.toLowerCase();
    const found = [];
    for (const cell of cells) {
      if (filter.implementation !== "" && cell.implementation !== +filter.implementation) continue;
      if (filter.optimizer !== "" && cell.optimizer !== +filter.optimizer) continue;
      if (text && !cell.id.toLowerCase().includes(text)) continue;
      const entries = relevant(cell);
      if (cell.entries.length && !entries.length) continue;
      const verdict = verdictOf(cell, entries);
      if (filter.verdict === "new" ? !isBad(verdict) || isKnown(cell) : filter.verdict === "bad" ? verdict === PASS : filter.verdict !== "" && verdict !== +filter.verdict) continue;
      found.push({ cell, entries, verdict });
    }
    return found;
  }

  // --- heat maps -------------------------------------------------------------------------------

  function summed(found) {
    const maps = new Map();
    for (const { cell, entries, verdict } of found) {
      const byShape = maps.get(cell.stage) ?? maps.set(cell.stage, new Map()).get(cell.stage);
      const row = byShape.get(cell.shape) ?? byShape.set(cell.shape, new Map()).get(cell.shape);
      const all = entries.length ? entries : words.family.map((_, family) => ({ family, verdict, error: null, threshold: null, scale: null }));
      const seen = new Set();
      for (const entry of all) {
        const at = row.get(entry.family) ?? row.set(entry.family, { verdict: SKIPPED, used: 0, scale: null, cells: 0 }).get(entry.family);
        if (entry.verdict < at.verdict) at.verdict = entry.verdict;
        if (entry.verdict !== SKIPPED) at.used = Math.max(at.used, used(entry));
        if (entry.scale !== null && isBad(entry.verdict) && (at.scale === null || far(entry.scale) > far(at.scale))) at.scale = entry.scale;
        if (!seen.has(entry.family)) { seen.add(entry.family); at.cells += 1; }
      }
    }
    return maps;
  }
  const far = (scale) => scale > 0 ? Math.abs(Math.log(scale)) : Infinity;
  const WIDE = 84, HIGH = 26, LEFT = 118, TOP = 26;

  function heat(at, x, y, label) {
    const verdict = words.verdict[at.verdict];
    const share = Math.max(0, Math.min(1, 1 + Math.log10(Math.max(at.used, 1e-9)) / 4));
    const fill = verdict === "pass" ? `color-mix(in srgb, var(--pass-high) ${Math.round(100 * share)}%, var(--pass-low))`
      : verdict === "skipped" ? "url(#hatch)" : `var(--${verdict})`;
    const said = verdict === "pass" ? (at.used === 0 ? "0" : at.used < 0.001 ? "<0.1 %" : `${(100 * at.used).toFixed(at.used < 0.1 ? 1 : 0)} %`)
      : verdict === "fail" && at.scale !== null && Math.abs(at.scale - 1) >= 5e-4 ? `×${factor(at.scale)}`
      : verdict === "fail" && Number.isFinite(at.used) && at.used > 0 ? "differs" : verdict;
    const count = `${at.cells} cell${at.cells === 1 ? "" : "s"}`;
    const group = node("svg:g", { class: `heat ${isBad(at.verdict) ? "bad" : "good"}`, role: "button", tabindex: "-1",
      "aria-label": `${label}: ${verdict}, ${said}, ${count}`, "aria-pressed": "false", transform: `translate(${x},${y})` },
      node("svg:title", {}, `${label}\n${verdict}: ${said}\n${count}`),
      node("svg:rect", { width: WIDE - 3, height: HIGH - 3, rx: 3, fill }),
      node("svg:text", { x: (WIDE - 3) / 2, y: 16 }, said));
    return group;
  }
  function map(stage, shapes, families) {
    const width = LEFT + WIDE * families.length, height = TOP + HIGH * shapes.size;
    const svg = node("svg:svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group",
      "aria-label": `${words.stage[stage]}: arrow keys move, Enter shows the cells` });
    svg.append(node("svg:defs", {}, node("svg:pattern", { id: "hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
      node("svg:rect", { width: 6, height: 6, fill: "var(--raised)" }), node("svg:rect", { width: 2, height: 6, fill: "var(--line)" }))));
    families.forEach((family, column) => svg.append(node("svg:text", { class: "soft", x: LEFT + WIDE * column + WIDE / 2 - 2, y: 16, "text-anchor": "middle" }, words.family[family])));
    let line = 0;
    for (const shape of [...shapes.keys()].sort((a, b) => a - b)) {
      const y = TOP + HIGH * line++;
      svg.append(node("svg:text", { x: 0, y: y + 16 }, words.shape[shape]));
      families.forEach((family, column) => {
        const at = shapes.get(shape).get(family);
        if (!at) { svg.append(node("svg:text", { class: "soft", x: LEFT + WIDE * column + WIDE / 2 - 4, y: y + 16 }, "·")); return; }
        const made = heat(at, LEFT + WIDE * column, y, `${words.shape[shape]}, ${words.family[family]}`);
        Object.assign(made.dataset, { shape, stage, family, line: line - 1, column });
        svg.append(made);
      });
    }
    const first = svg.querySelector(".heat");
    if (first) first.setAttribute("tabindex", "0");
    return node("figure", {}, node("figcaption", {}, words.stage[stage]), svg);
  }
  function drawMaps(found) {
    const maps = summed(found);
    const families = words.family.map((_, i) => i).filter((i) => filter.family === "" || i === +filter.family)
      .filter((i) => [...maps.values()].some((shapes) => [...shapes.values()].some((row) => row.has(i))));
    const stages = [...maps.keys()].sort((a, b) => words.stage[b].startsWith("native") - words.stage[a].startsWith("native") || words.stage[a].localeCompare(words.stage[b]));
    $("maps").replaceChildren(...stages.map((stage) => map(stage, maps.get(stage), families)));
    if (!stages.length) $("maps").append(node("p", {}, "No cell matches."));
  }
  function legend() {
    const swatch = (fill, text) => node("span", {}, node("i", { style: `background:${fill}` }), text);
    $("legend").replaceChildren(
      swatch("linear-gradient(90deg, var(--pass-low), var(--pass-high))", "pass: share of the allowed error, the stronger the nearer"),
      swatch("var(--fail)", "fail: the scale farthest from 1"), swatch("var(--leak)", "leak of precision"),
      swatch("var(--error)", "error"), swatch("var(--skipped)", "skipped"));
  }
  $("maps").addEventListener("click", (event) => choose(event.target.closest(".heat")));
  $("maps").addEventListener("keydown", (event) => {
    const at = event.target.closest(".heat");
    if (!at) return;
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(at, true); return; }
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = at.parentNode.querySelector(`[data-line="${+at.dataset.line + step[0]}"][data-column="${+at.dataset.column + step[1]}"]`);
    if (!next) return;
    at.setAttribute("tabindex", "-1"); next.setAttribute("tabindex", "0"); next.focus();
  });
  function choose(heat, byKey = false) {
    if (!heat) return;
    const { shape, stage, family } = heat.dataset;
    const same = place && place.shape === +shape && place.stage === +stage && place.family === +family;
    place = same ? null : { shape: +shape, stage: +stage, family: +family };
    drawTable(matching());
    if (byKey && place) document.querySelector("#cells .id")?.focus();
    else if (place) $("cells-title").scrollIntoView({ block: "nearest" });
  }

  // --- the table -------------------------------------------------------------------------------

  function worstOf(entries) {
    let worst = null;
    for (const entry of entries) {
      if (!worst || entry.verdict < worst.verdict && isBad(entry.verdict) || entry.verdict === worst.verdict && !isBad(entry.verdict) && used(entry) > used(worst)
        || isBad(entry.verdict) && !isBad(worst.verdict)) worst = entry;
    }
    return worst;
  }
  function inPlace({ cell, entries }) {
    return cell.shape === place.shape && cell.stage === place.stage && (!cell.entries.length || entries.some((entry) => entry.family === place.family));
  }
  function drawTable(found) {
    for (const heat of document.querySelectorAll(".heat")) {
      const d = heat.dataset;
      heat.setAttribute("aria-pressed", String(!!place && +d.shape === place.shape && +d.stage === place.stage && +d.family === place.family));
    }
    const rows = place ? found.filter(inPlace) : found;
    $("chosen").hidden = !place;
    if (place) $("chosen").firstElementChild.textContent = `${words.shape[place.shape]}, ${words.stage[place.stage]}, ${words.family[place.family]}:`;
    $("shown").textContent = `${rows.length} of ${cells.length} cells`;
    const body = document.querySelector("#cells tbody");
    body.replaceChildren(...rows.slice(0, limit).map(line));
    $("more").hidden = rows.length <= limit;
    $("more").textContent = `Show ${Math.min(ROWS, rows.length - limit)} more of ${rows.length}`;
  }
  function line({ cell, entries, verdict }) {
    const shown = place ? entries.filter((entry) => entry.family === place.family) : entries;
    const worst = worstOf(shown);
    const finding = worst ? `${words.family[worst.family]} ${words.quantity[worst.quantity]}` : cell.reasons.map((i) => words.reason[i].split("\n")[0]).join("; ");
    const id = node("button", { class: "id", type: "button" }, cell.id);
    id.addEventListener("click", () => open(cell));
    return node("tr", {}, node("td", {}, tag(place && worst ? worst.verdict : verdict)), node("td", {}, id), node("td", {}, finding, cell.findings.length ? " " : null, known(cell)),
      node("td", { class: "n" }, worst ? plain(worst.scale) : "–"), node("td", { class: "n" }, worst ? small(worst.error) : "–"),
      node("td", { class: "n" }, worst ? small(worst.threshold) : "–"), node("td", {}, cell.causes.map((i) => words.cause[i]).join(", ")));
  }
  $("more").addEventListener("click", () => { limit += ROWS; drawTable(matching()); });
  $("chosen").querySelector("button").addEventListener("click", () => { place = null; drawTable(matching()); });

  // --- one cell --------------------------------------------------------------------------------

  function open(cell) {
    const settings = [["shape", words.shape[cell.shape]], ["implementation", words.implementation[cell.implementation]], ["engine", words.stage[cell.stage]],
      ["optimizer", words.optimizer[cell.optimizer]], ["dtype", words.dtype[cell.dtype]], ...Object.entries(cell.settings), ["seconds", cell.seconds]]
      .filter(([, value]) => value !== null);
    const body = $("cell-body");
    body.replaceChildren(
      node("h2", { id: "cell-title" }, tag(cell.verdict), " ", node("code", {}, cell.id), cell.findings.length ? " " : null, known(cell)),
      node("p", {}, settings.map(([key, value]) => `${key} ${value}`).join(" · ")));
    if (cell.causes.length) body.append(node("p", { class: "causes" }, "Causes that fit: ", node("b", {}, cell.causes.map((i) => words.cause[i]).join(", "))));
    for (const reason of cell.reasons) body.append(node("pre", { class: "reason" }, words.reason[reason]));
    body.append(rerun(cell.rerun));
    if (cell.bad.length) body.append(node("h3", {}, `Failing rows${cell.badCount > cell.bad.length ? ` (${cell.bad.length} of ${cell.badCount}, all in results.jsonl)` : ""}`));
    for (const bad of cell.bad) body.append(failing(bad, cell));
    if (cell.entries.length) body.append(node("h3", {}, "All metrics, the worst row of each"), metrics(cell));
    history.replaceState(null, "", `#cell=${encodeURIComponent(cell.id)}`);
    $("cell").showModal();
    $("cell").scrollTop = 0;
  }
  function rerun(command) {
    const button = node("button", { type: "button" }, "Copy");
    button.addEventListener("click", async () => {
      try { await navigator.clipboard.writeText(command); button.textContent = "Copied"; }
      catch { getSelection().selectAllChildren(button.previousElementSibling); button.textContent = "Selected"; }
    });
    return node("div", {}, node("h3", {}, "Run just this cell again"), node("div", { class: "rerun" }, node("pre", {}, command), button));
  }
  function failing(bad, cell) {
    const made = node("article", {}, node("p", {}, tag(words.verdict.indexOf(bad.verdict)), " ", bad.what));
    const pictures = node("div", { class: "pictures" });
    if (bad.expert_scales) pictures.append(bars(`scale of each expert, ${bad.tensor}`, bad.expert_scales, "scale"));
    if (bad.expert_errors) pictures.append(bars(`error of each expert, ${bad.tensor}`, bad.expert_errors, "error"));
    if (bad.classes) pictures.append(ranks(bad, cell.settings.world));
    if (pictures.children.length) made.append(pictures);
    if (bad.trace) made.append(node("pre", { class: "trace" }, bad.trace));
    return made;
  }
  // One bar an expert: scales around 1 on a log axis, errors from 1e-9 up on a log axis.
  function bars(title, values, kind) {
    const wide = Math.max(16, Math.min(34, 420 / values.length)), high = 84, width = wide * values.length + 8;
    const scales = values.filter((v) => v !== null && v > 0).map((v) => Math.abs(Math.log2(v)));
    const reach = Math.max(1, ...scales);
    const svg = node("svg:svg", { width, height: high + 34, viewBox: `0 0 ${width} ${high + 34}`, role: "img",
      "aria-label": `${title}: ${values.map((v, i) => `${i} ${v === null ? "no gradient" : kind === "scale" ? factor(v) : small(v)}`).join(", ")}` });
    const middle = kind === "scale" ? high / 2 + 8 : high + 8;
    values.forEach((value, i) => {
      let size = 0;
      if (value !== null && kind === "scale") size = value > 0 ? Math.log2(value) / reach * (high / 2 - 10) : -(high / 2 - 10);
      if (value !== null && kind === "error") size = value > 0 ? Math.max(0, Math.min(1, 1 + Math.log10(value) / 9)) * (high - 16) : 0;
      const isFar = value !== null && (kind === "scale" ? Math.abs(value - 1) > 1e-3 : value > 1e-3);
      const bar = node("svg:rect", { x: 4 + wide * i + 2, y: Math.min(middle, middle - size), width: wide - 4, height: Math.max(1, Math.abs(size)), fill: isFar ? "var(--fail)" : "var(--pass-high)" });
      bar.append(node("svg:title", {}, `expert ${i}: ${value ?? "no gradient"}`));
      svg.append(bar);
      const text = value === null ? "–" : kind === "scale" ? (value > 0 && Math.abs(value) < 100 ? value.toFixed(wide > 26 ? 2 : 1) : small(value)) : "";
      if (text) svg.append(node("svg:text", { class: "soft", x: 4 + wide * i + wide / 2, y: size >= 0 ? middle - size - 3 : middle - size + 12, "text-anchor": "middle", style: "font-size:10px" }, text));
      svg.append(node("svg:text", { class: "soft", x: 4 + wide * i + wide / 2, y: high + 26, "text-anchor": "middle" }, String(i)));
    });
    svg.append(node("svg:line", { class: "axis", x1: 0, x2: width, y1: middle, y2: middle }));
    return node("figure", {}, node("figcaption", {}, title), svg);
  }
  // One box a rank; ranks that agree bit for bit share a letter and a colour.
  function ranks(bad, world) {
    const letterOf = new Map();
    bad.classes.forEach((group, number) => group.forEach((rank) => letterOf.set(rank, number)));
    const count = Math.max(world ?? 0, ...letterOf.keys()) + (letterOf.size && Math.max(...letterOf.keys()) >= (world ?? 0) ? 1 : 0);
    const tints = ["var(--pass-low)", "var(--fail)", "var(--leak)", "var(--error)", "var(--skipped)"];
    const width = 44 * Math.min(count, 8), height = 44 * Math.ceil(count / 8);
    const svg = node("svg:svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img",
      "aria-label": `replicas: ${bad.classes.map((group, i) => `${letter(i)}: ranks ${group.join(" ")}`).join("; ")}` });
    for (let rank = 0; rank < count; rank += 1) {
      const x = 44 * (rank % 8), y = 44 * Math.floor(rank / 8), number = letterOf.get(rank);
      svg.append(node("svg:rect", { x, y, width: 40, height: 40, rx: 4, fill: number === undefined ? "var(--raised)" : tints[number % tints.length] }),
        node("svg:text", { x: x + 20, y: y + 17, "text-anchor": "middle", style: ink(number) }, String(rank)),
        node("svg:text", { x: x + 20, y: y + 32, "text-anchor": "middle", style: ink(number) }, number === undefined ? "" : letter(number)));
    }
    return node("figure", {}, node("figcaption", {}, `ranks that agree, ${bad.tensor ?? ""}${bad.distance ? `, distance ${small(bad.distance)}` : ""}`), svg);
  }
  const ink = (number) => number === undefined ? "" : number % 5 ? "fill:var(--on)" : "fill:var(--pass-ink)";
  const letter = (number) => String.fromCharCode(65 + number % 26);
  function metrics(cell) {
    const head = ["quantity", "family", "run", "against", "scale", "ratio", "error", "allowed", "residual", "tensor", "step", "worst at", "rows", "verdict"];
    const numeric = new Set(["scale", "ratio", "error", "allowed", "residual", "step", "rows"]);
    const lines = cell.entries.map((entry) => {
      const [rank, expert, row] = entry.worst;
      const where = [["rank", rank], ["expert", expert], ["row", row]].filter(([, v]) => v !== null && v !== undefined).map((pair) => pair.join(" ")).join(" ");
      const shown = [words.quantity[entry.quantity], words.family[entry.family], words.run[entry.run], words.against[entry.against] ?? "–", plain(entry.scale), plain(entry.ratio),
        small(entry.error), small(entry.threshold), small(entry.residual), words.tensor[entry.tensor] ?? "–", String(entry.step ?? "–"), where || "–", String(entry.count)];
      return node("tr", {}, ...shown.map((text, i) => node("td", { class: numeric.has(head[i]) ? "n" : "" }, text)), node("td", {}, tag(entry.verdict)));
    });
    return node("div", { class: "scroll" }, node("table", {}, node("thead", {}, node("tr", {}, ...head.map((text) => node("th", { class: numeric.has(text) ? "n" : "" }, text)))), node("tbody", {}, ...lines)));
  }
  $("cell").addEventListener("close", () => history.replaceState(null, "", location.pathname + location.search));
  $("cell").addEventListener("click", (event) => { if (event.target === $("cell")) $("cell").close(); });

  // --- together --------------------------------------------------------------------------------

  function draw() {
    const found = matching();
    drawMaps(found);
    drawTable(found);
  }
  function read() {
    const before = JSON.stringify(filter);
    for (const name of Object.keys(filter)) filter[name] = form.elements[name].value;
    if (JSON.stringify(filter) === before) return;
    place = null; limit = ROWS; draw();
  }
  form.addEventListener("input", read);
  form.addEventListener("change", read);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(read));
  legend();
  draw();
  const wanted = decodeURIComponent(location.hash.replace(/^#cell=/, ""));
  const linked = location.hash.startsWith("#cell=") && cells.find((cell) => cell.id === wanted);
  if (linked) open(linked);
  document.documentElement.dataset.ready = "true";
})();
