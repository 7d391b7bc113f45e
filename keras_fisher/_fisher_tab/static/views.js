// The five views. Each is a function of the place to draw in and of the page:
// its chosen runs, their colors, its state, and a way to change that.

import { ask, draw, element, escaped, percent, save, shown, smoothed } from './page.js';

const TRACE = 'fisher/trace';
const missing = (place, text) => place.replaceChildren(element('p', { class: 'missing' }, text));

/** A labeled control. */
function control(label, input, unit = '') {
  return element('label', {}, `${label} `, input, unit);
}

function choice(page, key, values, chosen = page.state[key]) {
  const input = element(
    'select',
    { id: key, onchange: () => page.change({ [key]: input.value }) },
    ...values.map((value) =>
      element('option', { value, selected: value === chosen }, value)),
  );
  return input;
}

function slider(page, key, low, high, onmove, at = page.state[key]) {
  return element('input', {
    id: key, type: 'range', min: low, max: high, value: at,
    oninput: (event) => onmove(Number(event.target.value)),
    onchange: (event) => page.change({ [key]: Number(event.target.value) }),
  });
}

// Verdict: a table of runs.

const COLUMNS = [
  ['run', (r) => r.run],
  ['learning rate', (r) => r.hyperparameters.learning_rate],
  ['batch size', (r) => r.hyperparameters.batch_size],
  ['penalty', (r) => r.hyperparameters.penalty],
  ['α', (r) => r.hyperparameters.alpha],
  ['bound', (r) => r.hyperparameters.bound],
  ['TrF_i', (r) => r.metrics.early_trace],
  ['peak Tr(F)', (r) => r.metrics.peak_trace],
  ['at step', (r) => r.metrics.peak_step],
  ['explosion', (r) => r.metrics.explosion],
  ['train accuracy', (r) => r.metrics.accuracy, percent],
  ['test accuracy', (r) => r.metrics.val_accuracy, percent],
  ['noisy memorized', (r) => r.metrics.noisy_accuracy, percent],
  ['noisy recovered', (r) => r.metrics.recovered_accuracy, percent],
];

const hasExploded = (run, threshold) => run.metrics.explosion >= threshold;

/** What the table says, in a sentence. */
export function verdict(runs, threshold) {
  const known = runs.filter((run) => run.metrics.explosion != null);
  if (!known.length) return 'No run has told of Tr(F) yet.';
  const exploded = known.filter((run) => hasExploded(run, threshold));
  const mean = (part) => {
    const values = part.map((r) => r.metrics.val_accuracy).filter((v) => v != null);
    return values.length ? values.reduce((a, b) => a + b) / values.length : null;
  };
  let text = `${exploded.length} of ${known.length} runs exploded: their Tr(F) `
    + `rose to ${shown(threshold)} times its first value, or more.`;
  const calm = known.filter((run) => !hasExploded(run, threshold));
  if (exploded.length && calm.length && mean(exploded) != null && mean(calm) != null) {
    text += ` They end with ${percent(mean(exploded))} test accuracy on average,`
      + ` the others with ${percent(mean(calm))}.`;
  }
  if (known.length < runs.length) {
    text += ` ${runs.length - known.length} more have no Tr(F).`;
  }
  return text;
}

function sorted(runs, { sort, descending }) {
  const column = COLUMNS.find(([name]) => name === sort) || COLUMNS[0];
  const sign = descending ? -1 : 1;
  return [...runs].sort((a, b) => {
    const [x, y] = [column[1](a), column[1](b)];
    if (x == null || y == null) return (x == null) - (y == null);
    if (typeof x === 'number' && typeof y === 'number') return sign * (x - y);
    return sign * String(x).localeCompare(String(y), undefined, { numeric: true });
  });
}

const quoted = (value) => `"${String(value ?? '').replace(/"/g, '""')}"`;

