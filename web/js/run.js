/** One run: state, curves, samples, log, description. */

import { button, h, put } from "./dom.js";
import { lineChart } from "./chart.js";
import { poll } from "./poll.js";
import { get, part, post } from "./requests.js";
import { badge, duration, factLine, progressBar } from "./runs.js";
import { samplesPage } from "./samples.js";

const INTERVAL = 1500;
const MOST_POINTS = 1200;
const COLORS = ["var(--dg-blue)", "var(--dg-orange)", "var(--dg-green)", "var(--dg-red)", "var(--dg-violet)"];

/** Follow the events of a run: ask for those after the last one, start over when the run was rewound. */
class Events {
  constructor(name) {
    this.name = name;
    this.events = [];
    this.generation = null;
  }

  /** @returns {Promise<boolean>} whether anything changed */
  async update(signal) {
    const after = this.events.at(-1)?.iteration ?? 0;
    const query = this.generation === null ? "" : `?after=${after}&generation=${this.generation}`;
    const answer = await get(`/runs/${part(this.name)}/events${query}`, signal);
    if (answer.generation !== this.generation) this.events = [];
    this.generation = answer.generation;
    this.events.push(...answer.events);
    if (this.events.length > MOST_POINTS) this.events = thinned(this.events, MOST_POINTS / 2);
    return answer.events.length > 0;
  }
}

function thinned(events, count) {
  const stride = Math.ceil(events.length / count);
  return events.filter((_, index) => index % stride === 0 || index === events.length - 1);
}

