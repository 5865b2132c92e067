// Charts: curves by training step, the distribution of the turn weights, and d, h, w by turn index.
const W = 360, H = 208, LEFT = 50, TOP = 8, BOTTOM = 38;
const WINDOWS = [1, 3, 5, 9, 15, 25, 51];
let smoothing = 3;
const hidden = new Set();

// --- what the reader sets ---------------------------------------------------------------------------------------------
function tools() {
  const box = el("div", undefined, "tools"), label = el("label", "smoothing"), slider = el("input"), said = el("output");
  const kept = remembered("smoothing");
  if (kept !== null && WINDOWS[+kept]) smoothing = +kept;
  Object.assign(slider, {type: "range", id: "smoothing", min: 0, max: WINDOWS.length - 1, value: smoothing});
  const say = () => { said.textContent = smoothing ? `mean of ${WINDOWS[smoothing]} steps` : "off"; };
  slider.addEventListener("input", () => { smoothing = +slider.value; remember("smoothing", smoothing); say(); drawCurves(); });
  label.title = "training curves: thin as measured, thick smoothed; validations are never smoothed";
  label.append(slider, said); say(); box.append(label);
  if (D.runs.length > 1) box.append(legend());
  return box;
}
function legend() {
  const box = el("div", undefined, "legend");
  D.runs.forEach((run, i) => {
    const item = el("button");
    item.setAttribute("aria-pressed", "true"); item.title = "show or hide this run"; item.append(swatch(i), run.name);
    item.addEventListener("click", () => {
      if (!hidden.delete(i)) hidden.add(i);
      item.setAttribute("aria-pressed", !hidden.has(i)); drawCurves(); drawWeights();
    });
    box.append(item);
  });
  return box;
}
function swatch(i, width = 30, j = i) {
  const s = svg("svg", {width, height: 10});
  s.append(svg("line", {x1: 0, x2: width, y1: 5, y2: 5, "stroke-width": 2.5, style: `stroke: ${colour(i)}`, "stroke-dasharray": dash(j)}));
  return s;
}

// --- curves by step ---------------------------------------------------------------------------------------------------
function drawCurves() {
  const made = D.panels.map(panel => {
    const lines = linesOf(panel), keys = [...new Set(lines.map(l => l.key))];
    if (!lines.length) return null;
    return chart({title: panel.title, unit: panel.unit, axis: "training step", lines, zero: panel.zero, note: panel.note,
      window: panel.smooth ? WINDOWS[smoothing] : 1, keys: keys.length > 1 ? keys.filter(Boolean) : [], linked: true});
  });
  $("curves").replaceChildren(...made.filter(Boolean));
}
// Several metrics of a panel, or the environments of a run that has several, differ in dash; runs differ in colour.
function linesOf(panel) {
  const lines = [], percent = panel.unit.endsWith("%"), several = panel.keys.length > 1, alone = D.runs.length === 1;
  D.runs.forEach((run, i) => {
    if (hidden.has(i)) return;
    const parts = several ? panel.keys.map((key, j) => [key, panel.names[j]])
      : [[panel.keys[0], run.worlds.length ? "all environments" : ""], ...run.worlds.map(world => [world + ":" + panel.keys[0], world])];
    parts.forEach(([key, name], j) => {
      const s = run.series[key]; if (!s || !s[0].length) return;
      const line = {x: s[0], y: percent ? s[1].map(v => 100 * v) : s[1], run: i, key: name, kind: panel.keys[0] === "val" ? "valid" : "train"};
      line.name = [alone ? "" : run.name, name].filter(Boolean).join(": ") || panel.title;
      lines.push({...line, i: alone ? j : i, j: parts.length > 1 ? j : i});
    });
  });
  return lines;
}
function running(y, n) {
  const half = n >> 1;
  return y.map((_, i) => {
    const part = y.slice(Math.max(0, i - half), i + half + 1);
    return part.reduce((a, b) => a + b, 0) / part.length;
  });
}
function stepOf(a, b, n, whole) {
  const raw = (b - a) / n, p = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 5, 10].map(m => m * p).find(m => m >= raw * .99);
  return whole ? Math.max(1, Math.round(step)) : step;
}
function nice(a, b, n, whole) {
  const step = stepOf(a, b, n, whole), out = [];
  for (let k = Math.ceil(a / step - 1e-9); k * step <= b + step * 1e-9; k++) out.push(+(k * step).toPrecision(10));
  return out;
}

