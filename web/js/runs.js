/** The Runs view: a list of runs, and one run in detail. */

import { button, h, put } from "./dom.js";
import { format } from "./chart.js";
import { poll } from "./poll.js";
import { get, part, post } from "./requests.js";
import { runDetail } from "./run.js";

const LIST_INTERVAL = 3000;
/** The run that is open in this browser tab, so that a reload shows it again. */
const OPENED = "DanceGRPO.panel.run";

const STATES = {
  starting: "starting",
  running: "running",
  stopping: "stopping",
  finished: "finished",
  stopped: "stopped",
  failed: "failed",
  interrupted: "interrupted",
};

/** Hours, minutes or seconds in two parts at most. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "";
  const rounded = Math.round(seconds);
  const hours = Math.floor(rounded / 3600);
  const minutes = Math.floor((rounded % 3600) / 60);
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${rounded % 60} s` : `${rounded} s`;
}

/** Facts on a line that breaks only between them. */
export function factLine(facts) {
  return facts.map((fact) => fact.replaceAll(" ", "\u00a0")).join(" · ");
}

/** The colour and the word for a run's state. */
export function badge(run) {
  return h("span", { class: `dg-badge dg-${run.state}`, text: STATES[run.state] ?? run.state });
}

export function progressBar(run) {
  const share = run.iterations ? run.iteration / run.iterations : 0;
  return h(
    "div",
    { class: "dg-bar", role: "progressbar", "aria-valuemin": 0, "aria-valuemax": run.iterations, "aria-valuenow": run.iteration },
    h("div", { style: { width: `${Math.min(100, share * 100).toFixed(1)}%` } }),
  );
}

/** @param {{notify: (text: string, severity?: string) => void}} panel */
export function runsView(panel) {
  const element = h("div", { class: "dg-view" });
  const list = h("div", { class: "dg-list" });
  const message = h("p", { class: "dg-muted", role: "status" });
  const bin = h("div", { class: "dg-bin" });
  let detail = null;
  let shown = "";

  const refresh = poll(
    async (signal) => {
      if (detail) return;
      const { runs, deleted } = await get("/runs", signal);
      if (detail) return;
      message.textContent = runs.length ? "" : "No runs yet. Queue a graph with GRPO Train LoRA, and it appears here.";
      const found = JSON.stringify([runs, deleted]);
      if (found === shown || list.matches(":active")) return; // a row that is being clicked stays
      shown = found;
      show(runs);
      put(bin, deleted.length ? undo(deleted) : null);
    },
    LIST_INTERVAL,
    (error) => {
      message.textContent = `The list of runs cannot be read: ${error.message}`;
    },
  );

  function show(runs) {
    const focused = list.contains(document.activeElement) ? document.activeElement.dataset.run : null;
    put(list, runs.map(row));
    if (focused !== null) [...list.children].find((one) => one.dataset.run === focused)?.focus({ preventScroll: true });
  }

  function row(run) {
    return h(
      "button",
      { type: "button", class: "dg-row", "data-run": run.name, on: { click: () => open(run.name) } },
      h("span", { class: "dg-row-head" }, h("span", { class: "dg-name", text: run.name, title: run.name }), badge(run)),
      progressBar(run),
      h("span", { class: "dg-muted", text: facts(run) }),
    );
  }

  function facts(run) {
    const parts = [`${run.iteration} of ${run.iterations} iterations`];
    if (run.live && run.seconds_left !== null) parts.push(`${duration(run.seconds_left)} left`);
    if (run.reward !== null) parts.push(`reward ${format(run.reward)}`);
    return factLine(parts);
  }

  function undo(deleted) {
    return [
      h("p", { class: "dg-muted", text: "Deleted runs (kept in output/dancegrpo/deleted until you remove them there):" }),
      deleted.map((name) =>
        h(
          "div",
          { class: "dg-row-head" },
          h("span", { class: "dg-name", text: name }),
          button("Restore", async () => {
            await post(`/deleted/${part(name)}/restore`);
            refresh.now();
          }, { onError: (error) => panel.notify(error.message, "error") }),
        ),
      ),
    ];
  }

  function open(name) {
    sessionStorage.setItem(OPENED, name);
    detail = runDetail(name, { ...panel, back: close });
    put(element, detail.element);
  }

  function close() {
    sessionStorage.removeItem(OPENED);
    detail?.close();
    detail = null;
    put(element, list, message, bin);
    refresh.now();
  }

  put(element, list, message, bin);
  const before = sessionStorage.getItem(OPENED);
  if (before !== null) open(before);
  return {
    element,
    close() {
      refresh.close();
      detail?.close();
    },
  };
}
