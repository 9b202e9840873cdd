"use strict";
// The token view: a run, a step, a sample; each token in the colour of what was measured of it, underlined where GRPO or
// GSPO would have silenced it. A step's data are unpacked when it is chosen. Texts of models go into text nodes only,
// with what steers or hides spelled out.

function showTokens(root, data, memory) {
  const ROW = 48; // height of a row of the list, as in the style
  const view = data.tokens;
  const unpacked = new Map(); // chunk's place -> promise of its value
  let step = null; // the step that is shown
  let listed = []; // {prompt, sample}: what is in the list, in order
  let chosen = null; // one of them
  let at = -1; // the token whose numbers are shown
  let spans = []; // the element of each token of the chosen sample

  const COLORS = {
    z: { words: "log-ratio", key: "z", edges: [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1], up: "up", down: "down", text: "log r: orange rose, blue fell" },
    w: { words: "gate weight", key: "w", edges: [0.0001, 0.001, 0.01, 0.05, 0.2, 0.5, 0.9], up: "weight", of: (w) => Math.abs(1 - w), text: "taken away by the gate, |1 - f'(r)|" },
    e: { words: "entropy", key: "e", edges: [0.01, 0.03, 0.1, 0.3, 0.7, 1.5, 3], up: "entropy", text: "entropy, nats" },
    a: { words: "slope", key: "a", edges: [0.05, 0.15, 0.4, 0.8, 1.2, 1.8, 2.5], up: "up", down: "down", text: "f'(r) r A: orange is pushed up, blue down" },
  };
  const lowest = (s) => s.low ?? Infinity;
  const ORDERS = {
    sampled: ["as sampled", null],
    "-reward": ["reward, highest first", (s) => -s.reward],
    reward: ["reward, lowest first", (s) => s.reward],
    low: ["lowest gate weight first", lowest],
    far: ["farthest ratio first", (s) => (s.z ? -Math.max(...s.z.map(Math.abs)) : Infinity)],
  };
  const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]|[\u{e0000}-\u{e007f}]/gu;
  const escaped = (c) => { const code = c.codePointAt(0); return code < 0x100 ? `\\x${code.toString(16).padStart(2, "0")}` : code < 0x10000 ? `\\u${code.toString(16).padStart(4, "0")}` : `\\U${code.toString(16).padStart(8, "0")}`; };
  const visible = (text) => text.replace(HIDDEN, escaped);
  // Five digits; of what is smaller than a ten thousandth three and a power of ten.
  const number = (value) => (value == null ? "not measured" : value !== 0 && Math.abs(value) < 1e-4 ? (+value.toPrecision(3)).toExponential() : String(+value.toPrecision(5)));

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else if (value != null && value !== false) made.setAttribute(key, value === true ? "" : value);
    }
    made.append(...children.flat().filter((c) => c != null));
    return made;
  }

  if (!view.chunks.length) {
    const why = view.logged_steps ? "the completions that were logged are empty" : "no completions were logged; log.rollouts_every=N logs those of every N-th step";
    root.append(element("article", { class: "card missing" }, element("p", {}, `Not measured: ${why}.`)));
    return { ready: Promise.resolve() };
  }

  // --- what was left out

  function note() {
    const words = [];
    const left = view.logged_steps - view.chunks.length;
    const cut = view.chunks.reduce((sum, c) => sum + c.left_out, 0);
    if (left) words.push(`Of ${view.logged_steps} logged steps ${view.chunks.length} are in this page.`);
    if (cut) words.push(`${cut.toLocaleString("en")} samples of these steps are left out.`);
    if (left || cut) words.push("`sapo report --tokens 0` takes in all.");
    if (view.numbers_only.length) words.push(`No tokenizer was found of ${view.numbers_only.map((r) => data.runs[r].name).join(", ")}: tokens are shown by number.`);
    words.push("Each sample was measured in one update, which is named; numbers have five digits.");
    return element("p", { class: "note" }, words.join(" "));
  }

  // --- the choices

  function choice(key, label, options, act) {
    const made = element("select", { id: `token-${key}`, onchange: () => act(made.value) }, options.map(([value, words]) => element("option", { value }, words)));
    return { made, label: element("label", {}, label, made) };
  }

  function fill(select, options, value) {
    select.replaceChildren(...options.map(([key, words]) => element("option", { value: key }, words)));
    if (value != null && options.some(([key]) => key === value)) select.value = value;
  }

  const runsShown = [...new Set(view.chunks.map((c) => c.run))];
  const runChoice = choice("run", "Run", runsShown.map((r) => [data.runs[r].name, data.runs[r].name]), (v) => { memory.set("run", v); memory.set("sample", ""); memory.set("prompt", ""); steps(); open(); });
  const stepChoice = choice("step", "Step", [], (v) => { memory.set("step", v); memory.set("sample", ""); memory.set("prompt", ""); open(); });
  const promptChoice = choice("prompt", "Prompt", [], (v) => { memory.set("prompt", v); list(); });
  const colorChoice = choice("color", "Colour", Object.entries(COLORS).map(([k, c]) => [k, c.words]), (v) => { memory.set("color", v); drawSample(); });
  const orderChoice = choice("order", "Sort samples by", Object.entries(ORDERS).map(([k, [words]]) => [k, words]), (v) => { memory.set("order", v); list(); });

  const rows = element("div", { role: "presentation" });
  const box = element("div", { class: "list", role: "listbox", tabindex: "0", "aria-label": "samples", onscroll: drawRows, onkeydown: rowKey }, rows);
  const count = element("div", { class: "count", role: "status" });
  const about = element("div", { class: "about" });
  const scale = element("div", { class: "scale", "aria-label": "legend" });
  const text = element("div", { class: "reading", tabindex: "0", role: "group", "aria-label": "tokens; the arrow keys go from one to the next", onkeydown: tokenKey, onmouseover: hovered, onclick: hovered });
  const numbers = element("div", { class: "numbers", role: "status", "aria-label": "numbers of the token" });
  root.append(
    note(),
    element("div", { class: "tools" }, runChoice.label, stepChoice.label, promptChoice.label, colorChoice.label, orderChoice.label),
    element("div", { class: "panes" }, element("div", { class: "side" }, count, box), element("div", { class: "sample" }, about, scale, text, numbers)),
  );

  // --- steps and their data

  const chunksOf = (name) => view.chunks.map((c, place) => ({ ...c, place })).filter((c) => data.runs[c.run].name === name);

  function steps() {
    const own = chunksOf(runChoice.made.value);
    const wanted = memory.get("step");
    fill(stepChoice.made, own.map((c) => [String(c.step), `${c.step}${c.left_out ? ` (${c.samples} of ${c.samples + c.left_out} samples)` : ""}`]), own.some((c) => String(c.step) === wanted) ? wanted : String(own.at(-1).step));
  }

  async function unpack(place) {
    const packed = atob(await (data.chunk ? data.chunk(place) : document.getElementById(`chunk-${place}`).textContent));
    const bytes = Uint8Array.from(packed, (c) => c.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
  }

  async function open() {
    const chunk = chunksOf(runChoice.made.value).find((c) => String(c.step) === stepChoice.made.value);
    if (!unpacked.has(chunk.place)) {
      unpacked.set(chunk.place, unpack(chunk.place));
      if (unpacked.size > 4) unpacked.delete(unpacked.keys().next().value); // the oldest goes: twenty runs would fill the memory
    }
    const stays = () => stepChoice.made.value === String(chunk.step) && runChoice.made.value === data.runs[chunk.run].name;
    let value;
    try {
      value = await unpacked.get(chunk.place);
    } catch (error) {
      unpacked.delete(chunk.place); // chosen again, it is asked for again
      if (stays()) nothing(`these samples cannot be had: ${error.message}`);
      return;
    }
    if (!stays()) return; // chosen anew meanwhile
    step = value;
    const brief = (p) => visible(p.text.replace(/\s+/g, " ")).slice(0, 60);
    fill(promptChoice.made, [["", `all ${step.prompts.length}`], ...step.prompts.map((p) => [String(p.number), `${p.number}  ${brief(p)}`])], memory.get("prompt"));
    list();
  }

  function nothing(words) {
    step = chosen = null;
    listed = [];
    drawRows();
    for (const made of [about, scale, text, numbers]) made.replaceChildren();
    count.textContent = words;
  }

  // --- the list: only the rows in view are elements

  // Prompts, samples and updates are called by the numbers they have in rollouts/ and metrics.jsonl, from 0.
  const name = (item) => `${item.prompt.number}.${item.sample.sample}`;

  function list() {
    if (!step) return;
    const only = promptChoice.made.value;
    const key = (ORDERS[orderChoice.made.value] ?? ORDERS.sampled)[1];
    listed = step.prompts.flatMap((prompt) => (only && String(prompt.number) !== only ? [] : prompt.samples.map((sample) => ({ prompt, sample }))));
    if (key) listed = listed.map((item) => [key(item.sample), item]).sort((a, b) => (a[0] === b[0] ? 0 : a[0] - b[0])).map(([, item]) => item);
    const silent = listed.filter((item) => !item.sample.z).length;
    count.textContent = `${listed.length.toLocaleString("en")} samples${silent ? `, ${silent} of them in zero-variance groups` : ""}`;
    box.scrollTop = 0;
    choose(listed.find((item) => name(item) === memory.get("sample")) ?? (key ? listed[0] : listed.find((item) => item.sample.off) ?? listed.find((item) => item.sample.z) ?? listed[0]), false);
  }

  function drawRows() {
    const first = Math.max(0, Math.floor(box.scrollTop / ROW) - 4);
    const last = Math.min(listed.length, Math.ceil((box.scrollTop + (box.clientHeight || 600)) / ROW) + 4);
    rows.style.height = `${listed.length * ROW}px`;
    rows.replaceChildren(...listed.slice(first, last).map((item, i) => {
      const { sample } = item;
      const made = element("div", { class: "row", role: "option", id: `sample-${name(item).replace(".", "-")}`, "aria-selected": String(item === chosen), "aria-setsize": String(listed.length), "aria-posinset": String(first + i + 1), onclick: () => choose(item) },
        element("div", { class: "first" }, element("b", {}, `${name(item)}`), element("span", {}, `reward ${number(sample.reward)}`), element("span", {}, sample.low == null ? "no gate" : `lowest f' ${sample.low.toPrecision(3)}`)),
        element("div", { class: "second" }, sample.heard ? element("span", { class: "many" }, `${counted(turnsOf(sample), "turn")}  `) : null, visible(sample.text.slice(0, 120).replace(/\s+/g, " "))));
      made.style.top = `${(first + i) * ROW}px`;
      return made;
    }));
  }

  function choose(item, told = true) {
    chosen = item;
    if (told) memory.set("sample", name(item));
    const place = listed.indexOf(item);
    if (place * ROW < box.scrollTop) box.scrollTop = place * ROW;
    if ((place + 1) * ROW > box.scrollTop + box.clientHeight) box.scrollTop = (place + 1) * ROW - box.clientHeight;
    box.setAttribute("aria-activedescendant", `sample-${name(item).replace(".", "-")}`);
    drawRows();
    drawSample();
  }

  function rowKey(event) {
    const by = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity }[event.key];
    if (!by || !chosen) return;
    event.preventDefault();
    choose(listed[Math.min(listed.length - 1, Math.max(0, listed.indexOf(chosen) + by))]);
  }

  // --- the chosen sample

  const fact = (title, value) => element("span", {}, element("b", {}, `${title} `), element("span", { class: "value" }, visible(String(value))));

  function shade(value, color) {
    const size = color.of ? color.of(value) : Math.abs(value);
    let level = 0;
    while (level < color.edges.length && size >= color.edges[level]) level += 1;
    return level ? `shade ${(value < 0 && color.down) || color.up}${level}` : "";
  }

  function verdicts(sample) {
    if (!sample.z) return element("span", {}, element("b", {}, "not measured "), sample.dropped ? "its group left the batch" : "its group has zero variance, or it carried no loss");
    const clipped = [...sample.grpo].filter((k) => k === "0").length;
    return [
      fact("measured in", `update ${sample.update}, ${sample.off ? "off policy" : "on policy"}`),
      fact("GRPO 0.2 / 0.27", clipped ? `would clip ${clipped} of ${sample.t.length} tokens` : "would keep every token"),
      fact("GSPO 3e-4 / 4e-4", sample.gspo ? "would keep the response" : "would clip the whole response"),
    ];
  }

  function drawScale(color) {
    const at = [...color.edges].map((edge, i) => [edge, i + 1]);
    const swatches = [
      ...(color.down ? [...at].reverse().map(([edge, level]) => element("i", { class: `shade ${color.down}${level}` }, `-${edge}`)) : []),
      element("i", {}, `< ${color.edges[0]}`),
      ...at.map(([edge, level]) => element("i", { class: `shade ${color.up}${level}` }, String(edge))),
    ];
    scale.replaceChildren(element("span", {}, `${color.text}: `), ...swatches,
      element("i", { class: "gap clip-grpo" }, "GRPO clips"), element("i", { class: "clip-gspo" }, "GSPO clips"));
  }

  // The run of tokens that a picture is, as one cell: its thumbnail, and how many tokens in what grid.
  function cell(shown) {
    const uri = view.thumbnails[shown.hash];
    const tokens = shown.token == null ? null : `${shown.token} ${shown.token === 1 ? "token" : "tokens"}${shown.grid ? `, ${shown.grid.join("×")}` : ""}`;
    const title = [`SHA-256 ${shown.hash}`, shown.size ? `${shown.size.join(" × ")} pixels` : null, tokens].filter(Boolean).join("\n");
    return element("span", { class: "picture", title, tabindex: "0" }, uri ? element("img", { src: uri, alt: `picture ${shown.hash.slice(0, 8)}` }) : element("code", {}, shown.hash.slice(0, 8)), tokens ? element("small", {}, tokens) : null);
  }

  // Where the question has a marker for each picture they stand there, else before it.
  function question(prompt) {
    const shown = prompt.pictures ?? [];
    const parts = prompt.text.split("<image>");
    if (!shown.length) return [visible(prompt.text)];
    if (parts.length !== shown.length + 1) return [...shown.map(cell), visible(prompt.text)];
    return parts.flatMap((part, i) => (i ? [cell(shown[i - 1]), visible(part)] : [visible(part)]));
  }

  // An episode: turns are runs of own tokens, and what was said between them stands before the next one. That is no
  // token of the policy's: it has no gate, and nothing to point at.
  const counted = (n, what) => `${n.toLocaleString("en")} ${what}${n === 1 ? "" : "s"}`;
  const turnsOf = (sample) => new Set([0, ...sample.heard.map(([at]) => at)].filter((at) => at < sample.t.length)).size;

  function between(sample, i, turn) {
    const made = [];
    for (const [at, said, forgot] of sample.heard) {
      if (at !== i) continue;
      if (forgot) made.push(element("span", { class: "forgot" }, `forgot ${counted(forgot, "token")}`));
      for (const [who, words] of said) made.push(element("span", { class: "heard" }, element("b", {}, visible(who)), element("span", { class: "said", dir: "auto" }, visible(words))));
    }
    if (turn && i < sample.t.length) made.push(element("span", { class: "turn" }, `turn ${turn}`, sample.turns ? element("span", {}, `advantage ${number(sample.turns[turn - 1])}`) : null));
    return made;
  }

  function drawSample() {
    if (!chosen) return;
    const started = performance.now();
    const { prompt, sample } = chosen;
    const color = COLORS[colorChoice.made.value] ?? COLORS.z;
    about.replaceChildren(
      element("div", { class: "facts" }, fact("prompt", `${prompt.number}, sample ${sample.sample}`), prompt.id === String(prompt.number) ? null : fact("prompt_id", prompt.id), fact("task", prompt.task), fact("reward", number(sample.reward)), sample.shaped == null ? null : fact("reward for the advantage", number(sample.shaped)), fact("advantage", number(sample.advantage)),
        fact("status", sample.status.replace("_", " ")), fact("tokens", sample.t.length.toLocaleString("en")), sample.heard ? fact("turns", turnsOf(sample).toLocaleString("en")) : null, sample.finish === "length" ? fact("ended", "cut at the limit") : null,
        verdicts(sample), prompt.answer == null ? null : fact("answer", prompt.answer), sample.detail ? fact("detail", sample.detail) : null),
      element("pre", { class: "question", tabindex: "0", dir: "auto" }, ...question(prompt)));
    drawScale(color);
    const values = sample[color.key];
    const parts = document.createDocumentFragment();
    const begins = new Set(sample.heard ? [0, ...sample.heard.map(([at]) => at)] : []);
    let turn = 0;
    spans = [];
    sample.t.forEach((place, i) => {
      if (begins.has(i)) parts.append(...between(sample, i, (turn += 1)));
      const written = step.texts[place];
      const classes = ["tok"];
      if (values) classes.push(shade(values[i], color));
      if (sample.grpo?.[i] === "0") classes.push("clip-grpo");
      if (sample.gspo === 0) classes.push("clip-gspo");
      if (!written) classes.push("empty");
      const made = element("span", { class: classes.filter(Boolean).join(" "), id: `tok-${i}` });
      spans.push(made);
      made.append(written ? visible(written).replaceAll("\n", "⏎\n").replaceAll("\t", "⇥\t") : "·");
      parts.append(made);
    });
    if (begins.has(sample.t.length)) parts.append(...between(sample, sample.t.length, 0)); // what got no answer
    text.replaceChildren(parts);
    text.scrollTop = 0;
    at = -1;
    if (!values) scale.append(element("span", { class: "gap" }, `${color.words}: not measured of this sample`));
    show(0, false);
    text.offsetHeight; // the time is that until it is laid out
    root.dataset.milliseconds = String(performance.now() - started);
  }

  // --- one token's numbers

  function show(i, mark = true) {
    const { sample } = chosen;
    if (i < 0 || i >= sample.t.length) return;
    text.querySelector(".at")?.classList.remove("at");
    at = i;
    const token = spans[i];
    if (mark) {
      token.classList.add("at");
      text.setAttribute("aria-activedescendant", token.id);
    }
    const z = sample.z?.[i];
    const kept = (flag) => (flag ? "kept" : "clipped");
    const all = [
      ["token", `${i + 1} of ${sample.t.length}`], ["text", JSON.stringify(visible(step.texts[sample.t[i]]))],
      ["log π_old", number(sample.p[i])], ["log r", number(z)], ["r", z == null ? "not measured" : number(Math.exp(z))], ["gate weight f'", number(sample.w?.[i])],
      ["slope f' r A", number(sample.a?.[i])], ["entropy", number(sample.e?.[i])],
      ["GRPO", sample.grpo ? kept(sample.grpo[i] === "1") : "not measured"], ["GSPO", sample.gspo == null ? "not measured" : kept(sample.gspo)],
    ];
    numbers.replaceChildren(...all.map(([title, value]) => element("span", {}, element("b", {}, `${title} `), element("span", { class: title === "text" ? "what" : "value" }, value))));
  }

  function hovered(event) {
    const token = event.target.closest(".tok");
    if (token) show(Number(token.id.slice(4)));
  }

  function tokenKey(event) {
    const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity }[event.key];
    if (!by || !chosen) return;
    event.preventDefault();
    const last = chosen.sample.t.length - 1;
    show(Math.min(last, Math.max(0, (text.querySelector(".at") ? at : -1) + by)));
    spans[at].scrollIntoView({ block: "nearest" });
  }

  // --- begin

  const preset = (select, key) => { if ([...select.options].some((o) => o.value === memory.get(key))) select.value = memory.get(key); };
  preset(runChoice.made, "run");
  preset(colorChoice.made, "color");
  preset(orderChoice.made, "order");
  steps();
  // What is looked at stays when the view is made anew with further steps; untouched, it goes with the newest step.
  let touched = false;
  for (const kind of ["pointerdown", "keydown"]) root.addEventListener(kind, () => { touched = true; });
  const hold = () => {
    if (!touched || !chosen) return;
    for (const [key, value] of [["run", runChoice.made.value], ["step", stepChoice.made.value], ["sample", name(chosen)]]) memory.set(key, value);
  };
  return { ready: open(), open, hold };
}
