/**
 * Why a node of this pack stopped, as a toast: ComfyUI's own message says only that a node threw an error.
 * Text is handed on as text, never as HTML.
 */

const OWN = "DanceGRPO_";
const LONGEST = 600; // characters

/**
 * The toast for an `execution_error`, or null if a node of another pack failed.
 *
 * @param {{node_id: string, node_type: string, exception_message: string}} error
 * @param {string} [title] the node's title in the graph
 */
export function errorToast(error, title) {
  if (!String(error?.node_type).startsWith(OWN)) return null;
  // The lines that follow are the end of a run's log, which the node's report shows.
  const sentence = String(error.exception_message ?? "").trim().split("\n")[0];
  const shown = sentence.length > LONGEST ? `${sentence.slice(0, LONGEST)}...` : sentence;
  return { severity: "error", summary: title || error.node_type, detail: shown };
}

/** Show these toasts from now on. */
export function showErrors(app, api) {
  api.addEventListener("execution_error", ({ detail }) => {
    const toast = errorToast(detail, app.graph?.getNodeById?.(detail?.node_id)?.title);
    if (toast) app.extensionManager.toast.add(toast);
  });
}