// A frame with axes. c: title, unit (of y), axis (of x), x and y (each a range), right (range and name of a second y).
function frame(c) {
  const box = el("div", undefined, "curve"), right = c.right ? 44 : 12;
  const [x0, x1] = c.x, [y0, y1] = c.y, R = W - right, B = H - BOTTOM;
  const X = v => LEFT + (v - x0) / (x1 - x0) * (R - LEFT), Y = v => B - (v - y0) / (y1 - y0) * (B - TOP);
  const s = svg("svg", {viewBox: `0 0 ${W} ${H}`, role: "figure", "aria-label": `${c.title}: ${c.unit} by ${c.axis}`});
  const text = (x, y, words, more) => s.append(svg("text", {x, y, ...more}, words));
  for (const v of nice(y0, y1, 4)) {
    s.append(svg("line", {x1: LEFT, x2: R, y1: Y(v), y2: Y(v), class: v ? "grid" : "base"}));
    text(LEFT - 5, Y(v) + 4, +v.toPrecision(4), {"text-anchor": "end"});
  }
  for (const v of nice(x0, x1, 6, true)) text(X(v), B + 14, v, {"text-anchor": "middle"});
  text((LEFT + R) / 2, H - 7, c.axis, {"text-anchor": "middle", class: "axis x"});
  const up = (x, words) => text(0, 0, words, {"text-anchor": "middle", class: "axis y", transform: `translate(${x} ${(TOP + B) / 2}) rotate(-90)`});
  up(11, c.unit);
  let Z = null;
  if (c.right) {
    Z = v => B - v / c.right.top * (B - TOP);
    for (const v of nice(0, c.right.top, 4, true)) text(R + 5, Z(v) + 4, v);
    up(W - 4, c.right.name);
  }
  box.append(el("h3", c.title), s);
  return {box, s, X, Y, Z, R, B};
}
const pathOf = (xs, ys, X, Y) => xs.map((v, i) => (i ? "L" : "M") + X(v).toFixed(1) + " " + Y(ys[i]).toFixed(1)).join("");

