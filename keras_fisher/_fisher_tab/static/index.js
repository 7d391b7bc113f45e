// The Fisher tab: runs on the left, views on the right, its state in the URL.

import { ask, colorsOf, element, isDark } from './page.js';
import * as views from './views.js';

const VIEWS = {
  Verdict: views.showVerdict,
  Trace: views.showTrace,
  'Early phase': views.showEarly,
  Layers: views.showLayers,
  Memorization: views.showMemorization,
};
const NAMES = Object.keys(VIEWS);
const DEFAULTS = {
  view: 'Verdict', hidden: [], filter: '', threshold: null, sort: 'run', descending: false,
  smooth: 8, early: 'TrF_i', accuracy: 'test accuracy', color: 'run',
  left: null, right: null, at: null,
};
const PARAMETER = 'fisher'; // in the address of TensorBoard's page
const SECONDS = 15; // between looks for new points

class Page {
  constructor(root) {
    this.state = { ...DEFAULTS, ...readState() };
    this.runs = [];
    this.number = 0; // of the drawing
    this.cache = new Map();
    this.sidebar = element('nav', { class: 'runs', 'aria-label': 'Runs' });
    this.tabs = element('div', { class: 'tabs', role: 'tablist' });
    this.place = element('main', { id: 'view', role: 'tabpanel', 'aria-live': 'off' });
    root.replaceChildren(this.sidebar, element('div', { class: 'content' }, this.tabs, this.place));
  }

  get chosen() {
    return this.runs.filter((run) => this.isListed(run) && !this.state.hidden.includes(run.run));
  }

  isListed(run) {
    try {
      return new RegExp(this.state.filter, 'i').test(run.run);
    } catch {
      return run.run.includes(this.state.filter);
    }
  }

  /** Curves of a run, asked for once until there is something new. */
  curves(run, tags) {
    const key = JSON.stringify([run, tags]);
    if (!this.cache.has(key)) {
      const asked = ask('./curves', { run, tag: tags });
      asked.catch(() => this.cache.delete(key)); // To be asked again.
      this.cache.set(key, asked);
    }
    return this.cache.get(key);
  }

  dot(run) {
    return element('span', { class: 'dot', style: `background:${this.colors.get(run)}`, 'aria-hidden': 'true' });
  }

  async change(changes) {
    this.state = { ...this.state, ...changes };
    writeState(this.state);
    await this.show();
  }

  /** The table does not wait for what takes long: the peaks of long curves. */
  async load() {
    if (!this.text) await this.take(await ask('./runs', { peaks: 'known' }), false);
    await this.take(await ask('./runs'), true);
  }

  async take({ runs, has_plotly: hasPlotly, threshold }, isAll) {
    this.threshold = threshold;
    this.isWaiting = !isAll;
    const text = JSON.stringify(runs);
    if (text === this.text || isEditing()) return this.showBusy(false);
    this.text = text;
    this.runs = runs;
    this.colors = colorsOf(runs);
    this.hasPlotly = hasPlotly;
    this.cache.clear();
    await this.show();
  }

  /** Says what went wrong, until the next look, which begins anew. */
  fail(error) {
    this.text = null;
    this.isWaiting = false;
    this.number += 1; // What is still drawn comes too late.
    this.place.replaceChildren(alertOf(error));
    this.showBusy(false);
  }

  async show() {
    const focused = document.activeElement?.id;
    await this.redraw();
    // What had the focus was made anew.
    if (focused && document.activeElement === document.body) {
      document.getElementById(focused)?.focus();
    }
  }

  async redraw() {
    document.body.classList.toggle('dark', isDark());
    this.showRuns();
    this.showTabs();
    if (this.state.view !== 'Verdict' && !this.hasPlotly) {
      this.place.replaceChildren(element('p', { class: 'missing' },
        'The charts need plotly: pip install "keras_fisher[plot]", and start TensorBoard again.'));
      return;
    }
    // What comes late may not overwrite what is newer.
    const number = (this.number += 1);
    const place = element('div', {});
    this.showBusy(true);
    if (this.state.view !== 'Verdict') this.place.replaceChildren('Loading …');
    try {
      if (this.state.view !== 'Verdict') await plotly();
      if (number !== this.number) return;
      this.place.replaceChildren(place);
      await VIEWS[this.state.view](place, this);
    } catch (error) {
      this.text = null; // The next look begins anew.
      place.replaceChildren(alertOf(error));
    } finally {
      if (number === this.number) this.showBusy(false);
    }
  }