export function showVerdict(place, page) {
  const { sort, descending } = page.state;
  const threshold = page.state.threshold ?? page.threshold;
  const rows = sorted(page.chosen, page.state);
  const head = COLUMNS.map(([name]) => {
    const direction = descending ? 'descending' : 'ascending';
    return element('th', { scope: 'col', 'aria-sort': name === sort ? direction : 'none' },
      element('button', {
        id: `sort-${name}`, onclick: () => page.change({ sort: name, descending: name === sort && !descending }),
      }, name, name === sort ? (descending ? ' ▾' : ' ▴') : ''));
  });
  const body = rows.map((run) => element(
    'tr', { class: hasExploded(run, threshold) ? 'exploded' : '' },
    ...COLUMNS.map(([name, value, format = shown]) => element(
      name === 'run' ? 'th' : 'td', name === 'run' ? { scope: 'row' } : {},
      ...(name === 'run' ? [page.dot(run.run), ' '] : []),
      format(value(run)),
      ...(name === 'explosion' && hasExploded(run, threshold) ? [' exploded'] : []))),
  ));
  const table = () => [COLUMNS.map(([name]) => name),
    ...rows.map((run) => COLUMNS.map(([, value]) => value(run)))]
    .map((row) => row.map(quoted).join(',')).join('\r\n');
  place.replaceChildren(
    element('p', { class: 'verdict', role: 'status' }, verdict(page.chosen, threshold)),
    element('div', { class: 'controls' },
      control('exploded from', element('input', {
        id: 'threshold', type: 'number', min: 1, step: 'any', value: shown(threshold),
        onchange: (event) => page.change({ threshold: Number(event.target.value) || null }),
      }), ' times the first value'),
      element('button', { onclick: () => save('fisher-runs.csv', table()) }, 'Save as CSV')),
    element('div', { class: 'scrolls' }, element('table', {},
      element('thead', {}, element('tr', {}, ...head)),
      element('tbody', {}, ...body))),
  );
}

// Trace: Tr(F) over steps, and what the penalty did.

const MOST_CURVES = 20;
const MOST_BANDS = 8; // more hide each other, and take long to draw
const BELOW = { 'fisher/ratio': 'ratio', 'fisher/penalty': 'penalty' };

export async function showTrace(place, page) {
  const measured = page.chosen.filter((run) => run.tags.includes(TRACE));
  const runs = measured.slice(0, MOST_CURVES);
  if (!runs.length) return missing(place, 'None of the chosen runs has measured Tr(F).');
  const curves = await Promise.all(runs.map(
    (run) => page.curves(run.run, [TRACE, 'fisher/early_trace', ...Object.keys(BELOW)])));
  const below = Object.keys(BELOW).filter((tag) => curves.some((found) => found[tag]));
  const bands = runs.length <= MOST_BANDS;
  const chart = element('div', { class: 'chart tall' });
  const redraw = (smooth) => {
    const traces = curves.flatMap(
      (found, i) => oneTrace(runs[i], found, { below, smooth, bands, page }));
    draw(chart, `Tr(F) over optimizer steps of ${runs.length} runs`, traces, {
      xaxis: { title: { text: 'optimizer step' }, anchor: below.length ? `y${below.length + 1}` : 'y' },
      ...axesOf(below),
      showlegend: false,
    });
  };
  const hidden = measured.length - runs.length;
  place.replaceChildren(
    element('div', { class: 'controls' },
      control('measurements in a median', slider(page, 'smooth', 1, 50, redraw)),
      hidden > 0 ? `The first ${MOST_CURVES} of the chosen runs; ${hidden} more are not drawn.` : ''),
    chart,
    element('p', {}, bands
      ? 'Lines are medians, bands reach from quartile to quartile; ▲ is the peak, ● TrF_i.'
      : `Lines are medians; ▲ is the peak, ● TrF_i. Up to ${MOST_BANDS} runs have bands.`,
      below.includes('fisher/ratio') ? ' The ratio is ‖∇penalty‖ / ‖∇loss‖, before the bound.' : ''),
  );
  redraw(page.state.smooth);
}

/** Tr(F) above, a strip for each of the other curves below. */
function axesOf(below) {
  const strip = 0.25;
  const axes = {
    yaxis: { title: { text: 'Tr(F)', standoff: 12 }, type: 'log', domain: [strip * below.length + (below.length ? 0.04 : 0), 1] },
  };
  below.forEach((tag, i) => {
    const low = strip * (below.length - 1 - i);
    axes[`yaxis${i + 2}`] = { title: { text: BELOW[tag], standoff: 12 }, nticks: 4, type: 'log', domain: [low, low + strip - 0.05] };
  });
  return axes;
}

