/** Build DOM nodes. Every string becomes text, never markup. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * @param {string} tag
 * @param {object} properties `class`, `text`, `on` ({event: handler}), `style` (object), everything else an attribute;
 *   null, undefined and false leave the attribute out.
 * @param {...(Node|string|null|false)} children
 * @returns {HTMLElement}
 */
export function h(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** As `h`, for SVG elements. */
export function svg(tag, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") element.textContent = value;
    else if (name === "class") element.setAttribute("class", value);
    else if (name === "style") Object.assign(element.style, value);
    else if (name === "on") for (const [event, handler] of Object.entries(value)) element.addEventListener(event, handler);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Replace what is inside an element. */
export function put(element, ...children) {
  element.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** A button that is disabled while its (asynchronous) handler runs and reports a failure through `onError`. */
export function button(label, handler, { title = "", kind = "", onError = () => {} } = {}) {
  const element = h("button", { type: "button", class: `dg-button ${kind}`, title, text: label });
  element.addEventListener("click", async () => {
    element.disabled = true;
    try {
      await handler();
    } catch (error) {
      onError(error);
    } finally {
      element.disabled = false;
    }
  });
  return element;
}
