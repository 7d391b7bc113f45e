// What all views share: elements, numbers, colors, requests, charts.

// Of runs, in their order.
const COLORS = [
  '#ff7043', '#0077bb', '#cc3311', '#33bbee', '#ee3377', '#009988', '#999933',
];

/** The color of each run, by its place among all runs. */
export const colorsOf = (runs) =>
  new Map(runs.map((run, i) => [run.run, COLORS[i % COLORS.length]]));

/** An element with attributes and children; strings are never markup. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith('on')) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, '');
    else if (value !== false && value != null) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

/** A number for people: three digits, or a dash for none. */
export function shown(value) {
  if (value == null || value === '') return '–';
  if (typeof value !== 'number') return String(value);
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return String(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(3)));
}

export const percent = (value) =>
  value == null ? '–' : `${(100 * value).toFixed(1)} %`;

/** Text for a chart, which would take some of it for markup. */
export const escaped = (text) =>
  String(text).replace(/&/g, '&amp;').replace(/</g, '&lt;').replace(/>/g, '&gt;');

/** Asks the plugin; arguments may be lists. */
export async function ask(path, args = {}) {
  const url = new URL(path, import.meta.url);
  for (const [key, value] of Object.entries(args)) {
    for (const each of [value].flat()) url.searchParams.append(key, each);
  }
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}

export const isDark = () =>
  window.parent.document.body.classList.contains('dark-mode');

/** Draws a chart that fits its element, with a label for screen readers. */
export function draw(place, label, traces, layout = {}) {
  const ink = isDark() ? '#e0e0e0' : '#333';
  const grid = isDark() ? '#555' : '#ddd';
  const axis = { gridcolor: grid, zerolinecolor: grid, automargin: true };
  const full = {
    margin: { l: 60, r: 20, t: 36, b: 48 },
    paper_bgcolor: 'rgba(0,0,0,0)',
    plot_bgcolor: 'rgba(0,0,0,0)',
    font: { color: ink, family: 'Roboto, sans-serif', size: 13 },
    hovermode: 'closest',
    ...layout,
  };
  for (const name of ['xaxis', 'yaxis', 'yaxis2', 'yaxis3']) {
    if (name.length === 5 || layout[name]) {
      full[name] = { ...axis, ...(layout[name] || {}) };
    }
  }
  place.setAttribute('role', 'img');
  place.setAttribute('aria-label', label);
  return window.Plotly.react(place, traces, full, {
    responsive: true,
    displaylogo: false,
    toImageButtonOptions: { format: 'png', scale: 2 },
  });
}

/** Between neighbors where a share falls between them, as NumPy has it. */
function quantile(ascending, share) {
  const place = share * (ascending.length - 1);
  const below = Math.floor(place);
  const above = Math.ceil(place);
  return ascending[below] + (place - below) * (ascending[above] - ascending[below]);
}

/** Medians, and quartiles, of `count` measurements in a row. */
export function smoothed(curve, count) {
  const rows = { steps: [], middle: [], low: [], high: [] };
  const pairs = curve.steps
    .map((step, i) => [step, curve.values[i]])
    .filter(([, value]) => value != null);
  for (let i = 0; i < pairs.length; i += count) {
    const part = pairs.slice(i, i + count);
    const values = part.map(([, value]) => value).sort((a, b) => a - b);
    const at = (share) => quantile(values, share);
    rows.steps.push(part[Math.floor(part.length / 2)][0]);
    rows.middle.push(at(0.5));
    rows.low.push(at(0.25));
    rows.high.push(at(0.75));
  }
  return rows;
}

/** Offers text as a file. */
export function save(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: 'text/csv' }));
  element('a', { href: url, download: name }).click();
  URL.revokeObjectURL(url);
}
