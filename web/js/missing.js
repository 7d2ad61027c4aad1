/**
 * Files of reward models that a graph needs and this server lacks, as a toast when the graph is opened. ComfyUI's own
 * list of missing models has neither their folder nor their size, and leaves out folders and files that are no weights.
 */

const LOADER = "DanceGRPO_LoadReward";
const OFF = [2, 4]; // ComfyUI's modes of a node that is muted or bypassed

/**
 * The missing files of the rewards in a graph, each once.
 *
 * A file widget lists the files that are there. If the reward's usual file is not, its last entry is "(missing: put it
 * at models/rewards/<file>)", and the widget's tooltip says what the file is, where it is from, and its size.
 *
 * @param {Iterable<object>} nodes LiteGraph nodes
 * @returns {{path: string, says: string}[]}
 */
export function missingRewardFiles(nodes) {
  const found = new Map();
  for (const node of nodes ?? []) {
    if (OFF.includes(node.mode)) continue;
    if (node.subgraph) missingRewardFiles(node.subgraph.nodes).forEach((file) => found.set(file.path, file));
    if (node.type !== LOADER) continue;
    for (const widget of node.widgets ?? []) {
      const path = `models/rewards/${widget.value}`;
      const listed = widget.options?.values;
      if (!Array.isArray(listed) || !listed.includes(`(missing: put it at ${path})`)) continue;
      found.set(path, { path, says: widget.tooltip ?? widget.options.tooltip ?? "" });
    }
  }
  return [...found.values()];
}

/** One toast that names them all, or null. */
export function missingToast(files) {
  if (!files.length) return null;
  return {
    severity: "warn",
    summary: files.length === 1 ? "A file of a reward model is missing" : "Files of reward models are missing",
    detail: files.map(({ path, says }) => `${path}\n${says}`).join("\n\n"),
    life: 15_000,
  };
}

let shown = null;

/** Show the toast for the graph that has just been opened, in place of that for the graph before it. */
export function showMissing(app) {
  const { toast } = app.extensionManager;
  if (shown) toast.remove(shown);
  shown = missingToast(missingRewardFiles(app.graph?.nodes));
  if (shown) toast.add(shown);
}