  /** Busy until all is drawn, and all is known. */
  showBusy(isDrawing) {
    this.place.setAttribute('aria-busy', String(isDrawing || this.isWaiting));
  }

  showTabs() {
    this.tabs.replaceChildren(...NAMES.map((view) => {
      const selected = view === this.state.view;
      return element('button', {
        id: `tab-${view}`, role: 'tab', 'aria-controls': 'view',
        'aria-selected': String(selected), tabindex: selected ? 0 : -1,
        onclick: () => this.change({ view }),
        onkeydown: (event) => this.stepTabs(event),
      }, view);
    }));
  }

  /** Arrow keys go from tab to tab, as screen readers announce it. */
  async stepTabs(event) {
    const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!way) return;
    const at = NAMES.indexOf(this.state.view) + way + NAMES.length;
    const view = NAMES[at % NAMES.length];
    const shown = this.change({ view });
    document.getElementById(`tab-${view}`).focus();
    await shown;
  }

  showRuns() {
    const listed = this.runs.filter((run) => this.isListed(run));
    this.sidebar.replaceChildren(
      element('input', {
        id: 'filter', type: 'search', placeholder: 'Filter runs (regex)', 'aria-label': 'Filter runs',
        value: this.state.filter, onchange: (event) => this.change({ filter: event.target.value }),
      }),
      element('div', { class: 'all' },
        element('button', { onclick: () => this.change({ hidden: [] }) }, 'All'),
        element('button', { onclick: () => this.change({ hidden: this.runs.map((r) => r.run) }) }, 'None'),
        ` ${this.chosen.length} of ${this.runs.length}`),
      ...listed.map((run, i) => element('label', {}, element('input', {
        id: `run-${i}`, type: 'checkbox', checked: !this.state.hidden.includes(run.run),
        onchange: () => this.toggle(run.run),
      }), this.dot(run.run), ` ${run.run}`)),
    );
  }

  toggle(run) {
    const { hidden } = this.state;
    return this.change({
      hidden: hidden.includes(run) ? hidden.filter((each) => each !== run) : [...hidden, run],
    });
  }
}

function alertOf(error) {
  return element('p', { class: 'missing', role: 'alert' }, error.message);
}

// A list that may be open: it has the focus long after a choice, too.
let isChoosing = false;
for (const [event, value] of [['pointerdown', true], ['keydown', true], ['change', false], ['focusout', false]]) {
  document.addEventListener(event, ({ target }) => {
    if (target.matches?.('select')) isChoosing = value;
  }, true);
}

/** Whether someone is in the midst of something that a new page would end. */
function isEditing() {
  const at = document.activeElement;
  return Boolean(isChoosing || at?.matches('input:active')
    || (at?.matches('[type=search], [type=number]') && at.value !== at.defaultValue));
}

/** The state that the address of TensorBoard's page holds. */
function readState() {
  try {
    return JSON.parse(new URL(window.parent.location.href).searchParams.get(PARAMETER)) || {};
  } catch {
    return {};
  }
}

function writeState(state) {
  const changed = Object.entries(state).filter(
    ([key, value]) => JSON.stringify(value) !== JSON.stringify(DEFAULTS[key]));
  const url = new URL(window.parent.location.href);
  if (changed.length) url.searchParams.set(PARAMETER, JSON.stringify(Object.fromEntries(changed)));
  else url.searchParams.delete(PARAMETER);
  window.parent.history.replaceState(window.parent.history.state, '', url);
}

let loaded = null;

/** Plotly's script, from the Python package that is installed. */
function plotly() {
  loaded ||= new Promise((resolve, reject) => {
    const script = element('script', { src: new URL('./plotly.js', import.meta.url) });
    script.addEventListener('load', resolve);
    script.addEventListener('error', () => {
      loaded = null;
      reject(new Error('plotly.js could not be loaded.'));
    });
    document.head.append(script);
  });
  return loaded;
}

/** TensorBoard calls this once it has loaded the module. */
export async function render() {
  document.documentElement.lang = 'en';
  document.head.append(element('link', { rel: 'stylesheet', href: new URL('./style.css', import.meta.url) }));
  const root = element('div', { class: 'page' });
  document.body.append(root);
  const page = new Page(root);
  const load = () => page.load().catch((error) => page.fail(error));
  await load();
  const look = () => document.visibilityState === 'visible' && load();
  setInterval(look, 1000 * SECONDS);
  document.addEventListener('visibilitychange', look);
  // TensorBoard changes its theme by a class.
  new MutationObserver(() => page.show()).observe(
    window.parent.document.body, { attributes: true, attributeFilter: ['class'] });
}
