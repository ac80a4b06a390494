// The list of jobs.

import { h } from "./dom.js";
import { ago, count, dash, duration, loss, share, speed, time } from "./format.js";
import { totals } from "./cluster.js";

/** Colour of a job's state: it is said in words, too. */
export const tone = (state) =>
  ({
    running: "good",
    starting: "busy",
    recovering: "warn",
    cancelling: "warn",
    succeeded: "done",
    failed: "bad",
  })[state] ?? "calm";

/** A state as a badge. */
export const badge = (state) => h("span", { class: `state ${tone(state)}` }, state);

/** Where a job's own page is. */
export const linkOf = (id) => `#/jobs/${encodeURIComponent(id)}`;

/** How far a job is, as a bar. */
export const progress = (job) =>
  h("progress", {
    max: job.total_steps || 1,
    value: job.total_steps ? job.step : 0,
    class: tone(job.state),
    "aria-label": `${job.name ?? job.id}: step ${job.step} of ${job.total_steps}`,
  });

const ENDED = ["succeeded", "failed", "cancelled"];

/** True once nothing more will happen to a job. */
export const hasEnded = (job) => ENDED.includes(job.state);

/** Ranks that a job has, and those that it asked for if they are others. */
export const ranks = (job) =>
  job.generation > 0 && job.world_size === job.world_size_wanted
    ? count(job.world_size)
    : `${count(job.world_size)} of ${count(job.world_size_wanted)}`;

const steps = (job) =>
  job.total_steps > 0
    ? h(
        "div",
        { class: "progress" },
        progress(job),
        h(
          "span",
          { class: "detail" },
          h("span", {}, `${count(job.step)} / ${count(job.total_steps)}`),
          h("span", {}, share(job.step, job.total_steps)),
        ),
      )
    : h("span", { class: "muted" }, dash(null));

const row = (job, now) => {
  const lives = !hasEnded(job);
  const submitted = Date.parse(job.submitted_at);
  return h(
    "tr",
    { "data-key": job.id },
    h(
      "th",
      { scope: "row" },
      h("a", { href: linkOf(job.id), class: "name" }, dash(job.name)),
      h("span", { class: "id" }, job.id),
      job.reason ? h("span", { class: `reason ${tone(job.state)}` }, job.reason) : null,
    ),
    h("td", {}, badge(job.state)),
    h("td", {}, steps(job)),
    h("td", { class: "num" }, loss(job.loss)),
    h("td", { class: "num wide" }, lives ? speed(job.samples_per_second) : dash(null)),
    h("td", { class: "num" }, duration(job.eta_seconds)),
    h("td", { class: "num wide" }, ranks(job)),
    h("td", { class: "num wider" }, count(job.generation)),
    h("td", { class: "wider" }, h("time", { datetime: job.submitted_at, title: time(job.submitted_at) }, ago(submitted, now))),
  );
};

const table = (jobs, now) =>
  h(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": "Jobs" },
    h(
      "table",
      {},
      h("caption", { class: "unseen" }, "Jobs, newest first"),
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          h("th", { scope: "col" }, "Job"),
          h("th", { scope: "col" }, "State"),
          h("th", { scope: "col" }, "Progress"),
          h("th", { scope: "col", class: "num" }, "Loss"),
          h("th", { scope: "col", class: "num wide" }, "Samples/s"),
          h("th", { scope: "col", class: "num" }, "Time left"),
          h("th", { scope: "col", class: "num wide" }, "Ranks"),
          h("th", { scope: "col", class: "num wider" }, "Generation"),
          h("th", { scope: "col", class: "wider" }, "Submitted"),
        ),
      ),
      h("tbody", {}, jobs.map((job) => row(job, now))),
    ),
  );

const hrefOf = (live, after) => {
  const words = [live ? "state=live" : null, after ? `after=${encodeURIComponent(after)}` : null].filter(Boolean);
  return words.length > 0 ? `#/?${words.join("&")}` : "#/";
};

const empty = (live, after) => {
  if (after) return h("p", { class: "empty" }, "No older jobs.");
  return live
    ? h("p", { class: "empty" }, "No job waits or runs.")
    : h("p", { class: "empty" }, "No jobs yet. ", h("code", {}, "arcface-coordinator submit job.toml"), " submits one.");
};

/** The page with the list. */
export const jobsPage = {
  name: "jobs",
  title: () => "Jobs",

  async load({ ask, query }) {
    const live = query.get("state") === "live";
    const after = query.get("after");
    const words = [live ? "state=live" : null, after ? `after=${encodeURIComponent(after)}` : null].filter(Boolean);
    const { jobs, next } = await ask(`jobs${words.length > 0 ? `?${words.join("&")}` : ""}`);
    return { jobs, next, live, after };
  },

  render({ cluster, data: { jobs, next, live, after }, now }) {
    const choice = (text, wanted) =>
      h("a", { href: hrefOf(wanted, null), "aria-current": live === wanted ? "true" : null }, text);
    return [
      totals(cluster),
      h(
        "div",
        { class: "heading" },
        h("h1", {}, "Jobs"),
        h("nav", { class: "choice", "aria-label": "Which jobs" }, choice("All", false), choice("Waiting and running", true)),
      ),
      jobs.length > 0 ? table(jobs, now) : empty(live, after),
      after || next
        ? h(
            "nav",
            { class: "pager", "aria-label": "Pages of the list" },
            after ? h("a", { class: "action", href: hrefOf(live, null) }, "Newest") : null,
            next ? h("a", { class: "action", href: hrefOf(live, next) }, "Older") : null,
          )
        : null,
    ].filter(Boolean);
  },

  /** States by job, for what is announced. */
  states: ({ jobs }) => new Map(jobs.map((job) => [job.id, { name: job.name ?? job.id, state: job.state }])),
};
