/** Polling: one request at a time, and only while the page is visible. */

/**
 * @param {(signal: AbortSignal) => Promise<number|void>} task returns the milliseconds until it should run again
 * @param {number} interval milliseconds, where the task returns nothing or fails
 * @param {(error: Error) => void} onError
 * @returns {{now: () => void, close: () => void}}
 */
export function poll(task, interval, onError = () => {}) {
  const controller = new AbortController();
  let timer = null;
  let running = false;

  async function run() {
    clearTimeout(timer);
    if (running || controller.signal.aborted) return;
    running = true;
    let pause = interval;
    try {
      if (!document.hidden) pause = (await task(controller.signal)) ?? interval;
    } catch (error) {
      if (!controller.signal.aborted) onError(error);
    } finally {
      running = false;
    }
    if (!controller.signal.aborted) timer = setTimeout(run, pause);
  }

  run();
  return {
    now: run,
    close() {
      controller.abort();
      clearTimeout(timer);
    },
  };
}
