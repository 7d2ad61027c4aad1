/** Samples of a run over time: every image with its prompt and scores, and the first samples beside the latest. */

import { button, h, put } from "./dom.js";
import { format } from "./chart.js";
import { address, get, part, post } from "./requests.js";

const KINDS = [
  { key: "evaluation", label: "Held-out prompts" },
  { key: "rollout", label: "Training images" },
];

const REMEMBERED = "DanceGRPO.panel.collection";

/**
 * @param {string} name of the run
 * @param {{notify: (text: string, severity?: string) => void}} panel
 */
export function samplesPage(name, panel) {
  const kinds = h("div", { class: "dg-subtabs", role: "tablist" });
  const slider = h("input", { type: "range", min: 0, max: 0, step: 1, value: 0, "aria-label": "iteration" });
  const label = h("span", { class: "dg-muted" });
  const compare = h("input", { type: "checkbox" });
  const compareLabel = h("label", { class: "dg-check" }, compare, "beside the first");
  const grid = h("div", { class: "dg-samples" });
  const collection = h("input", { class: "dg-input", value: localStorage.getItem(REMEMBERED) ?? "my_votes", "aria-label": "collection name" });
  const collect = h(
    "div",
    { class: "dg-vote-head" },
    collection,
    button("Add to votes", send, {
      title: "Put these images into a collection, to vote on them in the view Votes",
      onError: (error) => panel.notify(error.message, "error"),
    }),
  );
  const element = h("div", {}, kinds, h("div", { class: "dg-slider" }, slider, label, compareLabel), grid, collect);
  let sets = [];
  let kind = null;
  let atEnd = true;
  let shown = "";

  for (const one of KINDS) {
    kinds.append(
      h("button", { type: "button", role: "tab", class: "dg-subtab", text: one.label, on: { click: () => choose(one.key) } }),
    );
  }
  slider.addEventListener("input", () => {
    atEnd = Number(slider.value) === Number(slider.max);
    draw();
  });
  compare.addEventListener("change", draw);

  function choose(key) {
    kind = key;
    atEnd = true;
    shown = "";
    draw();
  }

  /** Put the images that are shown into the collection, so that the next round of votes is on what the run makes. */
  async function send() {
    const set = current();
    const answer = await post(`/votes/${part(collection.value)}/import`, { run: name, kind: set.kind, iteration: set.iteration });
    localStorage.setItem(REMEMBERED, collection.value);
    panel.notify(answer.message);
  }

  function current() {
    return sets.filter((set) => set.kind === kind)[Number(slider.value)];
  }

  function draw() {
    const mine = sets.filter((set) => set.kind === kind);
    KINDS.forEach((one, index) => kinds.children[index].setAttribute("aria-selected", String(one.key === kind)));
    slider.max = Math.max(0, mine.length - 1);
    if (atEnd) slider.value = slider.max;
    slider.disabled = mine.length < 2;
    const set = current();
    collect.hidden = !set;
    const first = compare.checked && kind === "evaluation" && mine[0] !== set ? mine[0] : null;
    compareLabel.hidden = kind !== "evaluation";
    label.textContent = set ? `iteration ${set.iteration}` : "";
    const key = `${kind} ${set?.file} ${first?.file}`;
    if (key === shown) return;
    shown = key;
    const checkers = checkersOf([...(set?.cells ?? []), ...(first?.cells ?? [])]);
    if (!set) put(grid, h("p", { class: "dg-muted", text: "no images yet" }));
    else if (!set.cells.length) put(grid, whole(set));
    else put(grid, set.cells.map((cell, index) => figure(set, cell, first, index, checkers)));
  }

  function figure(set, cell, first, index, checkers) {
    const images = [first ? [first, first.cells[index]] : null, [set, cell]].filter((pair) => pair && pair[1]);
    return h(
      "figure",
      { class: "dg-cell" },
      h("div", { class: "dg-pair" }, images.map(([from, one]) => crop(from, one))),
      h("figcaption", {}, h("span", { class: "dg-prompt", text: cell.prompt }), scores(cell, first?.cells[index], checkers)),
    );
  }

  function scores(cell, before, checkers) {
    return Object.entries(cell.scores ?? {}).map(([reward, value]) => {
      const was = before?.scores?.[reward];
      if (checkers.has(reward)) return verdicts(reward, was === undefined ? [value] : [was, value]);
      const numbers = was === undefined ? format(value) : `${format(was)}\u00a0→\u00a0${format(value)}`;
      return h("span", { class: "dg-muted", text: `${reward} ${numbers}` });
    });
  }

  /** One cell of an image of many, cut out by its box in pixels: [left, top, width, height]. */
  function crop(set, cell) {
    const source = address(`/runs/${part(name)}/samples/${part(set.file)}`);
    const [left, top, width, height] = cell.box;
    const [fullWidth, fullHeight] = set.size;
    const image = h("img", { src: source, alt: cell.prompt, loading: "lazy", draggable: "false" });
    Object.assign(image.style, {
      width: `${(fullWidth / width) * 100}%`,
      left: `${(-left / width) * 100}%`,
      top: `${(-top / height) * 100}%`,
      height: `${(fullHeight / height) * 100}%`,
    });
    return h("div", { class: "dg-crop", style: { aspectRatio: `${width} / ${height}` } }, image);
  }

  function whole(set) {
    return h("img", { class: "dg-whole", src: address(`/runs/${part(name)}/samples/${part(set.file)}`), alt: `samples at iteration ${set.iteration}` });
  }

  return {
    element,
    async update(changed, signal) {
      sets = (await get(`/runs/${part(name)}/samples`, signal)).samples;
      if (kind === null || !sets.some((set) => set.kind === kind)) {
        kind = KINDS.find((one) => sets.some((set) => set.kind === one.key))?.key ?? "evaluation";
      }
      draw();
    },
  };
}

/** Rewards that are 0 or 1 for every image: they say right or wrong. */
function checkersOf(cells) {
  const names = new Set(cells.flatMap((cell) => Object.keys(cell.scores ?? {})));
  return new Set([...names].filter((name) => cells.every((cell) => [0, 1].includes(cell.scores?.[name]))));
}

/** The verdicts of a checker, before and after or one, as coloured words. */
function verdicts(reward, values) {
  const words = values.map((value) => h("span", { class: value ? "dg-right" : "dg-wrong", text: value ? "✓ right" : "✗ wrong" }));
  return h("span", { class: "dg-muted" }, `${reward} `, words.flatMap((word, index) => (index ? ["\u00a0→ ", word] : [word])));
}
