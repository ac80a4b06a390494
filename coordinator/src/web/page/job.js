// One job: where it stands, its curves, and what happened to it.

import { drawChart } from "./chart.js";
import { h } from "./dom.js";
import { accuracy, ago, between, bytes, count, dash, duration, loss, number, percent, plural, share, speed, time } from "./format.js";
import { badge, hasEnded, progress, ranks, tone } from "./jobs.js";

const fact = (name, value, detail) =>
  h("div", { class: "fact" }, h("dt", {}, name), h("dd", {}, value), detail ? h("dd", { class: "detail" }, detail) : null);

const section = (id, title, detail, ...content) =>
  h(
    "section",
    { "aria-labelledby": id, "data-key": id },
    h("div", { class: "heading" }, h("h2", { id }, title), detail ? h("p", { class: "muted" }, detail) : null),
    ...content,
  );

const grid = (label, columns, rows) =>
  h(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": label },
    h(
      "table",
      {},
      h("caption", { class: "unseen" }, label),
      h("thead", {}, h("tr", {}, columns.map(([text, style]) => h("th", { scope: "col", class: style }, text)))),
      h("tbody", {}, rows),
    ),
  );

const empty = (text) => h("p", { class: "empty small" }, text);

const facts = (job, now) => {
  const epochs = job.spec?.train?.num_epoch ?? 0;
  const end = hasEnded(job)
    ? fact("Took", duration(between(job.submitted_at, job.ended_at)), `ended ${time(job.ended_at)}`)
    : fact("Time left", duration(job.eta_seconds), `submitted ${ago(Date.parse(job.submitted_at), now)}`);
  return h(
    "dl",
    { class: "facts" },
    fact("Loss", loss(job.loss), `learning rate ${number(job.learning_rate)}`),
    fact("Samples/s", hasEnded(job) ? dash(null) : speed(job.samples_per_second)),
    end,
    fact("Epoch", job.total_steps > 0 ? `${count(Math.min(job.epoch + 1, Math.max(epochs, 1)))} of ${count(epochs)}` : dash(null)),
    fact("Ranks", ranks(job), `generation ${count(job.generation)}`),
    fact(
      "Checkpoint",
      job.checkpoint_step === null ? dash(null) : `step ${count(job.checkpoint_step)}`,
      job.checkpoint_step === null ? "none committed yet" : `${plural(job.step - job.checkpoint_step, "step")} since`,
    ),
  );
};

const bar = (job) =>
  h(
    "div",
    { class: "progress whole" },
    progress(job),
    h(
      "span",
      { class: "detail" },
      h("span", {}, job.total_steps > 0 ? `step ${count(job.step)} of ${count(job.total_steps)}` : "not begun"),
      h("span", {}, share(job.step, job.total_steps)),
    ),
  );

const rankTable = (job) => {
  const slow = new Map(job.stragglers.map((straggler) => [straggler.rank, straggler.line]));
  return job.ranks.length === 0
    ? empty("No ranks yet.")
    : grid(
        "Ranks of the newest generation",
        [["Rank", "num"], ["Node"], ["Process", "num"], ["Classes", "num"], ["State", "rest"]],
        job.ranks.map((rank) =>
          h(
            "tr",
            { "data-key": rank.rank },
            h("th", { scope: "row", class: "num" }, count(rank.rank)),
            h("td", {}, rank.node),
            h("td", { class: "num" }, rank.pid === null ? dash(null) : String(rank.pid)),
            h(
              "td",
              { class: "num" },
              rank.class_hi === null ? dash(null) : `${count(rank.class_lo)} \u2013 ${count(rank.class_hi - 1)}`,
            ),
            h("td", {}, rank.state, slow.has(rank.rank) ? h("span", { class: "reason warn" }, slow.get(rank.rank)) : null),
          ),
        ),
      );
};

