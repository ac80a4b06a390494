// What belongs to the whole: the coordinator's line in the header, totals, and who leads when this one does not.

import { h } from "./dom.js";
import { count, dash, time } from "./format.js";

/** The line in the header. */
export const coordinator = (cluster) =>
  cluster.leads
    ? [
        h("span", { class: "state good" }, "leads"),
        h("span", { class: "detail", title: `serving since ${time(cluster.serving_since)}` }, `epoch ${cluster.epoch}`),
        h("span", { class: "detail" }, `v${cluster.version}`),
      ]
    : [h("span", { class: "state warn" }, "stands by"), h("span", { class: "detail" }, `v${cluster.version}`)];

const tile = (name, value, of, detail) =>
  h(
    "div",
    { class: "tile" },
    h("dt", {}, name),
    h("dd", {}, h("span", { class: "figure" }, value), of ? h("span", { class: "of" }, of) : null),
    detail ? h("dd", { class: "detail" }, detail) : null,
  );

/** Totals. */
export const totals = (cluster) =>
  h(
    "dl",
    { class: "tiles" },
    tile("Active jobs", count(cluster.jobs_active)),
    tile("Queued jobs", count(cluster.jobs_queued)),
    tile("Slots in use", count(cluster.slots_used), ` of ${count(cluster.slots_total)}`),
    tile(
      "Healthy nodes",
      count(cluster.nodes_healthy),
      cluster.nodes_other > 0 ? ` and ${count(cluster.nodes_other)} other` : null,
    ),
  );

/** Where the leader's page should be: on its host, at the port of this one. */
const pageOf = (leader) => {
  const host = leader.slice(0, leader.lastIndexOf(":"));
  return /^[A-Za-z0-9.[\]:-]+$/.test(host) ? `http://${host}${location.port ? `:${location.port}` : ""}/${location.hash}` : null;
};

/** What a coordinator shows that does not lead. */
export const standby = ({ leader }) => {
  const page = leader ? pageOf(leader) : null;
  return [
    h(
      "div",
      { class: "notice" },
      h("h1", {}, "This coordinator stands by"),
      leader
        ? h("p", {}, "It knows no jobs and no nodes. ", h("strong", {}, dash(leader)), " leads.")
        : h("p", {}, "No coordinator leads at the moment. This page goes on by itself when one does."),
      page ? h("p", {}, h("a", { class: "action", href: page }, "Open the leader\u2019s page")) : null,
      page ? h("p", { class: "muted" }, "It is looked for on the leader\u2019s host, at the port of this page.") : null,
    ),
  ];
};
