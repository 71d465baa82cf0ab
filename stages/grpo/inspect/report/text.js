// text: elements, numbers and what a model wrote. Data become text nodes only, never markup.

const $ = (id) => document.getElementById(id);

// make("b", "class", child, ...): children are elements or texts.
function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function option(value, text) {
  const element = make("option", "", text);
  element.value = value;
  return element;
}

// Control characters, and those that turn the direction of text, as something that can be seen.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/;

function visible(text) {
  if (!HIDDEN.test(text)) return [text];
  const parts = [];
  for (const character of text) {
    if (HIDDEN.test(character)) {
      const code = character.codePointAt(0);
      const shown = code < 32 ? String.fromCodePoint(0x2400 + code) : `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
      parts.push(make("span", "odd", shown));
    } else if (typeof parts.at(-1) === "string") {
      parts[parts.length - 1] += character;
    } else {
      parts.push(character);
    }
  }
  return parts;
}

// The charts take their texts for markup.
function escaped(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

const THREE_DIGITS = { minimumSignificantDigits: 3, maximumSignificantDigits: 3 };
const whole = new Intl.NumberFormat("en");

function number(value, unit = "") {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (unit === "share") return `${value === 0 || value === 1 ? value * 100 : (value * 100).toFixed(value < 0.01 ? 2 : 1)} %`;
  if (unit === "s" && value >= 120) return duration(value);
  const size = Math.abs(value);
  let text;
  if (Number.isInteger(value)) text = whole.format(value);
  else if (size !== 0 && size < 0.001) text = value.toExponential(1).replace("e-", " × 10⁻").replace(/\d+$/, superscript);
  else text = value.toLocaleString("en", size < 1000 ? THREE_DIGITS : { maximumFractionDigits: 0 });
  return unit ? `${text} ${unit}` : text;
}

function superscript(digits) {
  return [...digits].map((digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]).join("");
}

function trimmed(value, digits) {
  return value.toLocaleString("en", { minimumFractionDigits: 0, maximumFractionDigits: digits });
}

function signed(value) {
  if (value === 0) return "0";
  return Number.isNaN(value) ? "–" : (value < 0 ? "−" : "+") + Math.abs(value).toFixed(3);
}

function duration(seconds) {
  if (seconds < 120) return `${trimmed(seconds, 0)} s`;
  if (seconds < 7200) return `${trimmed(seconds / 60, 0)} min`;
  return `${trimmed(seconds / 3600, 1)} h`;
}

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function runColor(index) {
  return `--run-${index % 8}`;
}
