// Which page is shown, and when it is looked up again.

import { Refused, Unreachable, ask, now } from "./api.js";
import { coordinator, standby } from "./cluster.js";
import { h, patchChildren } from "./dom.js";
import { clock } from "./format.js";
import { jobPage } from "./job.js";
import { jobsPage } from "./jobs.js";
import { nodesPage } from "./nodes.js";

/** Between two looks while all is well. */
const EVERY_MS = 1000;
/** Between two tries while nobody answers: soon at first, then less often. */
const AGAIN_MS = [300, 1000, 2000, 5000];

const main = document.getElementById("main");
const header = document.getElementById("coordinator");
const lost = document.getElementById("lost");
const news = document.getElementById("news");

/** Counts what was asked for: an answer to an older question is not shown. */
let turn = 0;
let timer = 0;
let failures = 0;
let answeredAt = null;
let states = new Map();

/** What the address after # asks for. */
const route = () => {
  const [path, words] = location.hash.replace(/^#/, "").split("?");
  const query = new URLSearchParams(words ?? "");
  const job = /^\/jobs\/([^/]+)$/.exec(path);
  if (job) return { page: jobPage, id: decodeURIComponent(job[1]), query };
  return { page: path === "/nodes" ? nodesPage : jobsPage, query };
};

const announce = (page, data) => {
  const seen = page.states(data);
  const changed = [...seen].filter(([id, { state }]) => states.has(id) && states.get(id).state !== state);
  if (changed.length > 0) {
    const [, { name, state }] = changed[0];
    const others = changed.length > 1 ? `, ${changed.length - 1} more changed` : "";
    news.textContent = `${name}: ${state}${others}`;
  }
  states = seen;
};

const current = (page) => {
  for (const link of document.querySelectorAll("[data-page]")) {
    if (link.dataset.page === page.name) {
      link.setAttribute("aria-current", "page");
    } else {
      link.removeAttribute("aria-current");
    }
  }
};

const show = (content, title) => {
  patchChildren(main, content);
  document.title = `${title} \u00b7 ArcFace cluster`;
};

const connected = () => {
  failures = 0;
  answeredAt = now();
  if (lost.textContent !== "") lost.textContent = "";
  main.classList.remove("stale");
};

const disconnected = () => {
  failures += 1;
  // A connection that the coordinator closes while a question is on its way is no news.
  if (failures < 2) return;
  const since = answeredAt === null ? "" : ` Figures are of ${clock(answeredAt)}.`;
  const text = `Not connected, trying again.${since}`;
  if (lost.textContent !== text) lost.textContent = text;
  main.classList.add("stale");
};

const refused = (error) => {
  show(
    [
      h(
        "div",
        { class: "notice" },
        h("h1", {}, error.status === 404 ? "Not found" : "No answer"),
        h("p", {}, error.message),
        h("p", {}, h("a", { class: "action", href: "#/" }, "All jobs")),
      ),
    ],
    error.status === 404 ? "Not found" : "No answer",
  );
};

const look = async (mine) => {
  const { page, ...wanted } = route();
  current(page);
  const cluster = await ask("cluster");
  if (mine !== turn) return;
  patchChildren(header, coordinator(cluster));
  if (!cluster.leads) {
    connected();
    show(standby(cluster), "Standby");
    return;
  }
  const data = await page.load({ ...wanted, ask, cluster });
  if (mine !== turn) return;
  connected();
  show(page.render({ cluster, data, now: now() }), page.title(data));
  page.after?.(main, data);
  announce(page, data);
};

const tick = async () => {
  clearTimeout(timer);
  turn += 1;
  const mine = turn;
  let wait = EVERY_MS;
  try {
    await look(mine);
  } catch (error) {
    if (mine !== turn) return;
    if (error instanceof Unreachable || error.status === 503) {
      disconnected();
      wait = AGAIN_MS[Math.min(failures, AGAIN_MS.length) - 1];
    } else if (error instanceof Refused) {
      connected();
      refused(error);
    } else {
      reportError(error);
    }
  }
  // Nobody looks at a page that is hidden; it is looked up when it is shown again.
  if (mine === turn && !document.hidden) timer = setTimeout(tick, wait);
};

addEventListener("hashchange", () => {
  states = new Map();
  main.focus({ preventScroll: true });
  scrollTo(0, 0);
  tick();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) tick();
});
document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault(); // The part after # says which page is shown.
  main.focus();
});
tick();
