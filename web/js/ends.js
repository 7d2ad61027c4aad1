/** A toast when a training run ends, whether the panel is open or not. */

import { poll } from "./poll.js";
import { get } from "./requests.js";

const INTERVAL = 15_000; // milliseconds
const ENDED = ["finished", "stopped", "failed"];

/**
 * Toasts for the runs that have ended since the last poll.
 *
 * @param {Map<string, string>} before states by name; empty before the first poll
 * @param {{name: string, state: string, error: string?}[]} runs
 */
export function endToasts(before, runs) {
  return runs
    .filter((run) => before.has(run.name) && before.get(run.name) !== run.state && ENDED.includes(run.state))
    .map((run) => ({
      severity: run.state === "failed" ? "error" : "success",
      summary: `run ${run.name}`,
      detail: run.state === "failed" && run.error ? `failed: ${run.error}` : run.state,
      life: run.state === "failed" ? 20_000 : 8_000,
    }));
}

/** Watch the list of runs from now on. */
export function announceEnds(app) {
  let states = new Map();
  poll(async (signal) => {
    const { runs } = await get("/runs", signal);
    for (const toast of endToasts(states, runs)) app.extensionManager.toast.add(toast);
    states = new Map(runs.map((run) => [run.name, run.state]));
  }, INTERVAL);
}
