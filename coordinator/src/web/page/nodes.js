// The list of nodes.

import { h } from "./dom.js";
import { count, dash, time } from "./format.js";
import { totals } from "./cluster.js";
import { linkOf } from "./jobs.js";

const TONES = { healthy: "good", suspect: "warn", lost: "bad", draining: "busy" };

const ranksOf = (node) =>
  node.ranks.map((rank) =>
    h(
      "li",
      { "data-key": `${rank.job}/${rank.generation}/${rank.rank}` },
      h("a", { href: linkOf(rank.job) }, rank.job),
      ` rank ${rank.rank}`,
      rank.pid > 0 ? h("span", { class: "muted" }, ` pid ${rank.pid}`) : null,
    ),
  );

const age = (ms) => (ms < 100_000 ? `${(ms / 1000).toFixed(1)} s` : `${count(ms / 1000)} s`);

const row = (node) =>
  h(
    "tr",
    { "data-key": node.id },
    h(
      "th",
      { scope: "row" },
      h("span", { class: "name" }, node.id),
      h("span", { class: "id" }, `${dash(node.address)} \u00b7 ${dash(node.device)} \u00b7 v${dash(node.version)}`),
      node.reason ? h("span", { class: `reason ${TONES[node.state] ?? "calm"}` }, node.reason) : null,
    ),
    h("td", {}, h("span", { class: `state ${TONES[node.state] ?? "calm"}` }, node.state)),
    h("td", { class: "num" }, `${count(node.ranks.length)} of ${count(node.slots)}`),
    h("td", { class: "num" }, age(node.heartbeat_age_ms)),
    h("td", { class: "wide" }, node.ranks.length > 0 ? h("ul", { class: "plain" }, ranksOf(node)) : h("span", { class: "muted" }, "none")),
    h("td", { class: "wider" }, h("time", { datetime: node.joined_at }, time(node.joined_at))),
  );

const table = (nodes) =>
  h(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": "Nodes" },
    h(
      "table",
      {},
      h("caption", { class: "unseen" }, "Nodes, by id"),
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          h("th", { scope: "col" }, "Node"),
          h("th", { scope: "col" }, "State"),
          h("th", { scope: "col", class: "num" }, "Slots in use"),
          h("th", { scope: "col", class: "num" }, "Last heartbeat"),
          h("th", { scope: "col", class: "wide" }, "Ranks"),
          h("th", { scope: "col", class: "wider" }, "Joined"),
        ),
      ),
      h("tbody", {}, nodes.map(row)),
    ),
  );

/** The page with the list. */
export const nodesPage = {
  name: "nodes",
  title: () => "Nodes",

  async load({ ask, query }) {
    const after = query.get("after");
    // The ids' colons stay as they are.
    const words = after ? `?after=${encodeURIComponent(after).replaceAll("%3A", ":")}` : "";
    return { after, ...(await ask(`nodes${words}`)) };
  },

  render({ cluster, data: { nodes, next, after } }) {
    return [
      totals(cluster),
      h("div", { class: "heading" }, h("h1", {}, "Nodes")),
      nodes.length > 0
        ? table(nodes)
        : h(
            "p",
            { class: "empty" },
            after ? "No further nodes." : ["No node has joined. ", h("code", {}, "arcface-worker --join HOST:PORT"), " starts one."],
          ),
      after || next
        ? h(
            "nav",
            { class: "pager", "aria-label": "Pages of the list" },
            after ? h("a", { class: "action", href: "#/nodes" }, "First") : null,
            next ? h("a", { class: "action", href: `#/nodes?after=${encodeURIComponent(next)}` }, "Next") : null,
          )
        : null,
    ].filter(Boolean);
  },

  states: ({ nodes }) => new Map(nodes.map((node) => [node.id, { name: `node ${node.id}`, state: node.state }])),
};
