/**
 * The preview of a run on its node while it trains: the curve and the newest samples. The server sends it only to the
 * browser that queued the graph, and a reload loses it; this shows it in every browser, by the name on the node.
 */

import { poll } from "./poll.js";
import { get, part } from "./requests.js";

const INTERVAL = 8_000; // milliseconds
const NODES = ["DanceGRPO_TrainLoRA", "DanceGRPO_Run"];

/**
 * Nodes of a graph whose run is live.
 *
 * @param {Iterable<object>} nodes LiteGraph nodes
 * @param {{name: string, live: boolean}[]} runs
 * @returns {{id: string|number, name: string}[]}
 */
export function liveNodes(nodes, runs) {
  const live = new Set(runs.filter((run) => run.live).map((run) => run.name));
  return [...(nodes ?? [])]
    .filter((node) => NODES.includes(node.type))
    .map((node) => ({ id: node.id, name: node.widgets?.find((widget) => widget.name === "name")?.value }))
    .filter(({ name }) => live.has(name));
}

/** Show the previews from now on. */
export function showLive(app, api) {
  const shown = new Map(); // by node, the tag of its preview

  async function showPreview({ id, name }, signal) {
    const response = await api.fetchApi(`/dancegrpo/runs/${part(name)}/preview`, { signal });
    if (!response.ok) return; // nothing to show yet
    const tag = `${name} ${response.headers.get("ETag")}`;
    if (shown.get(id) === tag && app.nodePreviewImages?.[id]) return;
    shown.set(id, tag);
    // As core's own previews arrive, so that every way of drawing nodes shows it.
    const detail = { blob: await response.blob(), nodeId: String(id), displayNodeId: String(id) };
    api.dispatchEvent(new CustomEvent("b_preview_with_metadata", { detail }));
  }

  poll(async (signal) => {
    const nodes = [...(app.graph?.nodes ?? [])];
    if (!nodes.some((node) => NODES.includes(node.type))) return;
    const { runs } = await get("/runs", signal);
    for (const node of liveNodes(nodes, runs)) await showPreview(node, signal);
  }, INTERVAL);
}