const recoveryList = (job) =>
  job.recoveries.length === 0
    ? empty("Nothing has failed.")
    : h(
        "ol",
        { class: "events", reversed: true },
        job.recoveries
          .map((recovery, index) =>
            h(
              "li",
              { "data-key": index },
              h("span", { class: `state ${recovery.total_s === null && !hasEnded(job) ? "warn" : "calm"}` }, recovery.kind),
              h("span", { class: "line" }, recovery.line),
              h("time", { class: "muted", datetime: recovery.detected_at }, time(recovery.detected_at)),
            ),
          )
          .reverse(),
      );

const tightest = (evaluation) => {
  const rates = Object.entries(evaluation.tar_at_far ?? {}).sort(([a], [b]) => Number(a) - Number(b));
  return rates.length > 0 ? `${accuracy(rates[0][1])} at ${rates[0][0]}` : dash(null);
};

const evaluationTable = (evaluations) =>
  grid(
    "Evaluations, newest first",
    [["Step", "num"], ["Set"], ["Accuracy", "num"], ["\u00b1", "num"], ["TAR at FAR", "num wide"], ["Pairs", "num wide"], ["Norm", "num wide"], ["Took", "num wide"]],
    evaluations.toReversed().map((evaluation) =>
      h(
        "tr",
        { "data-key": `${evaluation.step}/${evaluation.dataset}` },
        h("th", { scope: "row", class: "num" }, count(evaluation.step)),
        h("td", {}, evaluation.dataset),
        h("td", { class: "num" }, h("strong", {}, accuracy(evaluation.accuracy))),
        h("td", { class: "num" }, accuracy(evaluation.accuracy_std)),
        h("td", { class: "num wide" }, tightest(evaluation)),
        h("td", { class: "num wide" }, count(evaluation.pairs)),
        h("td", { class: "num wide" }, number(evaluation.xnorm)),
        h("td", { class: "num wide" }, duration(evaluation.seconds)),
      ),
    ),
  );

const checkpointTable = (checkpoints) =>
  checkpoints.length === 0
    ? empty("None committed yet.")
    : grid(
        "Checkpoints, newest first",
        [["Step", "num"], ["Directory"], ["Size", "num"], ["Generation", "num wide"], ["Ranks", "num wide"], ["Committed", "wide"]],
        checkpoints.map((checkpoint) =>
          h(
            "tr",
            { "data-key": `${checkpoint.step}/${checkpoint.generation}` },
            h("th", { scope: "row", class: "num" }, count(checkpoint.step)),
            h(
              "td",
              { class: "mono" },
              checkpoint.directory,
              checkpoint.damage ? h("span", { class: "reason bad" }, `damaged: ${checkpoint.damage.detail}`) : null,
            ),
            h("td", { class: "num" }, bytes(checkpoint.bytes)),
            h("td", { class: "num wide" }, count(checkpoint.generation)),
            h("td", { class: "num wide" }, count(checkpoint.world_size)),
            h("td", { class: "wide" }, h("time", { datetime: checkpoint.committed_at }, time(checkpoint.committed_at))),
          ),
        ),
      );

const chart = (name) => h("div", { class: "chart", "data-own": name, "data-key": name });

const heading = (job) => [
  h("nav", { class: "crumbs", "aria-label": "Where this is" }, h("a", { href: "#/" }, "Jobs"), h("span", { "aria-hidden": "true" }, "/"), h("span", {}, job.id)),
  h("div", { class: "heading" }, h("h1", {}, dash(job.name)), badge(job.state)),
  job.reason ? h("p", { class: `reason whole ${tone(job.state)}` }, job.reason) : null,
];

/** Lines by data set, from results in the order in which they came: a later one replaces an earlier one of its step. */
const bySet = (evaluations) => {
  const sets = new Map();
  for (const { dataset, step, accuracy: value } of evaluations) {
    if (!sets.has(dataset)) sets.set(dataset, new Map());
    sets.get(dataset).set(step, value);
  }
  return [...sets].map(([name, points]) => ({ name, points: [...points].sort(([a], [b]) => a - b) }));
};

