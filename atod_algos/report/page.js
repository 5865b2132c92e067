// The page: its data, the overview around the charts, the address, the theme.
// All text of runs goes through textContent: nothing that an environment or a policy wrote is ever parsed as markup.
const $ = id => document.getElementById(id);
const num = (x, n = 2) => x === null || x === undefined ? "–" : x.toFixed(n);
const pct = x => (100 * x).toFixed(1) + " %";
const DASHES = ["", "7 3", "2 2", "8 3 2 3", "12 3", "4 4", "1 3"];
const colour = i => `var(--s${i % 7})`, dash = i => DASHES[(i + Math.floor(i / 7)) % 7];
let D, shown = [], chosen = null, other = null, chosenTurn = null;

function el(tag, text, cls) {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  if (cls) e.className = cls;
  return e;
}
function svg(tag, attributes = {}, text) {
  const e = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const k in attributes) e.setAttribute(k, attributes[k]);
  if (text !== undefined) e.textContent = text;
  return e;
}
// What a reader set is kept for the next page; where the browser keeps nothing, it is not.
function remembered(name) { try { return localStorage.getItem("atod-report-" + name); } catch { return null; } }
function remember(name, value) { try { localStorage.setItem("atod-report-" + name, value); } catch { /* not kept */ } }

async function load() {
  const bytes = Uint8Array.from(atob($("data").textContent), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  D = await new Response(stream).json();
  $("title").textContent = D.title; $("subtitle").textContent = D.subtitle;
  new ResizeObserver(() => document.body.style.setProperty("--head", document.querySelector("header").offsetHeight + "px"))
    .observe(document.querySelector("header"));
  theme(); overview(); filters(); fromHash(); follow();
  window.addEventListener("hashchange", fromHash);
  document.body.dataset.ready = "1";
}

// --- light and dark ---------------------------------------------------------------------------------------------------
function theme() {
  const root = document.documentElement, system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
  const say = () => { $("theme").textContent = dark() ? "Light" : "Dark"; };
  const kept = remembered("theme");
  if (kept === "dark" || kept === "light") root.dataset.theme = kept;
  $("theme").addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    remember("theme", root.dataset.theme); say();
  });
  system.addEventListener("change", say); say();
}

// --- overview ---------------------------------------------------------------------------------------------------------
function overview() {
  const page = $("overview");
  page.append(el("h2", "Result"));
  const results = el("div", undefined, "results");
  for (const run of D.runs) {
    const box = el("div");
    if (D.runs.length > 1) box.append(el("h3", run.name));
    box.append(run.table ? resultTable(run) : el("p", `No final table yet: the run has ${run.done} of ${run.steps} steps.`, "soft"));
    if (run.table && run.panel) box.append(el("p", run.panel, "soft"));
    results.append(box);
  }
  page.append(results);
  if (D.runs.some(r => r.done)) {
    page.append(el("h2", "Curves"), tools());
    const grid = el("div", undefined, "curves"); grid.id = "curves"; page.append(grid);
    const weights = el("section"); weights.id = "weights"; page.append(weights);
    drawCurves(); drawWeights();
  }
  const settings = el("section", undefined, "settings");
  settings.append(el("h2", "Settings"));
  for (const run of D.runs) {
    const d = el("details");
    d.append(el("summary", run.name), el("div", run.settings, "mono")); settings.append(d);
  }
  page.append(settings);
}
function resultTable(run) {
  const t = el("table"), names = Object.keys(run.table), head = el("tr"), thead = el("thead");
  head.append(el("th", "")); names.forEach(n => head.append(el("th", n))); thead.append(head); t.append(thead);
  const line = (label, f) => {
    const r = el("tr"); r.append(el("th", label)); names.forEach(n => r.append(el("td", f(run.table[n])))); t.append(r);
  };
  line("success", s => pct(s.success));
  line("95 % interval", s => (100 * s.low).toFixed(1) + " – " + (100 * s.high).toFixed(1));
  line("turns", s => num(s.length, 1));
  const labels = [...new Set(names.flatMap(n => Object.keys(run.table[n].by_label)))].sort();
  labels.forEach(l => line(l, s => s.by_label[l] ? Math.round(100 * s.by_label[l].success) + " % of " + s.by_label[l].n : "–"));
  return t;
}

// --- address and live page --------------------------------------------------------------------------------------------
// #overview, #episodes/N or #episodes/N/M (two episodes side by side), and #step/RUN/KIND/STEP, which a curve links to.
function hash() {
  const parts = [$("episodes").hidden ? "overview" : "episodes"];
  if (chosen) parts.push(D.episodes.indexOf(chosen), other ? D.episodes.indexOf(other) : "");
  history.replaceState(null, "", "#" + parts.join("/"));
}
function fromHash() {
  const [name, a, b, c] = location.hash.slice(1).split("/");
  if (name === "step") { openStep(+a, b, +c); return; }
  if (a && D.episodes[+a]) {
    chosen = D.episodes[+a]; other = b ? D.episodes[+b] || null : null; detail(); draw();
  }
  tab(name === "episodes" ? name : "overview");
}
function follow() {
  if (!D.live) return;
  $("live").textContent = "following the run";
  setInterval(async () => {
    try {
      const r = await fetch("stamp", {cache: "no-store"});
      if (r.ok && (await r.text()).trim() !== D.stamp) location.reload();
    } catch {
      if (location.protocol === "file:") location.reload(); else $("live").textContent = "the server has stopped";
    }
  }, D.live * 1000);
}
