"use strict";
// Draws a report from its data: headlines, figures by Plotly, tables. Names and texts go into text nodes; into Plotly's
// labels, which know some markup, with their brackets escaped. Figures are drawn when they come near the window, the others
// when there is nothing else to do, and all of them before the page is printed.

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

  let printing = false; // on paper it is always light
  const theme = () => (printing ? "light" : null) ?? document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light");
  const mixed = (one, other, share) => `#${[1, 3, 5].map((i) => Math.round(parseInt(one.slice(i, i + 2), 16) * (1 - share) + parseInt(other.slice(i, i + 2), 16) * share).toString(16).padStart(2, "0")).join("")}`;
  function colorOf(number, shade = 0) {
    const color = number < 0 ? INK[theme()].faint : PALETTE[theme()][number % PALETTE.light.length];
    return shade ? mixed(color, INK[theme()].surface, 1 - (2 / 3) ** shade) : color;
  }

  function setTheme(name) {
    if (name) document.documentElement.dataset.theme = name;
    remember("theme", name);
    redraw();
  }

  function redraw() {
    for (const made of document.querySelectorAll(".dot")) made.style.background = colorOf(Number(made.dataset.color));
    for (const again of drawn.values()) again();
  }

  // --- figures

  const few = (figure) => new Set(figure.panels.flatMap((p) => p.traces.map((t) => t.name))).size < 6;
  // Plotly reads tags and %{...} in texts, and turns entities back.
  const safe = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll("%{", "&#37;{");

  function plotlyTrace(trace, panel, figure) {
    const color = colorOf(trace.color ?? 0, trace.shade);
    const name = trace.name ?? "";
    const made = { name: safe(name), visible: !(hidden[figure.key]?.has(name)), showlegend: false, type: "scatter" };
    if (trace.second) made.yaxis = "y2";
    if (trace.kind === "band") {
      return {
        ...made, mode: "lines", x: [...trace.x, ...[...trace.x].reverse()], y: [...trace.high, ...[...trace.low].reverse()],
        fill: "toself", fillcolor: `${color}${few(figure) ? "2e" : "1a"}`, line: { width: 0, color }, hoverinfo: "skip",
      };
    }
    const words = [name, trace.hover].filter(Boolean).map(safe).join("<br>");
    made.hovertemplate = `${words}<br>${safe(panel.x)} %{x}<br>${safe(trace.second ? panel.second : panel.y)} %{y:.6g}<extra></extra>`;
    made.x = trace.x;
    made.y = trace.y;
    if (panel.y_names) made.hovertemplate = `${words}<br>${safe(panel.x)} %{x:.4f}%{text}<extra></extra>`;
    if (trace.kind === "intervals") {
      const far = trace.x.map((x, i) => [trace.high[i] - x, x - trace.low[i]]);
      return {
        ...made, mode: "markers", text: trace.x.map((_, i) => ` [${trace.low[i].toFixed(4)}, ${trace.high[i].toFixed(4)}]`), marker: { color, size: 9, symbol: "diamond" },
        error_x: { type: "data", symmetric: false, array: far.map((f) => f[0]), arrayminus: far.map((f) => f[1]), color, thickness: 2, width: 5 },
      };
    }
    if (trace.hovers) made.text = trace.hovers.map((h) => `<br>${safe(h)}`);
    if (trace.kind === "bars") return { ...made, type: "bar", marker: { color } };
    if (trace.kind === "points") return { ...made, mode: "markers", marker: { color, size: panel.y_names ? 7 : 5, opacity: panel.y_names ? 0.6 : 0.55, symbol: trace.crossed ? "x" : "circle" } };
    const line = { color, width: trace.faint ? 1 : 2, dash: trace.dash ?? "solid" };
    if (trace.kind === "steps") return { ...made, mode: "lines", line };
    return { ...made, mode: trace.markers ? "lines+markers" : "lines", opacity: trace.faint ? (few(figure) ? 0.45 : 0.35) : 1, marker: { color, size: 6 }, line };
  }

  const ends = (values) => values.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);

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
    // Over about a decade Plotly writes all nine digits, which a narrow figure turns aslant: 1, 2 and 5 are enough.
    const marked = (panel.marks ?? []).filter((mark) => mark.axis === "x").map((mark) => mark.at);
    const wide = panel.x_log ? (panel.x_range ?? ends([...panel.traces.flatMap((t) => t.x), ...marked].filter((x) => x > 0))) : [1, 1];
    const decades = Math.log10(wide[1] / wide[0]);
    if (decades > 0.5 && decades < 1.3) {
      const first = Math.floor(Math.log10(wide[0])), places = [0, 1, 2].flatMap((k) => [1, 2, 3, 4, 5, 6, 7, 8, 9].map((n) => +`${n}e${first + k}`));
      Object.assign(layout.xaxis, { tickvals: places, ticktext: places.map((v) => (/[346789]/.test(v.toExponential()[0]) ? "" : String(v))), tickangle: 0 });
    }
    const range = (ends, log) => (log ? ends.map(Math.log10) : ends);
    if (panel.y_range) layout.yaxis.range = range(panel.y_range, panel.y_log);
    if (panel.x_range) layout.xaxis.range = range(panel.x_range, panel.x_log);
    if (panel.y_names) {
      Object.assign(layout.yaxis, { title: undefined, range: [panel.y_names.length - 0.5, -0.6], tickvals: panel.y_names.map((_, i) => i), ticktext: panel.y_names.map(safe), tickfont: { color: ink, size: 12 }, nticks: 0 });
    }
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

  // On paper a size is given: Plotly measures anew only after a while, and a printer does not wait.
  const sized = (layout, plot) => Object.assign(layout, printing ? { width: plot.clientWidth, height: plot.clientHeight } : { autosize: true });

  function swatch(trace) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    made.setAttribute("width", "22");
    made.setAttribute("height", "10");
    const shape = document.createElementNS("http://www.w3.org/2000/svg", trace.kind === "points" ? "circle" : trace.kind === "bars" ? "rect" : "line");
    const place = trace.kind === "points" ? { cx: 11, cy: 5, r: 3.5 } : trace.kind === "bars" ? { x: 5, y: 0, width: 12, height: 10 } : { x1: 0, x2: 22, y1: 5, y2: 5 };
    const dash = { dash: "6 4", dot: "2 3", dashdot: "6 3 2 3" }[trace.dash];
    for (const [key, value] of Object.entries({ ...place, stroke: colorOf(trace.color ?? 0, trace.shade), fill: colorOf(trace.color ?? 0, trace.shade), "stroke-width": 2, ...(dash ? { "stroke-dasharray": dash } : {}) })) shape.setAttribute(key, value);
    made.append(shape);
    return made;
  }

  function legendOf(figure) {
    const first = new Map();
    const colors = new Map();
    for (const trace of figure.panels.flatMap((p) => p.traces)) {
      const name = trace.name ?? "";
      const known = first.get(name);
      if (!known || (known.kind === "band" && trace.kind !== "band") || (known.faint && !trace.faint)) first.set(name, trace);
      colors.set(name, (colors.get(name) ?? new Set()).add(trace.color ?? 0));
    }
    // What stands for lines of several colours, a dash, is in the colour of text.
    for (const [name, trace] of first) if (colors.get(name).size > 1) first.set(name, { ...trace, color: -1 });
    // Titles of panels and names of rows say it already.
    const said = figure.panels.every((p) => p.y_names) || (figure.panels.length === first.size && figure.panels.every((p) => p.title === p.traces[0].name && p.traces.every((t) => t.name === p.title)));
    if (first.size < 2 || said) return null;
    return element("div", { class: "legend" }, [...first].map(([name, trace]) =>
      element("button", { type: "button", "aria-pressed": String(!(hidden[figure.key]?.has(name))), title: "click: show or hide; double-click: this one alone, or all again", onclick: (event) => (event.detail > 1 ? alone(figure, name, [...first.keys()]) : toggle(figure, name)) }, swatch(trace), name)));
  }

  function toggle(figure, name) {
    const names = (hidden[figure.key] ??= new Set());
    if (!names.delete(name)) names.add(name);
    drawn.get(figure.key)();
  }

  // The second click of a double one: the first has switched it.
  function alone(figure, name, names) {
    const others = names.filter((n) => n !== name);
    const all = others.every((n) => hidden[figure.key]?.has(n));
    hidden[figure.key] = new Set(all ? [] : others);
    drawn.get(figure.key)();
  }

  const figuresOf = (report) => [...report.compared.flatMap((made) => made.figures), ...report.story, ...report.paper];
  let figures = figuresOf(data);

  function card(figure) {
    const made = element("article", { class: `card${figure.wide ? " wide" : ""}${figure.missing ? " missing" : ""}`, id: `figure-${figure.key}` }, element("h3", {}, figure.title));
    if (figure.missing) {
      made.append(element("p", {}, figure.missing));
      return made;
    }
    if (figure.same_as) {
      const links = figure.same_as.flatMap((key, i) => [i ? ", " : null, element("a", { href: `#figure-${key}`, onclick: go }, figures.find((f) => f.key === key).title)]);
      made.classList.add("missing");
      made.append(element("p", {}, "The same lines as above: ", links, ". `sapo report --png DIR` writes this figure for a paper."));
      return made;
    }
    const columns = figure.columns ?? (figure.panels.length === 3 ? 3 : Math.min(figure.panels.length, 2));
    const legend = element("div", {});
    const plots = figure.panels.map((panel) => element("div", { class: "plot", role: "img", "aria-label": `${figure.title}: ${panel.y} against ${panel.x}` }));
    const panels = element("div", { class: "panels" }, plots);
    panels.style.setProperty("--columns", columns);
    if (columns > 2) panels.classList.add("many");
    figure.panels.forEach((panel, i) => { if (panel.y_names) plots[i].style.height = `${80 + 30 * panel.y_names.length}px`; });
    made.querySelector("h3").append(element("button", { type: "button", class: "csv", title: "save the numbers of this figure as CSV", onclick: () => saveCsv(figure) }, "CSV"));
    const caption = element("p", {});
    made.append(legend, panels, caption);
    const fill = () => (legend.replaceChildren(...[legendOf(figure)].filter(Boolean)), (caption.textContent = figure.caption ?? ""));
    fill(); // at once, for its height; the plots when they come near
    made.draw = () => {
      fill();
      const again = () => Promise.all(plots.map((plot, i) =>
        Plotly.react(plot, figure.panels[i].traces.map((t) => plotlyTrace(t, figure.panels[i], figure)), sized(plotlyLayout(figure.panels[i]), plot), { displayModeBar: false, responsive: true })));
      drawn.set(figure.key, () => (fill(), again()));
      return again();
    };
    return made;
  }

  // The rows that `sapo report --png` writes beside the images.
  function csvOf(figure) {
    const cell = (value) => (value == null ? "" : /[",\n]/.test(String(value)) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
    const rows = [["panel", "trace", "kind", "note", "x_name", "x", "y_name", "y", "low", "high"]];
    for (const panel of figure.panels) {
      for (const trace of panel.traces) {
        trace.x.forEach((x, i) => {
          const [y, low, high] = [trace.y?.[i], trace.low?.[i], trace.high?.[i]];
          if (y != null || low != null) rows.push([panel.title, trace.name, trace.kind, trace.hovers?.[i] ?? trace.hover, panel.x, x, trace.second ? panel.second : panel.y, y, low, high]);
        });
      }
    }
    return rows.map((row) => row.map(cell).join(",") + "\n").join("");
  }

  function saveCsv(figure) {
    const link = element("a", { href: URL.createObjectURL(new Blob([csvOf(figure)], { type: "text/csv" })), download: `${figure.key}.csv` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        near.unobserve(entry.target);
        entry.target.draw();
      }
    }
  }, { rootMargin: "500px" });

  const undrawn = () => [...document.querySelectorAll(".card:not(.missing)")].filter((made) => !drawn.has(made.id.replace("figure-", "")));
  const drawNow = (made) => (near.unobserve(made), made.draw());

  // Every figure, for who looks at the whole page at once: a printer, a picture of it.
  function drawAll() {
    return Promise.all(undrawn().map(drawNow));
  }

  const idle = window.requestIdleCallback ?? ((act) => setTimeout(act, 200));
  function drawWhenIdle() {
    const [next] = undrawn();
    if (next) Promise.resolve(drawNow(next)).then(() => idle(drawWhenIdle));
  }

  // On paper figures have the paper's width and light colours; afterwards the window's again. All of it happens at once,
  // before the browser goes on to print.
  function forPaper(starts) {
    if (printing === starts) return;
    printing = starts;
    document.documentElement.classList.toggle("printing", starts);
    drawAll();
    redraw();
    if (!starts) document.querySelectorAll(".plot").forEach((plot) => plot.data && Plotly.Plots.resize(plot));
  }
  addEventListener("beforeprint", () => forPaper(true));
  addEventListener("afterprint", () => forPaper(false));

  // --- words and tables

  const dot = (color) => {
    const made = element("i", { class: "dot" });
    made.dataset.color = color;
    made.style.background = colorOf(color);
    return made;
  };
  const MOST_HEADLINES = 6;

  function drawHeadlines() {
    const several = data.headlines.length > 1;
    const opened = document.querySelector("#headlines details")?.open;
    const list = element("ul", { class: "sentences" }, data.headlines.map((text, i) => element("li", {}, several ? dot(data.colors[i]) : null, text)));
    const place = document.getElementById("headlines");
    place.replaceChildren(...data.problems.map((text) => element("p", { class: "unwell" }, text)));
    if (data.headlines.length > MOST_HEADLINES || data.compared.length) place.append(element("details", { open: opened }, element("summary", {}, `Each of the ${data.headlines.length} arms in a sentence`), list));
    else place.append(list);
    if (data.warnings.length) {
      const runs = new Set(data.warnings.map((w) => w.run)).size;
      place.append(element("p", { class: "unwell" }, `${data.warnings.length.toLocaleString("en")} ${data.warnings.length === 1 ? "warning" : "warnings"} in ${runs} of ${data.runs.length} ${data.runs.length === 1 ? "run" : "runs"}: `, element("a", { href: "#warnings", onclick: go }, "see the end of the page"), "."));
    }
  }

  // Terms of this method that stand in the figures.
  const GLOSSARY = [
    ["pass@1", "share of held-out problems' samples that are right; an evaluation's main figure"],
    ["r, log r", "ratio π/π_old of a token: how much likelier the policy makes it now than when it was sampled"],
    ["A", "advantage of a response: its reward against the others of its group; all its tokens are pushed up (A > 0) or down (A ≤ 0)"],
    ["gate weight f'", "factor of a token's gradient under the objective; 1 at r = 1. A hard clip (GRPO, GSPO) has only 1 and 0, a soft gate (SAPO) all values between"],
    ["EUR", "effective update ratio: the mean gate weight"],
    ["1 - EUR", "the share of the gradient's weight that the gate takes away"],
    ["off policy", "an update made after another one on the same samples, so that ratios have left 1"],
    ["Var_i, D_i", "variance of log r over a response's tokens; distance of its mean token gate from one gate on the sequence: small means that a token gate acts like a sequence gate"],
    ["arm, seed", "seed of the random draws: runs that differ in their seed alone show how far results vary by chance"],
  ];

  function drawWords() {
    document.getElementById("words").append(element("details", {}, element("summary", {}, "The words of the figures"),
      element("dl", {}, GLOSSARY.flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, text)]))));
  }

  // As Python writes it, in the terminal and in table.md: a value that lies exactly between two goes to the even one. With
  // d digits these are the odd multiples of 2^-(d + 1): half ones, odd quarters, ..., odd sixteenths.
  function fixed(value, digits = 3) {
    const scale = 10 ** digits;
    const low = Math.floor(value * scale);
    return Math.abs(value * 2 ** (digits + 1)) % 2 === 1 ? ((low % 2 ? low + 1 : low) / scale).toFixed(digits) : value.toFixed(digits);
  }

  const number = (value, digits = 3) => (value == null ? element("span", { class: "none" }, "not measured") : Number(fixed(value, digits)).toLocaleString("en", { maximumFractionDigits: digits }));

  // A column with `by` sorts the rows by it, upwards and downwards; what has none there stays last.
  const sorts = new Map(); // names of a table's columns -> how it was sorted last
  function table(columns, rows) {
    const names = columns.map((c) => c.name).join();
    const kind = (c) => [c.words && "words", c.long && "long"].filter(Boolean).join(" ") || null;
    const body = element("tbody", {});
    const fill = (shown) => body.replaceChildren(...shown.map((row) => element("tr", {}, columns.map((c) => element("td", { class: kind(c) }, c.of(row))))));
    const heads = columns.map((c) => element("th", { scope: "col", class: kind(c) }, c.by ? element("button", { type: "button", title: "sort", onclick: () => sort(c) }, c.name) : c.name));
    function sort(column) {
      const head = heads[columns.indexOf(column)];
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((h) => h.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      sorts.set(names, { name: column.name, up });
      const key = (row) => column.by(row);
      const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
      fill([...rows].sort((a, b) => (key(a) == null) - (key(b) == null) || (key(a) == null ? 0 : (up ? 1 : -1) * compare(key(a), key(b)))));
    }
    fill(rows);
    const sorted = columns.find((c) => c.name === sorts.get(names)?.name);
    if (sorted) {
      if (!sorts.get(names).up) sort(sorted);
      sort(sorted);
    }
    return element("div", { class: "scroll", tabindex: "0" }, element("table", {}, element("thead", {}, element("tr", {}, heads)), body));
  }

  // Of several tasks each in a piece of its own, between which a line may end.
  const passes = (found) => (found.length ? element("span", {}, found.flatMap((e, i) => [i ? "; " : null, element("span", { class: "piece" }, `${fixed(e.value)}${e.low == null ? "" : ` [${fixed(e.low)}, ${fixed(e.high)}]`}${found.length > 1 ? ` ${e.task}` : ""}`)])) : number(null));
  const words = (cause) => cause.replaceAll("_", " ");
  const span = (first, last) => (first === last ? String(first) : `${first} to ${last}`);

  function drawTables() {
    const kinds = new Set(data.runs.flatMap((r) => [...r.start, ...r.final]).map((e) => (e.graded ? "held-out mean reward" : "pass@1")));
    const heldOut = [...kinds].sort().reverse().join(" or ") || "pass@1";
    document.getElementById("run-table").replaceChildren(table([
      { name: "run", words: true, of: (r) => r.name, by: (r) => r.name }, { name: "arm", words: true, of: (r) => r.arm, by: (r) => r.arm }, { name: "seed", of: (r) => String(r.seed ?? "-"), by: (r) => r.seed },
      { name: "model", words: true, of: (r) => r.models },
      { name: "steps", of: (r) => (r.state === "done" ? String(r.steps) : `${r.steps} of ${r.planned ?? "?"}${r.state === "failed" ? ", failed" : ""}`), by: (r) => r.steps },
      { name: `${heldOut}, start`, of: (r) => passes(r.start), by: (r) => r.start[0]?.value ?? null }, { name: `${heldOut}, last`, of: (r) => passes(r.final), by: (r) => r.final[0]?.value ?? null },
      { name: "mean reward, last step", of: (r) => number(r.reward), by: (r) => r.reward }, { name: "sampled tokens", of: (r) => number(r.tokens, 0), by: (r) => r.tokens },
      { name: "seconds", of: (r) => number(r.seconds, 1), by: (r) => r.seconds }, { name: "warnings", of: (r) => String(r.warnings), by: (r) => r.warnings },
    ], data.runs));
    drawWarnings(document.getElementById("warning-table"));
  }

  // One row for each run and cause: a rule that is broken step after step would fill pages.
  function drawWarnings(place) {
    if (!data.warnings.length) {
      place.replaceChildren(element("p", { class: "note" }, "None was written to metrics.jsonl."));
      return;
    }
    const groups = new Map();
    for (const warning of data.warnings) {
      const key = JSON.stringify([warning.run, warning.cause]);
      if (!groups.has(key)) groups.set(key, []);
      groups.get(key).push(warning);
    }
    const all = (group) => {
      const made = element("details", { ontoggle: () => { if (made.children.length === 1) made.append(element("ul", {}, group.slice(1).map((w) => element("li", {}, w.text)))); } }, element("summary", {}, group[0].text));
      return made;
    };
    place.replaceChildren(table([
      { name: "run", words: true, of: ([w]) => w.run, by: ([w]) => w.run },
      { name: "cause", words: true, of: ([w]) => (w.cause == null ? "-" : words(w.cause)), by: ([w]) => w.cause },
      { name: "times", of: (g) => String(g.length), by: (g) => g.length },
      { name: "steps", of: (g) => (g.length > 1 ? span(g[0].step ?? "-", g.at(-1).step ?? "-") : String(g[0].step ?? "-")), by: (g) => g[0].step },
      { name: "warning, the first of them", words: true, long: true, of: (g) => (g.length > 1 ? all(g) : g[0].text) },
    ], [...groups.values()]));
  }

  function drawComparisons() {
    if (!data.compared.length) return;
    const place = document.getElementById("comparison");
    place.replaceChildren();
    place.hidden = false;
    document.querySelector("nav a[href='#comparison']").hidden = false;
    document.querySelector("#story h2").hidden = false;
    for (const made of data.compared) {
      if (data.compared.length > 1) place.append(element("h2", {}, made.name));
      place.append(...showComparison(made, { element, table, card, fixed, number, dot, words }));
    }
  }

  // --- a page that is written anew while runs go on reloads itself and comes back to where it was

  // Within the page: the address holds choices, not places.
  function go(event) {
    event.preventDefault();
    document.querySelector(event.currentTarget.getAttribute("href")).scrollIntoView();
  }

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

  // --- a page that is served takes news in place: what is chosen, sorted, hidden and open stays

  const shapeOf = (figure) => JSON.stringify([figure.missing, figure.same_as, figure.title, figure.wide, figure.columns, figure.panels?.map((p) => [p.y, p.x, p.y_names])]);

  function update(fresh) {
    const before = new Map([...data.story, ...data.paper].map((f) => [f.key, f]));
    const kept = (figure) => {
      const old = before.get(figure.key);
      if (!old || shapeOf(old) !== shapeOf(figure)) return figure;
      for (const key of Object.keys(old)) if (!(key in figure)) delete old[key];
      return Object.assign(old, figure);
    };
    const chunks = JSON.stringify(data.tokens.chunks);
    Object.assign(data, fresh, { story: fresh.story.map(kept), paper: fresh.paper.map(kept) });
    figures = figuresOf(data);
    for (const made of data.compared) for (const figure of made.figures) drawn.delete(figure.key);
    document.getElementById("title").textContent = data.title;
    drawComparisons();
    drawHeadlines();
    for (const part of ["story", "paper"]) {
      const place = document.getElementById(`${part}-figures`);
      const cards = data[part].map((figure) => {
        const old = document.getElementById(`figure-${figure.key}`);
        if (old && before.get(figure.key) === figure) return old;
        drawn.delete(figure.key);
        return card(figure);
      });
      if (cards.some((made, i) => made !== place.children[i]) || cards.length !== place.children.length) place.replaceChildren(...cards);
    }
    drawTables();
    for (const made of undrawn()) near.observe(made);
    for (const again of drawn.values()) again();
    if (JSON.stringify(data.tokens.chunks) !== chunks) {
      tokens.hold?.();
      document.getElementById("token-view").replaceChildren();
      tokens = window.sapoReport.tokens = showTokens(document.getElementById("token-view"), data, memory);
    }
  }

  // --- begin

  const memory = { get: (key) => state.get(key), set: remember };
  if (data.served) data.chunk = (place) => fetch(`chunks/${data.served}/${place}`).then(async (answer) => {
    if (!answer.ok) throw new Error((await answer.text()).trim());
    return answer.text();
  });
  if (["light", "dark"].includes(state.get("theme"))) document.documentElement.dataset.theme = state.get("theme");
  history.scrollRestoration = "manual";
  document.getElementById("title").textContent = data.title;
  drawComparisons();
  drawHeadlines();
  drawWords();
  for (const part of ["story", "paper"]) document.getElementById(`${part}-figures`).append(...data[part].map(card));
  drawTables();
  document.querySelectorAll(".card:not(.missing)").forEach((made) => near.observe(made));
  document.getElementById("theme").addEventListener("click", () => setTheme(theme() === "dark" ? "light" : "dark"));
  system.addEventListener("change", redraw);
  document.querySelectorAll("nav a").forEach((link) => link.addEventListener("click", go));
  const comeBack = () => { if (history.state?.scroll != null) scrollTo(0, history.state.scroll); };
  let tokens = showTokens(document.getElementById("token-view"), data, memory);
  comeBack();
  tokens.ready.then(() => {
    comeBack();
    history.replaceState(null, "");
  });
  if (data.watch) watchFor(data.watch); // it reloads soon: no more is drawn than is looked at
  else idle(drawWhenIdle);
  if (/^#(comparison|story|paper|tokens|runs)$/.test(location.hash)) document.querySelector(location.hash).scrollIntoView();
  window.sapoReport = { data, get figures() { return figures; }, drawAll, tokens, csvOf, update, element };
})();
