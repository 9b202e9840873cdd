"use strict";
// Draws a report from its data: headlines, figures by Plotly, tables. Names and texts go into text nodes; into Plotly's
// labels, which know some markup, with their brackets escaped. Figures are drawn when they come near the window.

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const PALETTE = {
    light: ["#0b62b0", "#c9550a", "#0a7d5c", "#8a3f9e", "#9a7400", "#2f87b3", "#b5305c", "#5b6470", "#5c771c", "#7a4b2a"],
    dark: ["#6db3ff", "#ff9d5c", "#4fd0a5", "#d39be8", "#e3c04b", "#8ad7f5", "#ff8bb0", "#aab4c0", "#b7d36a", "#d6a77f"],
  };
  const INK = {
    light: { ink: "#1b2430", faint: "#566273", grid: "#e6e9ee", surface: "#ffffff" },
    dark: { ink: "#e4e8ee", faint: "#9ca7b6", grid: "#2a313b", surface: "#1b2027" },
  };
  const hidden = {}; // figure -> names that are switched off
  const drawn = new Map(); // figure's key -> function that draws it again
  const system = matchMedia("(prefers-color-scheme: dark)");

  // --- what the address holds: choices that outlive a reload

  const state = new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");
  function remember(key, value) {
    if (value == null || value === "") state.delete(key);
    else state.set(key, value);
    history.replaceState(history.state, "", `#${state}`);
  }

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else if (value != null && value !== false) made.setAttribute(key, value === true ? "" : value);
    }
    made.append(...children.flat().filter((c) => c != null));
    return made;
  }

  // --- theme

  const theme = () => document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light");
  const colorOf = (number) => (number < 0 ? INK[theme()].faint : PALETTE[theme()][number % PALETTE.light.length]);

  function setTheme(name) {
    if (name) document.documentElement.dataset.theme = name;
    remember("theme", name);
    redraw();
  }

  function redraw() {
    drawHeadlines();
    for (const again of drawn.values()) again();
  }

  // --- figures

  const safe = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

  function plotlyTrace(trace, panel, figure) {
    const color = colorOf(trace.color ?? 0);
    const name = trace.name ?? "";
    const made = { name: safe(name), visible: !(hidden[figure.key]?.has(name)), showlegend: false, type: "scatter" };
    if (trace.second) made.yaxis = "y2";
    if (trace.kind === "band") {
      return {
        ...made, mode: "lines", x: [...trace.x, ...[...trace.x].reverse()], y: [...trace.high, ...[...trace.low].reverse()],
        fill: "toself", fillcolor: `${color}2e`, line: { width: 0, color }, hoverinfo: "skip",
      };
    }
    const words = [name, trace.hover].filter(Boolean).map(safe).join("<br>");
    made.hovertemplate = `${words}<br>${safe(panel.x)} %{x}<br>${safe(trace.second ? panel.second : panel.y)} %{y:.6g}<extra></extra>`;
    made.x = trace.x;
    made.y = trace.y;
    if (trace.kind === "bars") return { ...made, type: "bar", marker: { color } };
    if (trace.kind === "points") return { ...made, mode: "markers", marker: { color, size: 5, opacity: 0.55 } };
    const line = { color, width: trace.faint ? 1 : 2, dash: { dash: "dash", dot: "dot" }[trace.dash] ?? "solid" };
    if (trace.kind === "steps") return { ...made, mode: "lines", y: [...trace.y, trace.y.at(-1)], line: { ...line, shape: "hv" } };
    return { ...made, mode: trace.markers ? "lines+markers" : "lines", opacity: trace.faint ? 0.45 : 1, marker: { color, size: 6 }, line };
  }

  function plotlyLayout(panel) {
    const { ink, faint, grid, surface } = INK[theme()];
    const axis = { gridcolor: grid, linecolor: grid, zerolinecolor: grid, zeroline: false, tickfont: { color: faint, size: 11 }, automargin: true, exponentformat: "power" };
    const title = (text) => ({ text: safe(text), font: { size: 12, color: faint }, standoff: 6 });
    const layout = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest", bargap: 0.35,
      font: { family: "system-ui, sans-serif", color: ink, size: 12 }, margin: { l: 50, r: panel.second ? 50 : 12, t: panel.title ? 26 : 8, b: 38 },
      hoverlabel: { bgcolor: surface, bordercolor: faint, font: { color: ink, size: 12 }, align: "left" },
      xaxis: { ...axis, title: title(panel.x), type: panel.x_log ? "log" : undefined, nticks: panel.x_log ? 6 : 8 },
      yaxis: { ...axis, title: title(panel.y), type: panel.y_log ? "log" : undefined, nticks: panel.y_log ? 6 : 7 },
      barmode: panel.stacked ? "stack" : "group", dragmode: "zoom", shapes: [], annotations: [],
    };
    if (panel.title) layout.annotations.push({ text: safe(panel.title), x: 0, y: 1, xref: "paper", yref: "paper", xanchor: "left", yanchor: "bottom", yshift: 4, showarrow: false, font: { size: 12, color: ink } });
    if (panel.y_range) layout.yaxis.range = panel.y_range;
    if (panel.traces.some((t) => t.kind === "bars")) layout.xaxis.type = "category";
    if (panel.second) {
      const top = Math.max(...panel.traces.filter((t) => t.second).flatMap((t) => t.y), 1);
      layout.yaxis2 = { ...axis, title: title(panel.second), overlaying: "y", side: "right", showgrid: false, tickmode: "auto", nticks: 6, range: [0, top * 1.06] };
    }
    for (const mark of panel.marks ?? []) {
      const along = mark.axis === "x" ? { x0: mark.at, x1: mark.at, y0: 0, y1: 1, yref: "paper" } : { y0: mark.at, y1: mark.at, x0: 0, x1: 1, xref: "paper" };
      layout.shapes.push({ type: "line", ...along, line: { color: faint, width: 1, dash: "dot" } });
      if (mark.text) {
        const at = mark.axis === "x" ? { x: panel.x_log ? Math.log10(mark.at) : mark.at, y: 1, yref: "paper", yanchor: "top", xanchor: "left", xshift: 3 } : { y: mark.at, x: 1, xref: "paper", xanchor: "right", yanchor: "bottom" };
        layout.annotations.push({ text: safe(mark.text), ...at, showarrow: false, font: { size: 11, color: faint } });
      }
    }
    return layout;
  }

  function swatch(trace) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    made.setAttribute("width", "22");
    made.setAttribute("height", "10");
    const shape = document.createElementNS("http://www.w3.org/2000/svg", trace.kind === "points" ? "circle" : trace.kind === "bars" ? "rect" : "line");
    const place = trace.kind === "points" ? { cx: 11, cy: 5, r: 3.5 } : trace.kind === "bars" ? { x: 5, y: 0, width: 12, height: 10 } : { x1: 0, x2: 22, y1: 5, y2: 5 };
    const dash = { dash: "6 4", dot: "2 3" }[trace.dash];
    for (const [key, value] of Object.entries({ ...place, stroke: colorOf(trace.color ?? 0), fill: colorOf(trace.color ?? 0), "stroke-width": 2, ...(dash ? { "stroke-dasharray": dash } : {}) })) shape.setAttribute(key, value);
    made.append(shape);
    return made;
  }

  function legendOf(figure) {
    const first = new Map();
    for (const trace of figure.panels.flatMap((p) => p.traces)) {
      const known = first.get(trace.name ?? "");
      if (!known || (known.kind === "band" && trace.kind !== "band") || (known.faint && !trace.faint)) first.set(trace.name ?? "", trace);
    }
    if (first.size < 2) return null;
    return element("div", { class: "legend" }, [...first].map(([name, trace]) =>
      element("button", { type: "button", "aria-pressed": String(!(hidden[figure.key]?.has(name))), title: "show or hide", onclick: () => toggle(figure, name) }, swatch(trace), name)));
  }

  function toggle(figure, name) {
    const names = (hidden[figure.key] ??= new Set());
    if (!names.delete(name)) names.add(name);
    drawn.get(figure.key)();
  }

  const figures = [...data.story, ...data.paper];

  function card(figure) {
    const made = element("article", { class: `card${figure.wide ? " wide" : ""}${figure.missing ? " missing" : ""}`, id: `figure-${figure.key}` }, element("h3", {}, figure.title));
    if (figure.missing) {
      made.append(element("p", {}, figure.missing));
      return made;
    }
    const columns = figure.panels.length === 3 ? 3 : Math.min(figure.panels.length, 2);
    const legend = element("div", {});
    const plots = figure.panels.map((panel) => element("div", { class: "plot", role: "img", "aria-label": `${figure.title}: ${panel.y} against ${panel.x}` }));
    const panels = element("div", { class: "panels" }, plots);
    panels.style.setProperty("--columns", columns);
    made.append(legend, panels, element("p", {}, figure.caption ?? ""));
    const fill = () => legend.replaceChildren(...[legendOf(figure)].filter(Boolean));
    fill(); // at once, for its height; the plots when they come near
    made.draw = () => {
      fill();
      const again = () => Promise.all(plots.map((plot, i) =>
        Plotly.react(plot, figure.panels[i].traces.map((t) => plotlyTrace(t, figure.panels[i], figure)), plotlyLayout(figure.panels[i]), { displayModeBar: false, responsive: true })));
      drawn.set(figure.key, () => (fill(), again()));
      return again();
    };
    return made;
  }

  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        near.unobserve(entry.target);
        entry.target.draw();
      }
    }
  }, { rootMargin: "500px" });

  function drawAll() {
    return Promise.all([...document.querySelectorAll(".card:not(.missing)")].map((made) => (near.unobserve(made), drawn.has(made.id.replace("figure-", "")) ? null : made.draw())));
  }

  // --- words and tables

  function drawHeadlines() {
    const list = data.headlines.map((text, i) => {
      const dot = element("i");
      dot.style.background = data.headlines.length > 1 ? colorOf(i) : "transparent";
      const made = element("li", {}, dot, text);
      if (data.headlines.length === 1) made.style.paddingLeft = 0;
      return made;
    });
    if (data.warnings.length) list.push(element("li", { class: "unwell" }, `${data.warnings.length} ${data.warnings.length === 1 ? "warning" : "warnings"}: see the end of the page.`));
    document.getElementById("headlines").replaceChildren(...list);
  }

  const number = (value, digits = 3) => (value == null ? element("span", { class: "none" }, "not measured") : value.toLocaleString("en", { maximumFractionDigits: digits }));

  function table(columns, rows) {
    const kind = (c) => [c.words && "words", c.long && "long"].filter(Boolean).join(" ") || null;
    return element("div", { class: "scroll" }, element("table", {},
      element("thead", {}, element("tr", {}, columns.map((c) => element("th", { scope: "col", class: kind(c) }, c.name)))),
      element("tbody", {}, rows.map((row) => element("tr", {}, columns.map((c) => element("td", { class: kind(c) }, c.of(row))))))));
  }

  const passes = (found) => (found.length ? found.map((e) => `${e.value.toFixed(3)}${e.low == null ? "" : ` [${e.low.toFixed(3)}, ${e.high.toFixed(3)}]`}${found.length > 1 ? ` ${e.task}` : ""}`).join("; ") : number(null));

  function drawTables() {
    document.getElementById("run-table").append(table([
      { name: "run", words: true, of: (r) => r.name }, { name: "arm", words: true, of: (r) => r.arm }, { name: "seed", of: (r) => String(r.seed ?? "-") },
      { name: "model", words: true, of: (r) => r.models },
      { name: "steps", of: (r) => (r.state === "done" ? String(r.steps) : `${r.steps} of ${r.planned ?? "?"}${r.state === "failed" ? ", failed" : ""}`) },
      { name: "pass@1, start", of: (r) => passes(r.start) }, { name: "pass@1, last", of: (r) => passes(r.final) },
      { name: "last step's reward", of: (r) => number(r.reward) }, { name: "tokens sampled", of: (r) => number(r.tokens, 0) },
      { name: "seconds", of: (r) => number(r.seconds, 1) }, { name: "warnings", of: (r) => String(r.warnings) },
    ], data.runs));
    const place = document.getElementById("warning-table");
    if (!data.warnings.length) place.append(element("p", { class: "note" }, "None was written to metrics.jsonl."));
    else {
      const most = 300;
      if (data.warnings.length > most) place.append(element("p", { class: "note" }, `The first ${most} of ${data.warnings.length}; metrics.jsonl has them all.`));
      place.append(table([
        { name: "run", words: true, of: (w) => w.run }, { name: "step", of: (w) => String(w.step ?? "-") },
        { name: "cause", words: true, of: (w) => (w.cause == null ? "-" : w.cause.replaceAll("_", " ")) }, { name: "warning", words: true, long: true, of: (w) => w.text },
      ], data.warnings.slice(0, most)));
    }
  }

  // --- a page that is written anew while runs go on reloads itself and comes back to where it was

  let touched = 0;
  function watchFor(seconds) {
    for (const kind of ["pointerdown", "wheel", "keydown", "pointermove"]) addEventListener(kind, () => { touched = performance.now(); }, { passive: true });
    const label = element("span", {}, "");
    const pause = element("button", { type: "button", id: "pause", onclick: () => { remember("paused", state.get("paused") ? "" : "1"); show(); } });
    const show = () => {
      label.textContent = state.get("paused") ? "going on; not reloading" : `going on; reloads every ${seconds} s`;
      pause.textContent = state.get("paused") ? "Go on" : "Pause";
    };
    show();
    document.getElementById("live").append(label, pause);
    setInterval(() => {
      const busy = performance.now() - touched < 1500 && touched > 0;
      if (state.get("paused") || document.hidden || busy || String(getSelection())) return;
      history.replaceState({ scroll: scrollY }, "");
      location.reload();
    }, seconds * 1000);
  }

  // --- begin

  if (["light", "dark"].includes(state.get("theme"))) document.documentElement.dataset.theme = state.get("theme");
  history.scrollRestoration = "manual";
  document.getElementById("title").textContent = data.title;
  drawHeadlines();
  for (const part of ["story", "paper"]) document.getElementById(`${part}-figures`).append(...data[part].map(card));
  drawTables();
  document.querySelectorAll(".card:not(.missing)").forEach((made) => near.observe(made));
  document.getElementById("theme").addEventListener("click", () => setTheme(theme() === "dark" ? "light" : "dark"));
  system.addEventListener("change", redraw);
  for (const link of document.querySelectorAll("nav a")) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      document.querySelector(link.getAttribute("href")).scrollIntoView();
    });
  }
  const comeBack = () => { if (history.state?.scroll != null) scrollTo(0, history.state.scroll); };
  const tokens = showTokens(document.getElementById("token-view"), data, { get: (key) => state.get(key), set: remember });
  comeBack();
  tokens.ready.then(() => {
    comeBack();
    history.replaceState(null, "");
  });
  if (data.watch) watchFor(data.watch);
  if (/^#(story|paper|tokens|runs)$/.test(location.hash)) document.querySelector(location.hash).scrollIntoView();
  window.sapoReport = { data, figures, drawAll, tokens };
})();