function oneTrace(run, found, { below, smooth, bands, page }) {
  const color = page.colors.get(run.run);
  const name = escaped(run.run);
  const curve = found[TRACE];
  if (!curve) return [];
  const rows = smoothed(curve, smooth);
  const line = { color, width: 1.5 };
  const traces = [{ x: rows.steps, y: rows.middle, name, line, mode: 'lines' }];
  if (smooth > 1 && bands) {
    traces.unshift({
      x: [...rows.steps, ...[...rows.steps].reverse()],
      y: [...rows.high, ...[...rows.low].reverse()],
      mode: 'lines', fill: 'toself', fillcolor: `${color}33`, line: { width: 0 }, hoverinfo: 'skip',
    });
  }
  const { peak_trace: peak, peak_step: at } = run.metrics;
  traces.push({ x: [at], y: [peak], name: `${name}, peak`, mode: 'markers', marker: { color, size: 11, symbol: 'triangle-up' } });
  const early = found['fisher/early_trace'];
  if (early) {
    traces.push({ x: early.steps, y: early.values, name: `${name}, TrF_i`, mode: 'markers', marker: { color, size: 10 } });
  }
  below.forEach((tag, k) => {
    if (!found[tag]) return;
    const part = smoothed(found[tag], smooth);
    traces.push({ x: part.steps, y: part.middle, name, yaxis: `y${k + 2}`, line, mode: 'lines' });
  });
  return traces;
}

// Early phase: does the trace foretell accuracy?

const TRACES = { TrF_i: 'early_trace', 'peak Tr(F)': 'peak_trace' };
const ACCURACIES = { 'test accuracy': 'val_accuracy', 'train accuracy': 'accuracy' };

export async function showEarly(place, page) {
  const { early, accuracy, color } = page.state;
  const [x, y] = [TRACES[early], ACCURACIES[accuracy]];
  const runs = page.chosen.filter((r) => r.metrics[x] > 0 && r.metrics[y] != null);
  const names = [...new Set(page.chosen.flatMap((r) => Object.keys(r.hyperparameters)))].sort();
  const controls = element('div', { class: 'controls' },
    control('trace', choice(page, 'early', Object.keys(TRACES))),
    control('against', choice(page, 'accuracy', Object.keys(ACCURACIES))),
    control('color', choice(page, 'color', ['run', ...names])));
  if (!runs.length) {
    place.replaceChildren(controls, element('p', { class: 'missing' },
      `None of the chosen runs has both ${early} and ${accuracy}. TrF_i needs `
      + 'early_phase=EarlyPhase(...), test accuracy needs validation_data.'));
    return;
  }
  const values = [runs.map((r) => r.metrics[x]), runs.map((r) => 100 * r.metrics[y])];
  const found = await ask('./correlation', { x: values[0].join(','), y: values[1].join(',') });
  const said = found.missing || (found.correlation == null
    ? 'One side is constant: no correlation.'
    : `Spearman's ρ = ${found.correlation.toFixed(2)}, ` + (found.low == null
      ? `${found.count} runs, too few for an interval`
      : `95 % interval [${found.low.toFixed(2)}, ${found.high.toFixed(2)}], ${found.count} runs`));
  const groups = new Map();
  runs.forEach((run, i) => {
    const key = color === 'run' ? run.run : shown(run.hyperparameters[color]);
    groups.set(key, [...(groups.get(key) || []), i]);
  });
  const chart = element('div', { class: 'chart' });
  const left = page.chosen.length - runs.length;
  place.replaceChildren(controls,
    element('p', { class: 'verdict', role: 'status' },
      said + (left ? `; ${left} more runs lack a value` : '')), chart);
  draw(chart, `${accuracy} over ${early} of ${runs.length} runs`, [...groups].map(([key, members]) => ({
    x: members.map((i) => values[0][i]), y: members.map((i) => values[1][i]),
    text: members.map((i) => escaped(runs[i].run)), name: escaped(key), mode: 'markers',
    marker: { size: 10, ...(color === 'run' && { color: page.colors.get(key) }) },
  })), {
    xaxis: { title: { text: early }, type: 'log' },
    yaxis: { title: { text: `${accuracy}, %` } },
    showlegend: groups.size > 1,
  });
}

// Layers: where and when.

