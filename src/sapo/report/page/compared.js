"use strict";
// A comparison: what it says in words, its tables with the figures of results.json, and every run.

function showComparison(made, { element, table, card, fixed, number, dot, words }) {
  const { results } = made;
  const arms = Object.keys(results.arms);
  const rates = results.learning_rates;
  const tasks = [...new Set(results.cells.map((c) => c.task))];
  const none = (text) => element("span", { class: "none" }, text);
  const rate = (value) => value.toExponential().replace("e+", "e");
  const interval = (e, sign = "") => {
    const shown = (v) => (sign && v >= 0 ? sign : "") + fixed(v);
    return element("span", { class: "estimate" }, element("b", {}, shown(e.value)), ` [${shown(e.low)}, ${shown(e.high)}]`);
  };
  const difference = (cell) => {
    if (cell.difference == null) return none(cell.arm === results.baseline ? "baseline" : "no pair of seeds yet");
    const span = interval(cell.difference, "+");
    if (cell.difference.low > 0) span.classList.add("above");
    if (cell.difference.high < 0) span.classList.add("below");
    return span;
  };
  const colorOf = (arm) => made.colors[arm] ?? arms.indexOf(arm);
  const named = (arm) => element("span", {}, dot(colorOf(arm)), arm);
  const runsOf = (cell) => results.runs.filter((r) => r.arm === cell.arm && r.learning_rate === cell.learning_rate);
  const ended = (run) => ["finished", "failed"].includes(run.state);
  const finals = (cell) => runsOf(cell).filter((r) => ended(r) && r.tasks[cell.task]).map((r) => (r.state === "failed" ? "x" : fixed(r.tasks[cell.task].final).replace(/^0/, ""))).join(" ");
  const count = (value) => number(value, 0);
  const of = (run, task) => run.tasks[task];
  const figure = (task) => results.figures?.[task] ?? "pass@1";
  const graded = tasks.filter((task) => figure(task) !== "pass@1");

  function cells(task) {
    return table([
      { name: "arm", words: true, of: (c) => named(c.arm), by: (c) => arms.indexOf(c.arm) },
      ...(rates.length > 1 ? [{ name: "learning rate", of: (c) => rate(c.learning_rate), by: (c) => c.learning_rate }] : []),
      { name: `final ${figure(task)}`, of: (c) => interval(c.final), by: (c) => c.final.value },
      { name: `less ${results.baseline}`, of: difference, by: (c) => c.difference?.value ?? null },
      { name: "best", of: (c) => interval(c.best), by: (c) => c.best.value },
      { name: "start", of: (c) => interval(c.start), by: (c) => c.start.value },
      { name: "collapsed", of: (c) => `${c.collapsed} of ${c.seeds.length}`, by: (c) => c.collapsed / c.seeds.length },
      { name: "final of each seed", words: true, of: finals },
      { name: "tokens", of: (c) => count(c.tokens.generated), by: (c) => c.tokens.generated ?? null },
      { name: "seconds", of: (c) => count(c.timing?.seconds?.total), by: (c) => c.timing?.seconds?.total ?? null },
    ], results.cells.filter((c) => c.task === task));
  }

  function tuned(task) {
    return [
      element("h4", {}, "Each arm at its best learning rate"),
      table([
        { name: "arm", words: true, of: (t) => named(t.arm), by: (t) => arms.indexOf(t.arm) },
        { name: "learning rate", of: (t) => rate(t.learning_rate), by: (t) => t.learning_rate },
        { name: `final ${figure(task)}`, of: (t) => interval(t.final), by: (t) => t.final.value },
        { name: `less ${results.baseline} at its own best`, of: difference, by: (t) => t.difference?.value ?? null },
      ], results.tuned.filter((t) => t.task === task)),
      element("p", { class: "note" }, `The rate of the highest final ${figure(task)} on average. It was chosen on the problems it is judged by, so it is a little too good, for every arm alike.`),
    ];
  }

  function everyRun(task) {
    return table([
      { name: "run", words: true, of: (r) => element("span", {}, dot(colorOf(r.arm)), r.name), by: (r) => r.name },
      { name: "state", words: true, of: (r) => (r.state === "finished" ? "finished" : r.state === "to come" ? none("to come") : element("span", { class: r.state === "failed" ? "below" : null }, `${r.state === "failed" ? "failed" : "under way"}, step ${r.steps}`)), by: (r) => r.state },
      { name: "start", of: (r) => (of(r, task) ? fixed(of(r, task).start) : ""), by: (r) => of(r, task)?.start ?? null },
      { name: "best (step)", of: (r) => (of(r, task) ? `${fixed(of(r, task).best)} (${of(r, task).best_step})` : ""), by: (r) => of(r, task)?.best ?? null },
      { name: "final", of: (r) => (of(r, task)?.final == null ? "" : fixed(of(r, task).final)), by: (r) => of(r, task)?.final ?? null },
      { name: "collapsed", words: true, of: (r) => (of(r, task)?.collapsed == null ? "" : of(r, task).collapsed ? element("b", { class: "below" }, "yes") : "no"), by: (r) => String(of(r, task)?.collapsed) },
      { name: "early warnings", words: true, long: true, of: (r) => (r.state === "to come" ? "" : r.warnings == null ? none("not counted") : Object.entries(r.warnings).map(([cause, n]) => `${words(cause)} ${n}`).join(", ") || "none"), by: (r) => Object.values(r.warnings ?? {}).reduce((a, b) => a + b, 0) },
      { name: "tokens", of: (r) => (r.tokens.generated == null ? "" : count(r.tokens.generated)), by: (r) => r.tokens.generated ?? null },
      { name: "seconds", of: (r) => (r.timing?.seconds?.total == null ? "" : count(r.timing.seconds.total)), by: (r) => r.timing?.seconds?.total ?? null },
    ], results.runs);
  }

  function median(sorted) {
    const half = sorted.length >> 1;
    return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
  }

  function alarms(task) {
    const all = results.warnings?.[task];
    const causes = made.alarms[task];
    const made_ = [element("h4", {}, "Early warnings and collapses")];
    if (!all) return [...made_, element("p", { class: "note" }, "Not measured: results.json does not count them.")];
    made_.push(element("p", {}, `${all.detected} of ${all.collapsed} collapsed runs were warned (detected), and ${all.false_alarms} of ${all.healthy} healthy ones (false alarms).${causes.length ? " By cause:" : ""}`));
    if (causes.length) {
      made_.push(table([
        { name: "cause", words: true, of: (a) => words(a.cause), by: (a) => a.cause },
        { name: "collapsed runs warned", of: (a) => `${a.detected} of ${a.collapsed}`, by: (a) => a.detected },
        { name: "healthy runs warned", of: (a) => `${a.false_alarms} of ${a.healthy}`, by: (a) => a.false_alarms },
      ], causes));
    } else made_.push(element("p", { class: "note" }, "No early warning in any run."));
    const ahead = (all.collapses ?? []).map((c) => c.lead).filter((lead) => lead >= 0).sort((a, b) => a - b);
    if (ahead.length) made_.push(element("p", {}, `The first warning came no later than the collapse showed in ${all.in_time} of ${all.detected}: ${ahead[0]} to ${ahead.at(-1)} steps ahead, ${median(ahead)} in the median.`));
    const setUp = Object.entries(all.set_up ?? {});
    if (setUp.length) made_.push(element("p", { class: "note" }, `Warnings about the set-up, which predict no collapse: ${setUp.map(([cause, n]) => `${words(cause)} in ${n}`).join(", ")}.`));
    return made_;
  }

  const legend = "Means over seeds with 95% bootstrap intervals over seeds and problems; differences are paired by seed and problem, and coloured where the interval excludes 0. best: the highest evaluation of each run, a maximum and flattering. collapsed: the last pass@1 is below half of the run's best, or below its start by more than its problems explain; or the run failed, and its last pass@1 counts as 0 (x)."
    + (graded.length ? ` Rewards on ${graded.join(", ")} are not only 0 and 1: there the mean reward stands for pass@1, and collapsed is a run that has lost more than half of what it had gained over its start, or ended below it, by more than its problems explain.` : "")
    + (made.few_seeds ? ` With ${results.seeds.length} ${results.seeds.length === 1 ? "seed" : "seeds"} the intervals are too narrow: one that excludes 0 is a reason to run more seeds, not yet a result.` : "")
    + ` Figures of ${made.source}.`;
  const failed = results.runs.filter((r) => r.state === "failed");
  return [
    element("ul", { class: "sentences" }, made.words.map((text) => element("li", {}, text))),
    ...(tasks.length ? [] : [element("p", { class: "note" }, "No run has ended yet: the table begins with the first that does.")]),
    ...tasks.flatMap((task) => [element("h3", {}, `${task}: every arm${rates.length > 1 ? " at every learning rate" : ""}`), cells(task), ...(rates.length > 1 ? tuned(task) : [])]),
    ...(tasks.length ? [element("p", { class: "note" }, legend)] : []),
    element("div", { class: "grid" }, made.figures.map(card)),
    ...tasks.flatMap((task) => [...alarms(task), element("h3", {}, `${task}: every run`), everyRun(task)]),
    ...(tasks.length ? [] : [element("h3", {}, "Every run"), everyRun("")]),
    ...(failed.length ? [element("ul", { class: "sentences" }, failed.map((r) => element("li", {}, `${r.name} failed: ${r.reason}`)))] : []),
  ];
}