function chart(c) {
  const xs = c.lines.flatMap(l => l.x), ys = c.lines.flatMap(l => l.y);
  const x0 = Math.min(...xs), x1 = Math.max(...xs, x0 + 1);
  let y0 = Math.min(...ys, c.zero ? 0 : Infinity), y1 = Math.max(...ys);
  if (y1 - y0 < 1e-9) { if (!c.zero) y0 -= .5; y1 += .5; }
  // The axis ends at a number that is written at it.
  const step = stepOf(y0, y1, 4);
  y0 = Math.floor(y0 / step + 1e-9) * step; y1 = Math.ceil(y1 / step - 1e-9) * step;
  if (c.right) c.right.top = Math.max(...c.lines.flatMap(l => l.count));
  const f = frame({...c, x: [x0, x1], y: [y0, y1]});
  for (const l of c.lines) {
    const smooth = c.window > 1 && l.x.length > 3, style = `stroke: ${colour(l.i)}`, pattern = dash(l.j);
    l.drawn = smooth ? running(l.y, c.window) : l.y;
    if (smooth) f.s.append(svg("path", {d: pathOf(l.x, l.y, f.X, f.Y), class: "raw", fill: "none", style, "stroke-width": 1, opacity: .35}));
    f.s.append(svg("path", {d: pathOf(l.x, l.drawn, f.X, f.Y), class: "line", fill: "none", style, "stroke-width": 2, "stroke-dasharray": pattern}));
    if (c.right) f.s.append(svg("path", {d: pathOf(l.x, l.count, f.X, f.Z), fill: "none", style, "stroke-width": 1, "stroke-dasharray": "4 3", opacity: .8}));
    if (c.linked) f.s.append(...points(l, f));
    else if (l.x.length < 40) l.x.forEach((v, i) => f.s.append(svg("circle", {cx: f.X(v), cy: f.Y(l.drawn[i]), r: 2.2, style: `fill: ${colour(l.i)}`})));
  }
  hover(f, c);
  if (c.keys.length) {
    const line = el("p", undefined, "keys");
    c.keys.forEach((name, j) => { const item = el("span"); item.append(c.linked ? swatch(D.runs.length === 1 ? j : 4, 24, j) : swatch(j, 24, 0), name); line.append(item); });
    f.box.append(line);
  }
  if (c.note) f.box.append(el("p", c.note));
  return f.box;
}
// The steps whose episodes the page holds are points that lead to them.
function points(l, f) {
  return l.x.map((step, i) => {
    if (!steps(l.run, l.kind).includes(step)) return null;
    const a = svg("a", {href: `#step/${l.run}/${l.kind}/${step}`, tabindex: -1});
    a.append(svg("circle", {cx: f.X(step), cy: f.Y(l.drawn[i]), r: 3.2, style: `fill: ${colour(l.i)}`}), svg("title", {}, `step ${step}: its episodes`));
    return a;
  }).filter(Boolean);
}
const held = new Map();
function steps(run, kind) {
  const key = run + kind;
  if (!held.has(key)) held.set(key, [...new Set(D.episodes.filter(e => e.r === run && e.k === kind).map(e => e.s))].sort((a, b) => a - b));
  return held.get(key);
}
// The values under the pointer; a click opens the nearest step whose episodes are here.
function hover(f, c) {
  const cross = svg("line", {y1: TOP, y2: f.B, class: "cross", visibility: "hidden"}), tip = el("div", undefined, "tip");
  f.s.append(cross); tip.hidden = true; f.box.append(tip);
  const all = [...new Set(c.lines.flatMap(l => l.x))];
  const at = event => {
    const place = f.s.getBoundingClientRect(), x = (event.clientX - place.left) / place.width * W;
    return {x: all.reduce((a, b) => Math.abs(f.X(b) - x) < Math.abs(f.X(a) - x) ? b : a), y: (event.clientY - place.top) / place.height * H, place};
  };
  f.s.addEventListener("pointermove", event => {
    const {x, place} = at(event);
    tip.replaceChildren(el("b", `${c.linked ? "step" : c.axis} ${x}`));
    for (const l of c.lines) {
      const i = l.x.indexOf(x); if (i < 0) continue;
      const row = el("div"), mark = el("i"); mark.style.background = colour(l.i);
      row.append(mark, `${+l.y[i].toPrecision(4)}  ${l.name}` + (l.count ? `, ${l.count[i]} episodes` : "")); tip.append(row);
    }
    cross.setAttribute("x1", f.X(x)); cross.setAttribute("x2", f.X(x)); cross.setAttribute("visibility", "visible");
    tip.hidden = false;
    const across = f.X(x) / W * place.width;
    tip.style.top = "34px"; tip.style.left = across > place.width / 2 ? "" : across + 24 + "px";
    tip.style.right = across > place.width / 2 ? place.width - across + 24 + "px" : "";
  });
  f.s.addEventListener("pointerleave", () => { tip.hidden = true; cross.setAttribute("visibility", "hidden"); });
  if (!c.linked) return;
  f.s.addEventListener("click", event => {
    if (event.target.closest("a")) return;
    const {x, y} = at(event), near = (list, of) => list.reduce((a, b) => of(b) < of(a) ? b : a);
    const lines = c.lines.filter(l => steps(l.run, l.kind).length && l.x.includes(x)); if (!lines.length) return;
    const line = near(lines, l => Math.abs(f.Y(l.drawn[l.x.indexOf(x)]) - y));
    location.hash = `#step/${line.run}/${line.kind}/${near(steps(line.run, line.kind), s => Math.abs(s - x))}`;
  });
  f.s.style.cursor = c.lines.some(l => steps(l.run, l.kind).length) ? "pointer" : "";
}

