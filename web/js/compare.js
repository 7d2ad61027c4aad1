/** The Compare view: runs side by side, on their held-out prompts. */

import { h, put } from "./dom.js";
import { format, lineChart } from "./chart.js";
import { get, part } from "./requests.js";

const COLORS = ["var(--dg-blue)", "var(--dg-orange)", "var(--dg-green)", "var(--dg-violet)"];

/** @param {{notify: (text: string, severity?: string) => void}} panel */
export function comparisonView(panel) {
  const choices = [choice("first run"), choice("second run")];
  const result = h("div", { class: "dg-charts" });
  const table = h("div", {});
  const message = h("p", { class: "dg-muted", role: "status" });
  const element = h(
    "div",
    { class: "dg-view" },
    h("p", { class: "dg-muted", text: "Held-out rewards of two runs. The node Compare LoRAs scores both on the same prompts and noise." }),
    h("div", { class: "dg-vote-head" }, choices),
    message,
    table,
    result,
  );
  const controller = new AbortController();

  function choice(label) {
    return h("select", { class: "dg-select", "aria-label": label, on: { change: () => compare() } });
  }

  async function compare() {
    try {
      const names = choices.map((one) => one.value).filter(Boolean);
      const runs = await Promise.all([...new Set(names)].map((name) => get(`/runs/${part(name)}`, controller.signal)));
      show(runs);
    } catch (error) {
      if (!controller.signal.aborted) panel.notify(error.message, "error");
    }
  }

  function show(runs) {
    const rewards = [...new Set(runs.flatMap((run) => run.evaluations.flatMap((one) => Object.keys(one.rewards))))];
    message.textContent = rewards.length ? "" : "Neither run has been evaluated on held-out prompts.";
    put(table, rewards.length ? numbers(runs, rewards) : null);
    put(
      result,
      rewards.map((reward) =>
        lineChart({
          title: reward,
          series: runs.map((run, index) => ({
            label: run.name,
            color: COLORS[index],
            dots: true,
            points: run.evaluations
              .filter((one) => typeof one.rewards[reward] === "number")
              .map((one) => [one.iteration, one.rewards[reward]]),
          })),
        }),
      ),
    );
  }

  function numbers(runs, rewards) {
    const cell = (run, reward) => {
      const values = run.evaluations.map((one) => one.rewards[reward]).filter((value) => typeof value === "number");
      return values.length ? `${format(values[0])} → ${format(values.at(-1))}` : "–";
    };
    return h(
      "table",
      { class: "dg-table" },
      h("thead", {}, h("tr", {}, h("th", { text: "reward" }), runs.map((run) => h("th", { text: run.name })))),
      h(
        "tbody",
        {},
        rewards.map((reward) => h("tr", {}, h("td", { text: reward }), runs.map((run) => h("td", { text: cell(run, reward) })))),
      ),
    );
  }

  get("/runs", controller.signal).then(
    ({ runs }) => {
      choices.forEach((select, index) => {
        put(select, runs.map((run) => h("option", { value: run.name, text: run.name })));
        select.selectedIndex = Math.min(index, runs.length - 1);
      });
      if (runs.length) compare();
      else message.textContent = "There are no runs to compare yet.";
    },
    (error) => panel.notify(error.message, "error"),
  );

  return { element, close: () => controller.abort() };
}
