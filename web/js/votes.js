/** The Votes view: pairs of images, one key per vote, and how well a reward model fitted to the votes predicts them. */

import { button, h, put } from "./dom.js";
import { address, get, newId, part, post } from "./requests.js";

const REMEMBERED = "DanceGRPO.panel.collection";
const CHOICES = [
  { key: "left", keys: ["ArrowLeft"], label: "left is better", hint: "←" },
  { key: "right", keys: ["ArrowRight"], label: "right is better", hint: "→" },
  { key: "tie", keys: ["ArrowDown"], label: "equally good", hint: "↓" },
  { key: "skip", keys: ["s", "S"], label: "skip", hint: "S" },
];

/** @param {{notify: (text: string, severity?: string) => void}} panel */
export function votesView(panel) {
  const failed = (error) => panel.notify(error.message, "error");
  const select = h("select", { class: "dg-select", "aria-label": "collection", on: { change: () => choose(select.value) } });
  const state = h("div", { class: "dg-vote-state", role: "status" });
  const stage = h("div", { class: "dg-stage", tabindex: 0 });
  const head = h("div", { class: "dg-vote-head" }, select, button("Large", enlarge, { title: "Vote in the whole window; Escape closes it" }), importButton());
  const element = h("div", { class: "dg-view" }, head, state, stage);
  let name = null;
  let pair = null;
  let busy = 0;
  let waiting = Promise.resolve();
  let overlay = null;

  // ------------------------------------------------------------------------------------------- collections

  async function load() {
    const { collections } = await get("/votes");
    if (!collections.length) {
      put(select);
      put(
        state,
        h("p", { class: "dg-muted", text: "No collection yet. Put GRPO Collect for Voting behind any images and queue the graph; or import a folder of your input or output." }),
      );
      put(stage);
      return;
    }
    put(select, collections.map((one) => h("option", { value: one.name, text: `${one.name} (${one.images} images)` })));
    const wanted = localStorage.getItem(REMEMBERED);
    select.value = collections.some((one) => one.name === wanted) ? wanted : collections[0].name;
    await choose(select.value);
  }

  async function choose(chosen) {
    name = chosen;
    localStorage.setItem(REMEMBERED, name);
    pair = null; // no vote until this collection's pair is shown
    put(stage);
    try {
      const [info, next] = await Promise.all([get(`/votes/${part(chosen)}`), get(`/votes/${part(chosen)}/pair`)]);
      if (name !== chosen || pair) return; // another answer came first
      showState(info);
      showPair(next.pair);
    } catch (error) {
      failed(error);
    }
  }

  function showState(info) {
    const { winners, ties, skips } = info.votes;
    const cast = winners + ties;
    const lines = [`${cast} ${cast === 1 ? "vote" : "votes"} on ${info.images} images`];
    if (skips) lines.push(`${skips} skipped`);
    if (info.agreement) {
      const { share, low, high } = info.agreement;
      lines.push(`predicts ${percent(share)} of the votes left out (${percent(low)} to ${percent(high)})`);
    }
    put(
      state,
      h("p", { class: "dg-muted", text: lines.join(" · ") }),
      info.enough ? h("p", { class: "dg-muted", text: info.enough }) : null,
      (info.warnings ?? []).map((text) => h("p", { class: "dg-error", text })),
    );
  }

  // ------------------------------------------------------------------------------------------------- a pair

  function showPair(next) {
    pair = next;
    if (!pair) {
      put(stage, h("p", { class: "dg-muted", text: "Every pair has been shown. Collect more images, or stop here." }));
      return;
    }
    const same = pair.left.prompt === pair.right.prompt;
    put(
      stage,
      same && pair.left.prompt ? h("p", { class: "dg-prompt", text: pair.left.prompt }) : null,
      h("div", { class: "dg-vote-pair" }, choice("left", !same), choice("right", !same)),
      h(
        "div",
        { class: "dg-keys" },
        CHOICES.map((one) => keyButton(one.label, one.hint, () => vote(one.key))),
        keyButton("undo", "U", undo),
      ),
    );
    focus();
  }

  function choice(side, withPrompt) {
    const image = pair[side];
    return h(
      "button",
      { type: "button", class: "dg-choice", "data-side": side, "aria-label": `${side} is better`, on: { click: () => vote(side) } },
      h("img", { src: source(image), alt: image.prompt || `${side} image`, draggable: "false" }),
      withPrompt && image.prompt ? h("span", { class: "dg-prompt", text: image.prompt }) : null,
    );
  }

  function source(image) {
    return address(`/votes/${part(name)}/images/${part(image.image)}`);
  }

  function keyButton(label, key, handler) {
    return h("button", { type: "button", class: "dg-button", on: { click: handler } }, label, h("kbd", { text: key }));
  }

  /** A vote is answered only when it is on disk; the next pair comes with the answer. */
  function vote(choice) {
    if (busy || !pair) return;
    stage.querySelector(`[data-side="${choice}"]`)?.classList.add("dg-chosen");
    const body = { id: pair.id, left: pair.left.image, right: pair.right.image, choice };
    pair = null; // a pair takes one vote; keys pressed before the next one is shown are no answer to it
    send(() => post(`/votes/${part(name)}/vote`, body));
  }

  function undo() {
    send(() => post(`/votes/${part(name)}/undo`, { id: newId() }));
  }

  /** Send one request at a time. */
  function send(request) {
    setBusy(busy + 1);
    waiting = waiting.then(async () => {
      try {
        const answer = await request();
        showState(answer.state);
        await shown(answer.pair);
        showPair(answer.pair);
      } catch (error) {
        failed(error);
        stage.querySelector(".dg-chosen")?.classList.remove("dg-chosen");
        await choose(name);
      } finally {
        setBusy(busy - 1);
      }
    });
  }

  /** Votes are taken only while no request is on its way. */
  function setBusy(requests) {
    busy = requests;
    stage.setAttribute("aria-busy", String(busy > 0));
  }

  /** Load both images before they are shown, so that the pair changes at once. */
  async function shown(next) {
    if (!next) return;
    const loaded = [next.left, next.right].map((one) => {
      const image = new Image();
      image.src = source(one);
      return image.decode().catch(() => {});
    });
    await Promise.all(loaded);
  }

  // -------------------------------------------------------------------------------------------------- keys

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !inReach(event.target)) return;
    if (event.key === "Escape" && overlay) return void handled(event, shrink);
    if (event.key === "u" || event.key === "U") return void handled(event, undo);
    const choice = CHOICES.find((one) => one.keys.includes(event.key));
    if (choice) handled(event, () => vote(choice.key));
  }

  /** Keys count while the panel or its large form has the focus, so that ComfyUI's own keys keep working. */
  function inReach(target) {
    return (stage.contains(target) || overlay !== null) && !["INPUT", "SELECT", "TEXTAREA"].includes(target.tagName);
  }

  function handled(event, action) {
    event.preventDefault();
    event.stopImmediatePropagation();
    action();
  }

  /** Take the keyboard focus, unless another element is in use. */
  function focus() {
    const active = document.activeElement;
    if (overlay || !active || active === document.body || active.closest(".dg-panel")) stage.focus({ preventScroll: true });
  }

  function enlarge() {
    if (overlay) return;
    overlay = h("div", { class: "dg-panel dg-overlay", role: "dialog", "aria-label": "Votes" }, button("Close", shrink), state, stage);
    document.body.append(overlay);
    stage.focus();
  }

  function shrink() {
    element.append(state, stage);
    overlay?.remove();
    overlay = null;
    stage.focus();
  }

  // ------------------------------------------------------------------------------------------------ import

  function importButton() {
    return button("Import a folder", importFolder, { title: "Images of a folder in ComfyUI's input or output", onError: failed });
  }

  function importFolder() {
    const collection = h("input", { class: "dg-input", placeholder: "collection name", value: name ?? "", "aria-label": "collection name" });
    const base = h("select", { class: "dg-select", "aria-label": "base folder" }, h("option", { text: "output" }), h("option", { text: "input" }));
    const folder = h("input", { class: "dg-input", placeholder: "folder, such as favourites", "aria-label": "folder" });
    const form = h(
      "form",
      {
        class: "dg-vote-head",
        on: {
          submit: async (event) => {
            event.preventDefault();
            try {
              const answer = await post(`/votes/${part(collection.value)}/import`, { base: base.value, folder: folder.value });
              panel.notify(answer.message);
              localStorage.setItem(REMEMBERED, collection.value);
              form.remove();
              await load();
            } catch (error) {
              failed(error);
            }
          },
        },
      },
      base,
      folder,
      collection,
      h("button", { type: "submit", class: "dg-button", text: "Import" }),
    );
    if (!element.querySelector("form")) head.after(form);
  }

  window.addEventListener("keydown", onKey, { capture: true });
  load().catch(failed);
  return {
    element,
    close() {
      window.removeEventListener("keydown", onKey, { capture: true });
      overlay?.remove();
    },
  };
}

function percent(value) {
  return `${Math.round(value * 100)}%`;
}
