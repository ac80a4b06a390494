// Elements from data. Text only ever becomes text: names, ids and errors come from users.

const SVG = "http://www.w3.org/2000/svg";

const fill = (element, attributes, children) => {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null && value !== false) {
      element.setAttribute(name, value === true ? "" : String(value));
    }
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
};

/** An HTML element. Children are elements or text; what is null, undefined or false is left out. */
export const h = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);

/** An SVG element. */
export const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

const keyOf = (node) => (node.nodeType === Node.ELEMENT_NODE ? node.getAttribute("data-key") : null);

const alike = (old, fresh) => old.nodeName === fresh.nodeName && keyOf(old) === keyOf(fresh);

const patchAttributes = (old, fresh) => {
  for (const { name, value } of fresh.attributes) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  for (const { name } of [...old.attributes]) {
    // Whether it is open is the reader's business.
    if (!fresh.hasAttribute(name) && name !== "open") old.removeAttribute(name);
  }
};

const patch = (old, fresh) => {
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
  } else if (!old.hasAttribute("data-own")) {
    patchAttributes(old, fresh);
    patchChildren(old, [...fresh.childNodes]);
  }
};

/**
 * Makes the children of an element what they should be, and touches nothing that stays: focus, selection and scroll
 * positions survive. Elements with `data-key` are recognised by it; one with `data-own` draws itself and is left alone.
 */
export const patchChildren = (parent, wanted) => {
  const keyed = new Map([...parent.children].map((child) => [keyOf(child), child]));
  keyed.delete(null);
  let place = parent.firstChild;
  for (const fresh of wanted) {
    const key = keyOf(fresh);
    let match = key === null ? place : keyed.get(key);
    if (!match || !alike(match, fresh)) match = null;
    if (match === null) {
      parent.insertBefore(fresh, place);
      continue;
    }
    if (match === place) {
      place = place.nextSibling;
    } else {
      parent.insertBefore(match, place);
    }
    patch(match, fresh);
  }
  while (place !== null) {
    const next = place.nextSibling;
    place.remove();
    place = next;
  }
};
