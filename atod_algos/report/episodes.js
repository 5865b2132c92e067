// Episodes and turns: filters, the list, and one episode or two side by side.
const ROW = 48;
const known = x => x !== null && x !== undefined;
const place = e => (D.runs.length > 1 ? D.runs[e.r].name + " · " : "") + e.z;

// --- filters and the list ---------------------------------------------------------------------------------------------
function option(select, value, text) { const o = el("option", text); o.value = value; select.append(o); }
function filters() {
  option($("f-run"), "", "all runs");
  D.runs.forEach((r, i) => option($("f-run"), i, r.name));
  $("f-run").hidden = D.runs.length < 2;
  option($("f-step"), "", "all steps");
  const steps = new Map();
  D.episodes.forEach(e => steps.set(e.k + e.z, e));
  [...steps.values()].sort((a, b) => a.k === b.k ? a.s - b.s : a.k < b.k ? 1 : -1)
    .forEach(e => option($("f-step"), e.k + e.z, e.z));
  option($("f-kind"), "", "all kinds");
  [...new Set(D.episodes.map(e => e.l))].sort().forEach(l => option($("f-kind"), l, l));
  for (const id of ["f-mode", "f-run", "f-step", "f-kind", "f-outcome", "f-sort"]) $(id).addEventListener("change", apply);
  let wait;
  $("f-task").addEventListener("input", () => { clearTimeout(wait); wait = setTimeout(apply, 120); });
  $("list").addEventListener("scroll", () => requestAnimationFrame(draw));
  $("list").addEventListener("keydown", e => {
    const by = {ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10}[e.key];
    if (!by || !shown.length) return;
    e.preventDefault();
    const at = shown.findIndex(s => s.e === chosen && (s.t === undefined || s.t === chosenTurn));
    const to = Math.max(0, Math.min(shown.length - 1, at + by));
    pick(shown[to]); keep(to);
  });
  new ResizeObserver(draw).observe($("list"));
  for (const name of ["overview", "episodes"]) $("tab-" + name).addEventListener("click", () => { tab(name); hash(); });
  apply();
}
function tab(name) {
  for (const n of ["overview", "episodes"]) { $(n).hidden = n !== name; $("tab-" + n).setAttribute("aria-selected", n === name); }
  if (name === "episodes") draw();
}
// The episodes of a step, from a point of a curve.
function openStep(run, kind, step) {
  const first = D.episodes.find(e => e.r === run && e.k === kind && e.s === step);
  if (!first) { tab("overview"); return; }
  for (const id of ["f-kind", "f-outcome", "f-task", "f-sort"]) $(id).value = "";
  $("f-run").value = run; $("f-step").value = kind + first.z; $("f-mode").value = "e";
  tab("episodes"); apply(); pick(shown[0]);
}
function apply() {
  const run = $("f-run").value, step = $("f-step").value, kind = $("f-kind").value, outcome = $("f-outcome").value;
  const words = $("f-task").value.toLowerCase(), turns = $("f-mode").value === "t", sort = $("f-sort").value;
  const fits = D.episodes.filter(e => (run === "" || e.r === +run) && (step === "" || e.k + e.z === step)
    && (kind === "" || e.l === kind) && (outcome === "" || e.ok === +outcome));
  const has = text => text.toLowerCase().includes(words);
  const value = t => sort === "g" ? -(t.m ?? 0) : t[sort] ?? -1e9;
  if (turns) {
    shown = fits.flatMap(e => e.turns.map((t, i) => ({e, t: i, v: value(t)})))
      .filter(s => !words || has(s.e.i) || has(s.e.t) || has(s.e.turns[s.t].c));
  } else {
    shown = fits.filter(e => !words || has(e.i) || has(e.t) || e.turns.some(t => has(t.c)))
      .map(e => ({e, v: sort ? Math.max(...e.turns.map(value)) : 0}));
  }
  if (sort) shown.sort((a, b) => b.v - a.v);
  const left = D.left_out ? " (" + D.left_out + ")" : "";
  $("count").textContent = shown.length.toLocaleString("en") + (turns ? " turns" : " episodes") + left;
  $("list").scrollTop = 0; draw();
  if (!shown.some(s => s.e === chosen) && shown.length) pick(shown[0], true);
}
// Only the rows in sight are in the page.
function draw() {
  const list = $("list"), spacer = $("spacer"), rows = [];
  spacer.style.height = shown.length * ROW + "px";
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4);
  const last = Math.min(shown.length, first + Math.ceil(list.clientHeight / ROW) + 8);
  for (let i = first; i < last; i++) {
    const s = shown[i], e = s.e, row = el("div", undefined, "row");
    row.style.top = i * ROW + "px"; row.setAttribute("role", "option");
    const on = e === chosen && (s.t === undefined || s.t === chosenTurn);
    row.setAttribute("aria-selected", on);
    if (on) row.classList.add("on");
    if (s.t === undefined) {
      row.append(mark(e), el("div", place(e) + " · " + e.turns.length + " turns · " + e.l, "soft"));
      row.firstChild.append(" " + e.i);
    } else {
      const t = e.turns[s.t];
      row.append(el("div", "w " + num(t.w) + "  d " + num(t.d) + "  h " + num(t.h) + "  " + t.c, "mono"));
      row.append(el("div", `turn ${s.t + 1} of ${e.turns.length} · ${e.ok ? "solved" : "not solved"} · ${place(e)}`, "soft"));
    }
    row.addEventListener("click", () => pick(s)); rows.push(row);
  }
  if (!shown.length) rows.push(el("div", "Nothing fits these filters.", "empty"));
  spacer.replaceChildren(...rows);
}
function keep(i) {
  const list = $("list");
  if (i * ROW < list.scrollTop) list.scrollTop = i * ROW;
  else if ((i + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (i + 1) * ROW - list.clientHeight;
  draw();
}
function mark(e) { const d = el("div"); d.append(el("span", e.ok ? "✓" : "✗", e.ok ? "good" : "bad")); return d; }

// --- one episode, or two side by side ---------------------------------------------------------------------------------
function pick(s, quiet) {
  chosen = s.e; chosenTurn = s.t ?? null; other = null;
  detail(); draw();
  if (!quiet) hash();
}
function detail() {
  const box = $("detail");
  box.replaceChildren();
  if (!chosen) return;
  box.append(episode(chosen, true));
  if (other) box.append(episode(other, false));
  const on = box.querySelector(".turn.on");
  if (on) on.scrollIntoView({block: "center"}); else box.scrollTop = 0;
}
function episode(e, first) {
  const box = el("div", undefined, "episode"), head = el("div", undefined, "head"), title = mark(e);
  title.append(" ", el("b", e.i)); head.append(title);
  const outcome = e.ok ? "solved" : "not solved: " + e.stop.replace("_", " ");
  head.append(el("div", `${place(e)} · ${outcome} · score ${num(e.sc)} · ${e.turns.length} turns`, "soft"));
  head.append(el("div", e.l + " · task " + e.t, "soft mono"));
  if (e.n) {
    const weighed = e.q ? `; every token gets κ w_k Δ + ρ A with κ = ${num(e.q[0])}, ρ = ${num(e.q[1])}` : "";
    const alike = e.n[0] === 0 || e.n[0] === e.n[1] ? "; all alike, so reward says nothing here (A = 0)" : "";
    head.append(el("div", `group: ${e.n[0]} of ${e.n[1]} attempts solved it` + weighed + alike, "soft"));
  }
  if (first) head.append(comparer(e), key(e));
  box.append(head);
  e.turns.forEach((t, i) => box.append(turn(e, t, i, first)));
  const end = el("div", undefined, "final soft");
  end.append(el("b", "in the end: "), el("pre", e.f)); box.append(end);
  return box;
}
function comparer(e) {
  const line = el("div", undefined, "compare"), same = D.episodes.filter(x => x.t === e.t && x !== e);
  if (!same.length) { line.append(el("span", "no other episode of this task is in the report", "soft")); return line; }
  const select = el("select");
  select.id = "f-compare"; select.setAttribute("aria-label", "another episode of this task");
  option(select, "", `compare with one of ${same.length} other episodes of this task ...`);
  same.forEach((x, i) => option(select, i, `${place(x)}: ${x.ok ? "solved" : "not solved"}, ${x.turns.length} turns`));
  if (other) select.value = same.indexOf(other);
  select.addEventListener("change", () => { other = select.value === "" ? null : same[+select.value]; detail(); hash(); });
  line.append(select); return line;
}
function key(e) {
  const k = el("div", undefined, "key soft");
  if (!e.turns.some(t => t.x.length && known(t.x[0][2]))) { k.append("no teacher scores for these tokens"); return k; }
  k.append("each token: ");
  const said = [[-3, "teacher finds it far less likely than the student"], [-.8, "less"], [0, "alike"], [.8, "more"], [3, "far more"]];
  for (const [gap, text] of said) { const s = el("span", text); shade(s, gap); k.append(s); }
  return k;
}
function shade(span, gap) {
  const a = (Math.min(1, Math.abs(gap) / 2) * .75).toFixed(2);
  if (a < .03) return;
  span.style.background = gap < 0 ? `rgba(213,94,0,${a})` : `rgba(0,114,178,${a})`;
  if (Math.abs(gap) > .05) span.classList.add(gap < 0 ? "less" : "more");
}
function turn(e, t, i, first) {
  const box = el("div", undefined, "turn"), bar = el("div", undefined, "bar");
  if (first && chosenTurn === i) box.classList.add("on");
  if (known(t.w)) box.style.borderLeftColor = `rgba(122,75,148,${(.12 + .88 * Math.min(1, t.w)).toFixed(2)})`;
  bar.append(el("b", "turn " + (i + 1)), el("span", t.v ? "valid" : "not understood", t.v ? "good" : "bad"));
  if (!t.f) bar.append(el("span", "wrong form", "bad"));
  if (known(t.d)) bar.append(el("span", "d " + num(t.d, 3)));
  if (known(t.h)) bar.append(el("span", "h " + num(t.h, 3)));
  if (known(t.w)) {
    const w = el("span"), meter = el("span", undefined, "meter"), filled = el("i");
    filled.style.width = Math.min(100, 100 * t.w) + "%"; meter.append(filled);
    w.append(el("span", "w " + num(t.w) + " ", "weight"), meter); bar.append(w);
  }
  box.append(bar, el("pre", t.o, "obs"));
  const r = el("pre", undefined, "response");
  for (const [text, student, teacher] of t.x) {
    const span = el("span", text), gap = known(teacher) ? teacher - student : 0;
    shade(span, gap);
    span.title = `log-prob: student ${num(student)}` + (known(teacher) ? `, teacher ${num(teacher)}, gap ${num(gap)}` : "");
    r.append(span);
  }
  if (!t.x.length) r.textContent = t.p;
  box.append(r);
  const act = el("div");
  act.append(el("span", "action: ", "soft"), el("span", t.c, "mono")); box.append(act);
  const why = reason(e, t);
  if (why) box.append(el("p", why, "why"));
  if (t.a.length) {
    const d = el("details");
    d.append(el("summary", t.a.length + " admissible actions"), el("div", t.a.join(", "), "mono")); box.append(d);
  }
  return box;
}
// Where a weight comes from, in one line.
function reason(e, t) {
  if (!known(t.w) || !known(t.d)) return "";
  const scale = k => {
    const v = e.turns.map(x => x[k]).filter(known), lo = Math.min(...v), hi = Math.max(...v);
    return hi - lo < 1e-8 ? .5 : (t[k] - lo) / (hi - lo);
  };
  const d = scale("d"), h = scale("h"), w = 1 - (1 - d) * (1 - h), sum = `1 − (1 − ${num(d)})(1 − ${num(h)})`;
  if (Math.abs(w - t.w) > .02) return `weight ${num(t.w)} as trained with; eqs 15, 16 would give ${sum} = ${num(w)}`;
  const said = d > .66 && h > .66 ? "teacher and student disagree, and the student is unsure"
    : d > .66 ? "teacher and student disagree more than in most turns of this episode"
    : h > .66 ? "the student is more unsure than in most turns of this episode"
    : w < .25 ? "routine: they agree and the student is sure, so the teacher says little" : "in between";
  return `w = ${sum}: ${said}`;
}
load().catch(error => { document.body.append(el("p", "This page could not be opened: " + error, "bad")); });
