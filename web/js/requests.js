/** Requests to this pack's routes on ComfyUI's own server. */

import { api } from "../../../scripts/api.js";

/** The error message of a route. */
export class Refused extends Error {}

async function answer(response) {
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Refused(body.error || `the server answered ${response.status}`);
  return body;
}

/** What the server answers; a browser's own message is no more than "Failed to fetch". */
async function ask(path, options) {
  let response;
  try {
    response = await api.fetchApi(`/dancegrpo${path}`, options);
  } catch (error) {
    throw options.signal?.aborted ? error : new Error("ComfyUI does not answer");
  }
  return answer(response);
}

/** @param {string} path below /dancegrpo, already encoded */
export async function get(path, signal) {
  return ask(path, { signal, cache: "no-store" });
}

export async function post(path, body = {}) {
  return ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
}

/** The address of an image or video behind a route. */
export function address(path) {
  return api.apiURL(`/dancegrpo${path}`);
}

/** A new id for a vote; pages served over plain HTTP in a network have no crypto.randomUUID. */
export function newId() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Encode one part of a path. */
export const part = encodeURIComponent;
