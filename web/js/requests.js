/** Requests to this pack's routes on ComfyUI's own server. */

import { api } from "../../../scripts/api.js";

/** The error message of a route. */
export class Refused extends Error {}

async function answer(response) {
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Refused(body.error || `the server answered ${response.status}`);
  return body;
}

/** @param {string} path below /dancegrpo, already encoded */
export async function get(path, signal) {
  return answer(await api.fetchApi(`/dancegrpo${path}`, { signal, cache: "no-store" }));
}

export async function post(path, body = {}) {
  return answer(
    await api.fetchApi(`/dancegrpo${path}`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    }),
  );
}

/** The address of a picture or video behind a route. */
export function address(path) {
  return api.apiURL(`/dancegrpo${path}`);
}

/** A new id for a vote; pages served over plain HTTP in a network have no crypto.randomUUID. */
export function newId() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Encode one part of a path. */
export const part = encodeURIComponent;