const marksOf = (job) =>
  job.recoveries
    .filter(({ resumed_step: step }) => step !== null)
    .map(({ resumed_step: step, line }) => ({ step, text: line }));

/** What was loaded before and need not be loaded again, of the job that is shown. */
let kept = { id: null };

/** The page of one job. */
export const jobPage = {
  name: "jobs",
  title: ({ job }) => `${job.name ?? job.id} \u00b7 ${job.state}`,

  async load({ ask, id, cluster }) {
    const path = `jobs/${encodeURIComponent(id)}`;
    const job = await ask(path);
    if (kept.id !== job.id) kept = { id: job.id };
    const trained = `${cluster.epoch}/${job.generation}/${job.step}`;
    if (kept.trained !== trained) {
      kept.curve = await ask(`${path}/curve`);
      kept.trained = trained;
    }
    const happened = `${cluster.epoch}/${job.history}`;
    if (kept.happened !== happened) {
      kept.evaluations = (await ask(`${path}/evaluations`)).evaluations;
      kept.checkpoints = (await ask(`${path}/checkpoints`)).checkpoints;
      kept.happened = happened;
    }
    return { job, curve: kept.curve, evaluations: kept.evaluations, checkpoints: kept.checkpoints };
  },

  render({ data: { job, curve, evaluations, checkpoints }, now }) {
    const late = curve.first_step > (job.spec?.train?.frequent ?? 0);
    return [
      ...heading(job),
      bar(job),
      facts(job, now),
      h("h2", { class: "unseen" }, "Curves"),
      h("div", { class: "charts", "data-key": "curves" }, chart("loss"), chart("speed")),
      late ? h("p", { class: "muted note" }, `Curves begin at step ${count(curve.first_step)}: what was before it went with another coordinator.`) : null,
      section(
        "recoveries",
        "Recoveries",
        job.recoveries.length > 0 ? plural(job.recoveries.length, "failure") : null,
        recoveryList(job),
      ),
      section("ranks", "Ranks", job.ranks.length > 0 ? `generation ${count(job.generation)}` : null, rankTable(job)),
      section(
        "evaluations",
        "Evaluations",
        null,
        evaluations.length > 0
          ? [h("div", { class: "charts one", "data-key": "accuracies" }, chart("accuracy")), evaluationTable(evaluations)]
          : empty("None yet."),
      ),
      section("checkpoints", "Checkpoints", dash(job.spec?.checkpoint?.location ?? job.output), checkpointTable(checkpoints)),
      h(
        "details",
        { "data-key": "settings" },
        h("summary", {}, "Settings of the job"),
        h("pre", { tabindex: "0", "aria-label": "Settings of the job" }, JSON.stringify(job.spec, null, 2)),
      ),
    ].filter(Boolean);
  },

  after(main, { job, curve, evaluations }) {
    const column = (values) => curve.step.map((step, index) => [step, values[index]]);
    const marks = marksOf(job);
    const none = hasEnded(job) ? "No points are kept of this job." : "No points yet: they come with the first log interval.";
    const draw = (name, data) => {
      const element = main.querySelector(`[data-own="${name}"]`);
      if (element) drawChart(element, { marks, none, ...data });
    };
    draw("loss", { title: "Loss", series: [{ name: "loss", points: column(curve.loss) }], format: loss });
    draw("speed", {
      title: "Speed",
      unit: "samples/s",
      series: [{ name: "speed", points: column(curve.samples_per_second) }],
      format: speed,
      zero: true,
    });
    draw("accuracy", { title: "Accuracy", series: bySet(evaluations), format: accuracy, tick: percent, dots: true, marks: [] });
  },

  states: ({ job }) => new Map([[job.id, { name: job.name ?? job.id, state: job.state }]]),
};