export async function showLayers(place, page) {
  const runs = page.chosen.filter((r) => r.tags.some((t) => t.startsWith('fisher/trace_by_layer/')));
  if (!runs.length) return missing(place, 'None of the chosen runs has Tr(F) by layer.');
  const names = runs.map((run) => run.run);
  const sides = [page.state.left, page.state.right].map(
    (name, i) => (names.includes(name) ? name : names[Math.min(i, names.length - 1)]));
  const shownSides = [...new Set(sides)];
  const found = await Promise.all(shownSides.map((run) => ask('./layers', { run })));
  const steps = [...new Set(found.flatMap((each) => each.steps))].sort((a, b) => a - b);
  const at = Math.min(page.state.at ?? steps.length - 1, steps.length - 1);
  const places = shownSides.map(() => [element('div', { class: 'chart' }), element('div', { class: 'chart' })]);
  const told = element('output', {});
  const logs = found.map((each) => each.values.map((row) => row.map((v) => (v > 0 ? Math.log10(v) : null))));
  const all = logs.flat(2).filter((v) => v != null);
  // They may be more than a call takes arguments.
  const range = [Math.min, Math.max].map((extreme) => all.reduce((a, b) => extreme(a, b), all[0]));
  const bars = (k) => {
    told.textContent = `optimizer step ${steps[k]}`;
    for (const [chart] of places) mark(chart, steps[k]);
    const columns = found.map((each) => {
      const column = each.steps.findLastIndex((step) => step <= steps[k]);
      return each.values.map((row) => row[column]);
    });
    // One scale for both, so that they compare.
    const range = [0, 1.05 * Math.max(...columns.flat().map((v) => v ?? 0)) || 1];
    found.forEach((each, i) => {
      draw(places[i][1], `Tr(F) by layer of ${shownSides[i]} at step ${steps[k]}`, [{
        type: 'bar', orientation: 'h', y: each.layers.map(escaped),
        x: columns[i], marker: { color: page.colors.get(shownSides[i]) },
      }], { xaxis: { title: { text: 'Tr(F)' }, range }, yaxis: { autorange: 'reversed' } });
    });
  };
  place.replaceChildren(
    element('div', { class: 'controls' },
      control('left', choice(page, 'left', names, sides[0])),
      control('right', choice(page, 'right', names, sides[1])),
      control('step', slider(page, 'at', 0, steps.length - 1, bars, at)), told),
    element('div', { class: 'sides' }, ...places.map((pair) => element('div', {}, ...pair))),
  );
  found.forEach((each, i) => draw(places[i][0], `Tr(F) by layer and step of ${shownSides[i]}`, [{
    type: 'heatmap', x: each.steps, y: each.layers.map(escaped), z: logs[i],
    customdata: each.values, hovertemplate: '%{y}<br>step %{x}: %{customdata:.3g}<extra></extra>',
    zmin: range[0], zmax: range[1], colorscale: 'Viridis', colorbar: { title: { text: 'log₁₀ Tr(F)' } },
  }], {
    title: { text: escaped(shownSides[i]) },
    xaxis: { title: { text: 'optimizer step' } }, yaxis: { autorange: 'reversed' },
  }));
  bars(at);
}

/** A line at a step of a chart that is drawn. */
function mark(chart, step) {
  const shapes = [{ type: 'line', x0: step, x1: step, y0: 0, y1: 1, yref: 'paper', line: { color: '#ff7043', width: 2 } }];
  return window.Plotly.relayout(chart, { shapes });
}

// Memorization: what is learned of labels that are wrong.

const KINDS = { clean: 'solid', noisy: 'dash', recovered: 'dot' };

export async function showMemorization(place, page) {
  const tagOf = (kind) => `memorization/${kind}_accuracy`;
  const runs = page.chosen.filter((run) => run.tags.includes(tagOf('noisy'))).slice(0, MOST_CURVES);
  if (!runs.length) {
    return missing(place, 'None of the chosen runs has noise flags: see '
      + 'keras_fisher.datasets.add_label_noise.');
  }
  const curves = await Promise.all(runs.map(
    (run) => page.curves(run.run, Object.keys(KINDS).map(tagOf))));
  const traces = runs.flatMap((run, i) => {
    const color = page.colors.get(run.run);
    return Object.entries(KINDS).flatMap(([kind, dash]) => {
      const curve = curves[i][tagOf(kind)];
      if (!curve) return [];
      return [{
        x: curve.steps, y: curve.values.map((v) => (v == null ? null : 100 * v)),
        name: `${escaped(run.run)}, ${kind}`, mode: 'lines', line: { color, dash },
        ...(kind === 'noisy' && { fill: 'tonexty', fillcolor: `${color}1c` }),
      }];
    });
  });
  const chart = element('div', { class: 'chart tall' });
  place.replaceChildren(chart, element('p', {},
    'Shaded: clean minus noisy, the gap. Noisy is the share of wrong labels that are '
    + 'predicted as given (memorized), recovered the share predicted as they truly are.'));
  draw(chart, `Accuracy on clean and noisy examples of ${runs.length} runs`, traces, {
    xaxis: { title: { text: 'optimizer step' } },
    yaxis: { title: { text: 'training accuracy, %' }, range: [0, 100] },
  });
}
