"use strict";
// The part of a served page that changes by the second: what each run is doing and what it has just sampled. News come
// over one stream of events; a new report is taken in place.

(() => {
  const { data, update, element } = window.sapoReport;
  const now = element("section", { id: "now", "aria-label": "what the runs are doing" });
  document.getElementById("title").after(now);
  const trouble = element("p", { id: "trouble", role: "alert", hidden: "" });
  now.before(trouble);
  const label = element("span", {}, "connecting");
  const pause = element("button", { type: "button", id: "pause", "aria-pressed": "false", onclick: () => { paused = !paused; show(); if (!paused) catchUp(); } }, "Pause");
  document.getElementById("live").append(label, pause);
  const cards = new Map(); // run -> its card
  let paused = false;
  let newest = null; // the last news of the runs
  let connected = false;
  let waiting = null; // version of a report that was not fetched yet
  let fetching = false;
  let again = null; // a timer, after an answer that was none

  const WORDS = { running: "running", done: "done", failed: "failed", stopped: "not running" };
  const PHASES = { generate: "sampling", score: "scoring", logprobs: "log-probabilities", update: "updating", diagnose: "measuring", evaluate: "evaluating", checkpoint: "saving a checkpoint", starting: "starting" };
  const clock = (seconds) => (seconds < 60 ? `${Math.floor(seconds)} s` : seconds < 3600 ? `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s` : `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`);
  const figure = (value) => (Math.abs(value) >= 1e-3 || value === 0 ? String(+value.toPrecision(4)) : value.toExponential(2));

  function show() {
    const ended = newest && newest.runs.every((r) => ["done", "failed"].includes(r.state));
    const cannot = newest?.trouble ?? "";
    if (trouble.textContent !== cannot) trouble.textContent = cannot; // an alert is read out once
    trouble.hidden = !cannot;
    label.textContent = !connected ? "connection lost; trying again" : cannot ? "cannot read the runs" : paused ? "paused" : ended ? "every run has ended" : "live";
    label.dataset.state = !connected || cannot ? "lost" : paused || ended ? "still" : "live";
    pause.textContent = paused ? "Go on" : "Pause";
    pause.setAttribute("aria-pressed", String(paused));
  }

  function cardOf(run) {
    if (!cards.has(run.name)) {
      const made = { state: element("span", { class: "state" }), step: element("span", { class: "step" }), phase: element("span", { class: "phase" }), bar: element("i", {}), figures: element("dl", { class: "latest" }), samples: element("div", { class: "samples" }) };
      made.bars = element("div", { class: "bar", role: "progressbar", "aria-label": `steps of ${run.name}`, "aria-valuemin": "0" }, made.bar);
      made.fresh = element("details", { class: "fresh" }, element("summary", {}, "samples of this step"), made.samples);
      made.fresh.open = cards.size === 0; // of the first run; of twenty they would fill the page
      made.all = element("article", { class: "going" }, element("h3", {}, run.name, made.state), element("div", { class: "doing" }, made.step, made.phase), made.bars, made.figures, made.fresh);
      cards.set(run.name, made);
      now.append(made.all);
    }
    return cards.get(run.name);
  }

  function sample(row) {
    const others = row.rewards.length > 1 ? `, group ${row.rewards.map(figure).join(" ")}` : "";
    return element("div", { class: "one" },
      element("div", { class: "meta" }, element("b", {}, `reward ${figure(row.reward)}`), element("span", {}, `${others}${row.status === "scored" ? "" : `, ${row.status.replace("_", " ")}`}, ${row.tokens} tokens`)),
      element("pre", { class: "asked", dir: "auto" }, row.prompt),
      ...(row.transcript?.length ? row.transcript.map(said) : [element("pre", { class: "answered", dir: "auto" }, row.text, row.cut ? " ..." : null)]));
  }

  function said([who, words]) {
    if (who === "policy") return element("pre", { class: "answered", dir: "auto" }, words);
    return element("pre", { class: "heard", dir: "auto" }, element("b", {}, who === "history" ? "" : `${who} `), words);
  }

  function draw(news) {
    for (const run of news.runs) {
      const made = cardOf(run);
      made.all.dataset.state = run.state;
      made.state.textContent = WORDS[run.state] ?? run.state;
      const going = run.live && run.state === "running";
      made.step.textContent = going && run.live.step ? `step ${run.live.step}${run.planned ? ` of ${run.planned}` : ""}` : `${run.steps}${run.planned ? ` of ${run.planned}` : ""} steps`;
      const update = going && run.live.phase === "update" && run.live.updates ? ` ${run.live.update} of ${run.live.updates}` : "";
      made.phase.textContent = going ? `${PHASES[run.live.phase] ?? run.live.phase}${update}` : run.reason ?? "";
      if (going) made.phase.dataset.since = run.live.since - news.now + Date.now() / 1000;
      else delete made.phase.dataset.since;
      made.bars.setAttribute("aria-valuenow", run.steps);
      if (run.planned) made.bars.setAttribute("aria-valuemax", run.planned);
      made.bar.style.width = `${run.planned ? Math.min(100, (100 * run.steps) / run.planned) : 0}%`;
      made.figures.replaceChildren(...run.figures.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, figure(value)))));
      const rows = run.live?.samples ?? [];
      made.fresh.hidden = !rows.length;
      const key = JSON.stringify(rows);
      if (made.shown !== key) {
        made.shown = key;
        made.fresh.querySelector("summary").textContent = `samples of step ${run.live?.sampled_in ?? run.live?.step ?? ""}`;
        made.samples.replaceChildren(...rows.map(sample));
      }
    }
    tick();
  }

  function tick() {
    for (const made of cards.values()) {
      const since = made.phase.dataset.since;
      if (!since) { made.phase.removeAttribute("data-for"); continue; }
      made.phase.setAttribute("data-for", `, ${clock(Math.max(0, Date.now() / 1000 - Number(since)))}`);
    }
  }

  async function fetchReport() {
    if (fetching || paused || waiting === null || waiting === data.served) return;
    fetching = true;
    clearTimeout(again);
    const before = data.served;
    try {
      const answer = await fetch("report.json");
      if (!answer.ok) throw new Error(answer.statusText);
      const fresh = await answer.json();
      if (!paused) update(fresh);
    } catch {
      // Whether the server is there, its stream of events says.
    } finally {
      fetching = false;
      show();
    }
    if (paused || waiting <= data.served) return;
    if (data.served !== before) fetchReport();
    else again = setTimeout(fetchReport, 2000); // a server that is busy or gone is not asked without a rest
  }

  function catchUp() {
    if (newest) draw(newest);
    fetchReport();
  }

  const source = new EventSource(`events?report=${data.served}`);
  source.addEventListener("open", () => { connected = true; show(); });
  source.addEventListener("error", () => { connected = false; show(); });
  source.addEventListener("live", (event) => { newest = JSON.parse(event.data); if (!paused) draw(newest); show(); });
  source.addEventListener("report", (event) => { waiting = JSON.parse(event.data); fetchReport(); });
  setInterval(() => { if (!paused) tick(); }, 1000);
  show();
})();