// --- turn weights -----------------------------------------------------------------------------------------------------
function drawWeights() {
  const box = $("weights"), made = [];
  D.runs.forEach((run, i) => {
    if (hidden.has(i) || !(run.weights || run.by_turn)) return;
    const grid = el("div", undefined, "curves");
    if (run.weights) grid.append(distribution(run.weights, i));
    if (run.by_turn) grid.append(...["d", "h", "w"].map(k => byTurn(run.by_turn, k)));
    made.push(el("h3", D.runs.length > 1 ? run.name : ""), grid);
  });
  if (made.length) made.unshift(el("h2", "Turn weights"));
  box.replaceChildren(...made);
}
const QUANTITIES = {
  d: ["disagreement by turn", "d_k, nats a token"], h: ["uncertainty by turn", "h_k, nats a token"],
  w: ["weight by turn", "w_k"],
};
function byTurn(table, k) {
  const [title, unit] = QUANTITIES[k];
  const lines = table[k].map(([x, y, count], j) => ({x, y, count, i: j, j: 0, name: table.names[j]}));
  return chart({title, unit, axis: "turn", zero: true, window: 1, lines, right: {name: "episodes (dashed)"}, keys: table.names,
    note: "validation tasks" + (k === "w" ? "; nothing is trained there, so w_k is what T-DUR gives" : "")});
}
// Columns of training steps, rows of weights: the darker, the more turns.
function distribution(w, run) {
  const n = w.shares[0].length, gap = w.steps.length > 1 ? (w.steps.at(-1) - w.steps[0]) / (w.steps.length - 1) : 1;
  const f = frame({title: "share of turns by weight", unit: "w_k", axis: "training step", x: [w.steps[0] - gap / 2, w.steps.at(-1) + gap / 2], y: [0, w.top]});
  const most = Math.max(...w.shares.flat());
  w.shares.forEach((shares, i) => {
    const step = w.steps[i], from = i ? (w.steps[i - 1] + step) / 2 : step - gap / 2, to = i < w.steps.length - 1 ? (w.steps[i + 1] + step) / 2 : step + gap / 2;
    shares.forEach((share, b) => {
      const cell = svg("rect", {x: f.X(from), width: f.X(to) - f.X(from), y: f.Y((b + 1) / n * w.top), height: f.Y(0) - f.Y(w.top / n), class: "cell", "fill-opacity": (share / most).toFixed(3)});
      cell.append(svg("title", {}, `step ${step}: ${pct(share)} of the turns have w_k from ${num(b / n * w.top, 1)} to ${num((b + 1) / n * w.top, 1)}`)); f.s.append(cell);
    });
  });
  f.s.append(svg("path", {d: pathOf(w.steps, w.means, f.X, f.Y), fill: "none", style: "stroke: var(--ink)", "stroke-width": 2}));
  const key = el("p"); key.append(`line: mean; strongest colour: ${pct(most)} of a step's turns`); f.box.append(key);
  const here = steps(run, "train");
  if (here.length) {
    f.s.style.cursor = "pointer";
    f.s.addEventListener("click", event => {
      const place = f.s.getBoundingClientRect(), x = (event.clientX - place.left) / place.width * W;
      const step = here.reduce((a, b) => Math.abs(f.X(b) - x) < Math.abs(f.X(a) - x) ? b : a);
      location.hash = `#step/${run}/train/${step}`;
    });
  }
  return f.box;
}