/** @param {{notify: Function, back: () => void}} panel */
export function runDetail(name, panel) {
  const events = new Events(name);
  const failed = (error) => panel.notify(error.message, "error");
  const about = h("div", { class: "dg-run-about" });
  const controls = h("div", { class: "dg-run-about" });
  const back = button("‹ All runs", panel.back, { kind: "dg-link" });
  const head = h("div", { class: "dg-run-head" }, back, about, controls);
  const body = h("div", { class: "dg-run-body" });
  const element = h("div", { class: "dg-run" }, head, tabs(), body);
  let page = null;
  let state = null;
  let drawn = "";
  let offered = "";

  const refresh = poll(
    async (signal) => {
      state = await get(`/runs/${part(name)}`, signal);
      showState();
      const changed = await events.update(signal);
      await page?.update?.(changed, signal);
      return state.live ? INTERVAL : 4 * INTERVAL;
    },
    INTERVAL,
    (error) => {
      put(about, h("p", { class: "dg-error", text: error.message }));
      put(controls);
      offered = "";
    },
  );

  function showState() {
    put(
      about,
      h("div", { class: "dg-row-head" }, h("h3", { text: name }), badge(state)),
      progressBar(state),
      h("p", { class: "dg-muted", text: progressText() }),
      // On a line of its own, so that what is below stays where it is while the phases change.
      state.live ? h("p", { class: "dg-muted", text: `now: ${state.phase ?? state.state}` }) : null,
      state.error ? h("p", { class: "dg-error", text: state.error }) : null,
    );
    const offers = JSON.stringify([state.live, state.state, state.can_publish, state.lora_names]);
    if (offers === offered) return; // a button that has the focus or is being pressed stays
    offered = offers;
    put(controls, h("div", { class: "dg-actions" }, actions()), state.lora_names.map(loraName));
  }

  /** A LoRA of the run as ComfyUI lists it; a model with a network for high and one for low noise has two. */
  function loraName(file) {
    const what = state.lora_names.length > 1 ? `Copy the name of ${file}` : "Copy the name of the LoRA";
    const copyIt = button("Copy", () => copy(file), { title: what, onError: failed });
    copyIt.setAttribute("aria-label", what);
    return h("div", { class: "dg-lora" }, h("span", { class: "dg-muted", text: file }), copyIt);
  }

  function progressText() {
    const parts = [`iteration ${state.iteration} of ${state.iterations}`];
    if (state.live && state.seconds_left !== null) parts.push(`${duration(state.seconds_left)} left`);
    if (state.memory_mb) parts.push(`${(state.memory_mb / 1024).toFixed(1)} GiB`);
    return factLine(parts);
  }

  function act(action) {
    return async () => {
      const { message } = await post(`/runs/${part(name)}/${action}`);
      if (message) panel.notify(message);
      refresh.now();
    };
  }

  function actions() {
    const made = [];
    if (state.live) made.push(button("Stop", act("stop"), { title: "Stop and keep what was learned", onError: failed }));
    else if (state.state !== "finished") made.push(button("Resume", act("resume"), { onError: failed }));
    if (state.can_publish) {
      made.push(button("List LoRA", act("publish"), { title: "Copy the LoRA to output/loras/dancegrpo, where ComfyUI's loaders list it", onError: failed }));
    }
    if (!state.live) {
      made.push(
        button("Delete", async () => {
          await act("delete")();
          panel.back();
        }, { title: "Move to output/dancegrpo/deleted; it can be restored", kind: "dg-danger", onError: failed }),
      );
    }
    return made;
  }

  async function copy(text) {
    await navigator.clipboard.writeText(text);
    panel.notify(`copied: ${text}`);
  }

  function tabs() {
    const pages = { Curves: curves, Samples: samples, Log: log, Description: description };
    const bar = h("div", { class: "dg-subtabs", role: "tablist" });
    const show = (label) => {
      for (const tab of bar.children) tab.setAttribute("aria-selected", String(tab.textContent === label));
      page = pages[label]();
      put(body, page.element);
      refresh?.now();
    };
    for (const label of Object.keys(pages)) {
      bar.append(h("button", { type: "button", role: "tab", class: "dg-subtab", text: label, on: { click: () => show(label) } }));
    }
    queueMicrotask(() => show("Curves"));
    return bar;
  }

  // ------------------------------------------------------------------------------------------------- pages

  function curves() {
    const charts = h("div", { class: "dg-charts" });
    drawn = "";
    return {
      element: charts,
      update() {
        const last = events.events.at(-1);
        const key = `${events.generation} ${last?.iteration} ${state.evaluations.length}`;
        if (key === drawn) return;
        drawn = key;
        put(charts, rewardCharts(), objectiveCharts(), phaseChart());
        if (!last) put(charts, h("p", { class: "dg-muted", text: "The first iteration is not done yet." }));
      },
    };
  }

  function rewardCharts() {
    const names = unique([
      ...(state.evaluations.some((one) => "mix" in one.rewards) ? ["mix"] : []),
      ...events.events.flatMap((event) => Object.keys(event.rewards)),
      ...state.evaluations.flatMap((evaluation) => Object.keys(evaluation.rewards)),
    ]);
    return names.map((reward) => {
      const seen = events.events.filter((event) => finite(event.rewards[reward]?.mean));
      const heldOut = state.evaluations.filter((evaluation) => finite(evaluation.rewards[reward]));
      const band = (event) => {
        const { mean, group_std: std } = event.rewards[reward];
        return [event.iteration, mean - (std ?? 0), mean + (std ?? 0)];
      };
      return lineChart({
        title: reward,
        series: [
          {
            label: "training images, ± std within a group",
            color: COLORS[0],
            points: seen.map((event) => [event.iteration, event.rewards[reward].mean]),
            band: seen.map(band),
          },
          {
            label: "held-out prompts",
            color: COLORS[1],
            dots: true,
            points: heldOut.map((evaluation) => [evaluation.iteration, evaluation.rewards[reward]]),
          },
        ],
      });
    });
  }

  function objectiveCharts() {
    const flat = new Map(events.events.map((event) => [event, flattened(event.objective ?? {})]));
    const metrics = unique([...flat.values()].flatMap((values) => Object.keys(values)));
    return [
      ...metrics.map((metric) => plain(metric, (event) => flat.get(event)[metric])),
      plain("gradient norm", (event) => event.grad_norm),
    ];
  }

  function plain(title, value) {
    const points = events.events.filter((event) => finite(value(event))).map((event) => [event.iteration, value(event)]);
    const varies = points.some(([, y]) => y !== points[0][1]);
    return varies ? lineChart({ title, series: [{ label: title, color: COLORS[2], points }] }) : null;
  }

  function phaseChart() {
    const phases = unique(events.events.flatMap((event) => Object.keys(event.seconds))).filter((phase) => phase !== "total");
    return lineChart({
      title: "seconds per iteration",
      series: phases.map((phase, index) => ({
        label: phase,
        color: COLORS[index % COLORS.length],
        points: events.events.filter((event) => finite(event.seconds[phase])).map((event) => [event.iteration, event.seconds[phase]]),
      })),
    });
  }

  function samples() {
    return samplesPage(name, panel);
  }

  function log() {
    const text = h("pre", { class: "dg-log", tabindex: 0 });
    let offset = 0;
    return {
      element: text,
      async update(changed, signal) {
        const answer = await get(`/runs/${part(name)}/log?offset=${offset}`, signal);
        if (answer.offset < offset) text.textContent = "";
        const atEnd = text.scrollHeight - text.scrollTop - text.clientHeight < 30;
        const [rest, ...lines] = answer.text.split("\n");
        if (!text.lastChild) text.append(h("div"));
        text.lastChild.append(rest);
        text.append(...lines.map((line) => h("div", { text: line })));
        offset = answer.offset;
        if (atEnd) text.scrollTop = text.scrollHeight;
      },
    };
  }

  function description() {
    const text = h("pre", { class: "dg-log", tabindex: 0 });
    get(`/runs/${part(name)}/description`).then(
      (answer) => {
        text.textContent = answer.text;
      },
      (error) => {
        text.textContent = error.message;
      },
    );
    return { element: text };
  }

  return {
    element,
    close() {
      refresh.close();
      page?.close?.();
    },
  };
}

/** Nested metrics under names such as "ratio mean". */
function flattened(metrics, prefix = "") {
  return Object.fromEntries(
    Object.entries(metrics).flatMap(([name, value]) => {
      const label = `${prefix}${name.replaceAll("_", " ")}`;
      return value !== null && typeof value === "object" ? Object.entries(flattened(value, `${label} `)) : [[label, value]];
    }),
  );
}

const finite = (value) => typeof value === "number" && Number.isFinite(value);
const unique = (values) => [...new Set(values)];
