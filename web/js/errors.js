/**
 * Why a node of this pack stopped or was not accepted, as a toast: ComfyUI's own message says only that a node threw an
 * error, or that one rejected its input. Text is handed on as text, never as HTML.
 */

const OWN = "DanceGRPO_";
const LONGEST = 600; // characters
const REASON = "dancegrpo-reason"; // class of these toasts
const OVERLAY = "[data-testid='error-overlay']"; // ComfyUI's own box, in the same corner of the window
const GAP = 8; // pixels
const INTERVAL = 200; // milliseconds

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
  return reason(title || error.node_type, sentence);
}

/**
 * A toast for every sentence that the server refused a graph with, each once per node.
 *
 * @param {Object<string, {class_type: string, errors: {message: string, details: string}[]}>} nodeErrors
 *     `node_errors` of the answer to POST /prompt
 * @param {(id: string) => string | undefined} titleOf the node's title in the graph
 */
export function refusalToasts(nodeErrors, titleOf) {
  return Object.entries(nodeErrors ?? {}).flatMap(([id, { class_type: kind, errors }]) => {
    if (!String(kind).startsWith(OWN)) return [];
    const sentences = new Set((errors ?? []).map((error) => sentenceOf(error)));
    return [...sentences].map((sentence) => reason(titleOf(id) || kind, sentence));
  });
}

/** ComfyUI writes "<input> - <sentence>" where a node's own validation refused, and "<input>" with its own messages. */
function sentenceOf({ message, details, extra_info: extra }) {
  const name = extra?.input_name ?? "";
  const text = String(details ?? "");
  if (name && text.startsWith(`${name} - `)) return text.slice(name.length + 3);
  return text && !String(message).includes(text) ? `${message}: ${text}` : String(message);
}

function reason(summary, sentence) {
  const detail = sentence.length > LONGEST ? `${sentence.slice(0, LONGEST)}...` : sentence;
  return { severity: "error", summary, detail, styleClass: REASON };
}

let timer = null;
let moved = null;

/** Keep these toasts below ComfyUI's own box, as long as there are any: its height changes, and it can be closed. */
function keepBelow() {
  clearTimeout(timer);
  const stack = document.querySelector(`.${REASON}`)?.closest(".p-toast") ?? null;
  if (moved && moved !== stack) moved.style.marginTop = "";
  moved = stack;
  if (!stack) return;
  // The whole stack is moved: a margin inside of it would lie over the box and catch its clicks.
  const top = stack.getBoundingClientRect().top - (parseFloat(stack.style.marginTop) || 0);
  const box = document.querySelector(OVERLAY)?.getBoundingClientRect();
  const room = box?.height ? Math.max(0, box.bottom + GAP - top) : 0;
  stack.style.marginTop = room ? `${room}px` : "";
  timer = setTimeout(keepBelow, INTERVAL);
}

/** Show these toasts from now on. */
export function showErrors(app, api) {
  const titleOf = (id) => app.graph?.getNodeById?.(id)?.title;
  const show = (toasts) => {
    toasts.forEach((toast) => app.extensionManager.toast.add(toast));
    if (toasts.length) requestAnimationFrame(() => requestAnimationFrame(keepBelow)); // when they are in the page
  };
  api.addEventListener("execution_error", ({ detail }) => {
    const toast = errorToast(detail, titleOf(detail?.node_id));
    if (toast) show([toast]);
  });
  const queuePrompt = api.queuePrompt;
  api.queuePrompt = async function (...given) {
    try {
      return await queuePrompt.apply(this, given);
    } catch (error) {
      show(refusalToasts(error?.response?.node_errors, titleOf));
      throw error;
    }
  };
}
