"use strict";
// Draws an evaluation's completions: problems on the left, the chosen one's completions on the right. What a model or a
// task wrote goes into text nodes only. The choice, filters and order are kept in the address, so that it can be shared.

function showCompletions(root, data) {
  const ROW = 46; // height of a row of the list, as in the style
  const CLIP = 4000; // characters of a completion shown at first
  const ORDERS = {
    asked: ["as asked", null],
    reward: ["reward, lowest first", (s) => s.reward],
    "-reward": ["reward, highest first", (s) => -s.reward],
    length: ["length, shortest first", (s) => s.tokens],
    "-length": ["length, longest first", (s) => -s.tokens],
  };
  const RESULTS = { "": "right and wrong", right: "right", wrong: "wrong" };
  const state = { problem: "", q: "", result: "", status: "", group: "", order: "asked" };
  let listed = []; // {problem, samples}: what the filters leave, in order
  let lowered = null; // texts in lower case, made at the first search

  const isRight = (sample) => sample.reward >= data.threshold;
  const samplesOf = (problem) => (problem.greedy ? [problem.greedy, ...problem.samples] : problem.samples);
  const capital = (text) => text[0].toUpperCase() + text.slice(1);
  const mean = (numbers) => numbers.reduce((a, b) => a + b, 0) / numbers.length;

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else if (value === true) made.setAttribute(key, "");
      else if (value !== false && value != null) made.setAttribute(key, value);
    }
    made.append(...children.filter((c) => c != null)); // strings become text nodes
    return made;
  }

  // --- state in the address

  function readAddress() {
    const given = new URLSearchParams(location.hash.slice(1));
    for (const key of Object.keys(state)) state[key] = given.get(key) ?? (key === "order" ? "asked" : "");
    if (!(state.order in ORDERS)) state.order = "asked";
  }

  function writeAddress() {
    const kept = Object.entries(state).filter(([key, value]) => value && !(key === "order" && value === "asked"));
    history.replaceState(null, "", "#" + new URLSearchParams(kept));
  }

  // --- what the filters leave

  function textsInLowerCase() {
    lowered ??= data.problems.map((problem) => ({
      question: `${problem.prompt}\n${problem.answer ?? ""}`.toLowerCase(),
      samples: samplesOf(problem).map((s) => `${s.transcript ? s.transcript.map(([, words]) => words).join("\n") : s.text}\n${s.answer ?? ""}`.toLowerCase()),
    }));
    return lowered;
  }

  function select() {
    const query = state.q.toLowerCase();
    const [grouping, group] = state.group ? state.group.split(/:(.*)/s) : [];
    const key = ORDERS[state.order][1];
    listed = [];
    data.problems.forEach((problem, index) => {
      if (grouping && !(problem.groups[grouping] ?? []).includes(group)) return;
      const texts = query ? textsInLowerCase()[index] : null;
      const inQuestion = !query || texts.question.includes(query);
      const samples = samplesOf(problem).filter(
        (sample, i) =>
          (!state.result || isRight(sample) === (state.result === "right")) &&
          (!state.status || sample.status === state.status) &&
          (inQuestion || texts.samples[i].includes(query)),
      );
      if (samples.length) listed.push({ problem, samples });
    });
    if (key) {
      const by = (a, b) => a[0] - b[0];
      for (const item of listed) item.samples = item.samples.map((s) => [key(s), s]).sort(by).map(([, s]) => s);
      listed = listed.map((item) => [mean(item.samples.map(key)), item]).sort(by).map(([, item]) => item);
    }
  }

  // --- the head

  function head() {
    const figures = data.figures.map(({ name, value, more }) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, value, element("small", {}, more))),
    );
    return element(
      "header",
      { class: "head" },
      element(
        "div",
        { class: "title" },
        element("div", {}, element("h1", {}, data.task), element("div", { class: "model" }, data.model)),
        element("button", { type: "button", onclick: otherTheme, id: "theme" }, "Light / dark"),
      ),
      element("dl", { class: "figures" }, ...figures),
      Object.keys(data.slices).length ? slices() : null,
    );
  }

  function slices() {
    const tables = Object.entries(data.slices).map(([name, rows]) => {
      const measures = Object.keys(rows[0]).filter((key) => key.includes("@") && key !== "pass@1");
      const line = (row) =>
        element(
          "tr",
          {},
          element("td", {}, row.value),
          element("td", {}, String(row.problems)),
          ...measures.flatMap((m) => [
            element("td", {}, row[m] ? row[m].value.toFixed(3) : "not judged"),
            element("td", {}, row[m] ? `${row[m].low.toFixed(3)} to ${row[m].high.toFixed(3)}` : ""),
          ]),
        );
      const heads = [capital(name), "problems", ...measures.flatMap((m) => [m, "95% interval"])];
      return element(
        "table",
        {},
        element("thead", {}, element("tr", {}, ...heads.map((h) => element("th", { scope: "col" }, h)))),
        element("tbody", {}, ...rows.map(line)),
      );
    });
    const names = Object.keys(data.slices).join(", ");
    return element("details", { class: "slices" }, element("summary", {}, `By ${names}`), element("div", {}, ...tables));
  }

  function otherTheme() {
    const dark = document.documentElement.dataset.theme
      ? document.documentElement.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    document.documentElement.dataset.theme = dark ? "light" : "dark";
  }

  // --- the tools

  function choice(key, label, options) {
    const made = element(
      "select",
      { id: key, onchange: () => change(key, made.value) },
      ...options.map(([value, words]) => element("option", { value }, words)),
    );
    return element("label", {}, label, made);
  }

  function tools() {
    const statuses = [...new Set(data.problems.flatMap((p) => samplesOf(p).map((s) => s.status)))].sort();
    const groups = data.groupings.flatMap((name) =>
      [...new Set(data.problems.flatMap((p) => p.groups[name] ?? []))]
        .sort((a, b) => a.localeCompare(b, undefined, { numeric: true }))
        .map((value) => [`${name}:${value}`, data.groupings.length > 1 ? `${name}: ${value}` : value]),
    );
    let waiting;
    const search = element("input", {
      id: "q",
      type: "search",
      placeholder: "in questions, completions and answers",
      oninput: () => {
        clearTimeout(waiting);
        waiting = setTimeout(() => change("q", search.value), 120);
      },
    });
    return element(
      "div",
      { class: "tools" },
      element("label", { class: "search" }, "Search", search),
      choice("result", "Result", Object.entries(RESULTS)),
      choice("status", "Status", [["", "all"], ...statuses.map((s) => [s, s.replace("_", " ")])]),
      groups.length ? choice("group", capital(data.groupings.join(", ")), [["", "all"], ...groups]) : null,
      choice("order", "Sort by", Object.entries(ORDERS).map(([value, [words]]) => [value, words])),
      element("button", { type: "button", id: "reset", onclick: reset }, "Reset"),
    );
  }

  function reset() {
    for (const key of Object.keys(state)) state[key] = key === "order" ? "asked" : key === "problem" ? state.problem : "";
    draw();
  }

  function change(key, value) {
    state[key] = value;
    draw();
  }

  // --- the list: only the rows in view are elements

  const rows = element("div", { role: "presentation" });
  const list = element(
    "div",
    { class: "list", role: "listbox", tabindex: "0", "aria-label": "problems", onscroll: drawRows, onkeydown: byKey },
    rows,
  );
  const count = element("div", { class: "count", role: "status" });

  function drawRows() {
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 5);
    const last = Math.min(listed.length, Math.ceil((list.scrollTop + (list.clientHeight || 600)) / ROW) + 5);
    rows.style.height = `${listed.length * ROW}px`;
    rows.replaceChildren(...listed.slice(first, last).map((item, i) => row(item, first + i)));
  }

  function row({ problem }, position) {
    const right = problem.samples.filter(isRight).length;
    const made = element(
      "div",
      {
        class: "row",
        role: "option",
        id: `row-${problem.id}`,
        "aria-selected": String(String(problem.id) === state.problem),
        "aria-setsize": String(listed.length),
        "aria-posinset": String(position + 1),
        onclick: () => choose(problem.id),
      },
      element(
        "div",
        { class: "line" },
        element("span", { class: "words" }, element("b", {}, `${problem.id + 1}`), problem.prompt.slice(0, 120)),
        element("span", { class: "rate" }, `${right}/${problem.samples.length}`),
      ),
      element("div", { class: "bar", "aria-hidden": "true" }, element("i")),
    );
    made.style.top = `${position * ROW}px`;
    made.querySelector("i").style.width = `${(100 * right) / problem.samples.length}%`;
    return made;
  }

  function byKey(event) {
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity }[event.key];
    if (!step || !listed.length) return;
    event.preventDefault();
    const at = listed.findIndex(({ problem }) => String(problem.id) === state.problem);
    choose(listed[Math.min(listed.length - 1, Math.max(0, at + step))].problem.id);
  }

  function choose(id) {
    state.problem = String(id);
    writeAddress();
    const at = listed.findIndex(({ problem }) => problem.id === id);
    if (at * ROW < list.scrollTop) list.scrollTop = at * ROW;
    if ((at + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (at + 1) * ROW - list.clientHeight;
    list.setAttribute("aria-activedescendant", `row-${id}`);
    drawRows();
    drawProblem();
  }

  // --- the chosen problem

  const pane = element("section", { class: "problem", "aria-label": "completions" });

  function marked(text) {
    if (!state.q) return [text];
    const pieces = [];
    const low = text.toLowerCase();
    const query = state.q.toLowerCase();
    if (low.length !== text.length) return [text]; // places in the two differ, as for the Turkish İ
    let from = 0;
    for (let at = low.indexOf(query); at >= 0; at = low.indexOf(query, from)) {
      pieces.push(text.slice(from, at), element("mark", {}, text.slice(at, at + query.length)));
      from = at + query.length;
    }
    return [...pieces, text.slice(from)];
  }

  function fact(name, value) {
    return element("span", {}, element("b", {}, `${name} `), element("span", { class: "value", dir: "auto" }, ...marked(value)));
  }

  function body(text) {
    const made = element("pre", { class: "text", dir: "auto" }, ...marked(text.slice(0, CLIP)));
    if (text.length <= CLIP) return [made];
    const more = element(
      "button",
      {
        type: "button",
        class: "more",
        onclick: () => {
          made.replaceChildren(...marked(text));
          more.remove();
        },
      },
      `Show all ${text.length.toLocaleString("en")} characters`,
    );
    return [made, more];
  }

  // An episode: the model's turns with their numbers, and set apart from them what it was told.
  function episode(said) {
    let turn = 0;
    return said.flatMap(([who, words]) => {
      if (who === "policy") return [element("div", { class: "turn" }, `turn ${(turn += 1)}`), ...body(words)];
      if (who === "history") return [element("div", { class: "forgot" }, words)];
      return [element("div", { class: "heard" }, element("b", {}, who), ...body(words))];
    });
  }

  function card(problem, sample) {
    const right = isRight(sample);
    const name = sample === problem.greedy ? "Greedy" : `Sample ${problem.samples.indexOf(sample) + 1}`;
    const figures = Object.entries(sample.figures ?? {}).map(([key, value]) => fact(key.replace("_", " "), String(+value.toFixed(4))));
    return element(
      "article",
      { class: right ? "sample right" : "sample" },
      element(
        "div",
        { class: "facts" },
        element("span", { class: "name" }, name),
        element("span", { class: "verdict" }, right ? "✓ right" : "✗ wrong"),
        sample.status === "scored" ? null : element("span", { class: "status" }, sample.status.replace("_", " ")),
        fact("reward", String(+sample.reward.toFixed(4))),
        sample.answer == null ? null : fact("answer", sample.answer),
        ...figures,
        sample.transcript ? element("span", {}, element("b", {}, `${sample.transcript.filter(([who]) => who === "policy").length} turns`)) : null,
        element("span", {}, element("b", {}, `${sample.tokens.toLocaleString("en")} tokens`)),
      ),
      ...(sample.transcript ? episode(sample.transcript) : body(sample.text)),
      sample.detail ? element("p", { class: "detail" }, sample.detail) : null,
    );
  }

  function picture(hash) {
    const uri = data.thumbnails?.[hash];
    const short = hash.slice(0, 8);
    return element("span", { class: "picture", title: `SHA-256 ${hash}` }, uri ? element("img", { src: uri, alt: `picture ${short}` }) : element("code", {}, short));
  }

  function drawProblem() {
    const item = listed.find(({ problem }) => String(problem.id) === state.problem);
    if (!item) {
      const words = listed.length ? "Choose a problem." : "No completion is left by the filters.";
      pane.replaceChildren(element("p", { class: "empty" }, words));
      return;
    }
    const { problem, samples } = item;
    const all = samplesOf(problem).length;
    const groups = Object.entries(problem.groups).map(([name, values]) => fact(name, values.join(", ")));
    const shown = samples.length === all ? `${all} completions` : `${samples.length} of ${all} completions`;
    const parts = [
      element("h2", {}, `Problem ${problem.id + 1}`),
      problem.pictures ? element("div", { class: "pictures" }, ...problem.pictures.map(picture)) : null,
      ...body(problem.prompt),
      problem.seen == null
        ? null
        : element("details", {}, element("summary", {}, "As the model saw it"), ...body(data.opening + problem.seen)),
      element("div", { class: "facts" }, problem.answer == null ? null : fact("reference answer", problem.answer), ...groups),
      element("h3", {}, shown),
      ...samples.map((sample) => card(problem, sample)),
    ];
    pane.replaceChildren(...parts.filter((part) => part != null));
    pane.scrollTop = 0;
  }

  // --- all of it

  function draw() {
    select();
    if (!listed.some(({ problem }) => String(problem.id) === state.problem)) {
      state.problem = listed.length ? String(listed[0].problem.id) : "";
      list.scrollTop = 0;
    }
    writeAddress();
    for (const key of ["q", "result", "status", "group", "order"]) {
      const control = root.querySelector(`#${key}`);
      if (control && control !== document.activeElement) control.value = state[key];
    }
    const completions = listed.reduce((n, { samples }) => n + samples.length, 0);
    const all = data.problems.reduce((n, p) => n + samplesOf(p).length, 0);
    count.textContent = `${listed.length.toLocaleString("en")} of ${data.problems.length.toLocaleString("en")} problems, ${completions.toLocaleString("en")} of ${all.toLocaleString("en")} completions`;
    drawRows();
    drawProblem();
  }

  root.replaceChildren(
    head(),
    tools(),
    element("div", { class: "panes" }, element("div", { class: "side" }, count, list), pane),
  );
  addEventListener("hashchange", () => {
    readAddress();
    draw();
  });
  addEventListener("resize", drawRows);
  readAddress();
  draw();
  const chosen = listed.findIndex(({ problem }) => String(problem.id) === state.problem);
  if (chosen * ROW > list.clientHeight - ROW) list.scrollTop = chosen * ROW - list.clientHeight / 2;
}

{
  const data = document.getElementById("data");
  const root = document.getElementById("completions");
  if (data && root) showCompletions(root, JSON.parse(data.textContent));
}
