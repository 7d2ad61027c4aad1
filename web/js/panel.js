/** The DanceGRPO sidebar tab: runs, votes, comparison. */

import { app } from "../../../scripts/app.js";
import { h, put } from "./dom.js";
import { comparisonView } from "./compare.js";
import { runsView } from "./runs.js";
import { votesView } from "./votes.js";

const VIEWS = [
  { key: "runs", label: "Runs", open: runsView },
  { key: "votes", label: "Votes", open: votesView },
  { key: "compare", label: "Compare", open: comparisonView },
];
const REMEMBERED = "DanceGRPO.panel.view";

/** Load the style sheet once. */
function loadStyles() {
  const address = new URL("../css/panel.css", import.meta.url).href;
  if ([...document.querySelectorAll("link")].some((link) => link.href === address)) return;
  document.head.append(h("link", { rel: "stylesheet", href: address }));
}

/**
 * Fill an element with the panel.
 * @returns {() => void} ends its timers
 */
export function mountPanel(root) {
  loadStyles();
  const content = h("div", { class: "dg-content" });
  const tabs = h("div", { class: "dg-tabs", role: "tablist", "aria-label": "DanceGRPO" });
  let current = null;

  function show(view) {
    current?.close();
    localStorage.setItem(REMEMBERED, view.key);
    for (const tab of tabs.children) tab.setAttribute("aria-selected", String(tab.dataset.key === view.key));
    const opened = view.open({ notify });
    current = opened;
    put(content, opened.element);
  }

  for (const view of VIEWS) {
    tabs.append(
      h("button", {
        type: "button",
        role: "tab",
        class: "dg-tab",
        "data-key": view.key,
        text: view.label,
        on: { click: () => show(view) },
      }),
    );
  }
  put(root, h("div", { class: "dg-panel" }, tabs, content));
  show(VIEWS.find((view) => view.key === localStorage.getItem(REMEMBERED)) ?? VIEWS[0]);
  return () => current?.close();
}

/** Show a sentence for a few seconds. */
export function notify(text, severity = "info") {
  app.extensionManager?.toast?.add({ severity, summary: "DanceGRPO", detail: text, life: 6000 });
}

let unmount = null;

app.registerExtension({
  name: "DanceGRPO.Panel",
  setup() {
    app.extensionManager?.registerSidebarTab({
      id: "dancegrpo",
      icon: "pi pi-chart-line",
      title: "GRPO",
      tooltip: "DanceGRPO: training runs, votes, comparison",
      type: "custom",
      render: (element) => {
        unmount?.();
        unmount = mountPanel(element);
      },
      destroy: () => {
        unmount?.();
        unmount = null;
      },
    });
  },
});
