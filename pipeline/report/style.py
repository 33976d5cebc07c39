"""How the report page looks and the little it does in the browser: CSS and JavaScript as text.

Nothing here knows a run; the markup that uses these classes is in `page.py` and `timeline.py`.
"""

CSS = """
:root { color-scheme: light dark; --bg: #f6f7f9; --card: #ffffff; --ink: #17202b; --soft: #566373; --line: #dce1e8;
  --accent: #1c5fc4; --good: #176e3f; --warn: #8a5300; --bad: #b02020; --still: #566373; }
@media (prefers-color-scheme: dark) { :root { --bg: #10141a; --card: #191f28; --ink: #e7ebf1; --soft: #a3afbd;
  --line: #2d3743; --accent: #82b1ff; --good: #6fd39b; --warn: #f0b85c; --bad: #ff8f8a; --still: #a3afbd; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, sans-serif; }
main, header > div { max-width: 1280px; margin: 0 auto; padding: 0 24px; }
header { background: var(--card); border-bottom: 1px solid var(--line); padding: 24px 0 18px; }
h1 { font-size: 22px; margin: 0 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 34px 0 12px; }
h3 { font-size: 15px; margin: 0; overflow-wrap: anywhere; }
p { margin: 0 0 6px; }
.soft { color: var(--soft); }
.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); } .still { color: var(--still); }
.pill { display: inline-block; border: 1px solid currentColor; border-radius: 999px; padding: 0 10px; font-size: 13px;
  font-weight: 600; }
dl.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 10px 24px;
  margin: 16px 0 0; }
dl.facts div { min-width: 0; } dt { color: var(--soft); font-size: 12.5px; }
dd { margin: 0; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); gap: 12px; margin-top: 22px; }
.tile, .panel, .clip { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 12px 16px; } .tile strong { display: block; font-size: 22px; overflow-wrap: anywhere; line-height: 1.2;
  font-variant-numeric: tabular-nums; }
.panel { padding: 16px 18px; overflow-x: auto; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 16px;
  align-items: start; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
caption { text-align: left; font-weight: 600; padding-bottom: 8px; }
th, td { padding: 5px 12px 5px 0; border-top: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { border-top: 0; color: var(--soft); font-weight: 500; font-size: 12.5px; }
th.num, td.num { text-align: right; } th:last-child, td:last-child { padding-right: 0; }
tr.total th, tr.total td { font-weight: 600; } tbody th { font-weight: 400; }
.bar { display: block; height: 9px; border-radius: 3px; background: var(--accent); min-width: 2px; }
td.wide { width: 45%; vertical-align: middle; }
.filters { display: flex; flex-wrap: wrap; gap: 10px 16px; align-items: end; margin-bottom: 14px; }
.filters label { display: grid; gap: 3px; font-size: 12.5px; color: var(--soft); }
.filters input { width: min(420px, 80vw); }
input, select { font: inherit; color: var(--ink); background: var(--card); border: 1px solid var(--soft);
  border-radius: 7px; padding: 6px 10px; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: 16px; padding: 0;
  margin: 0; list-style: none; }
.clip { content-visibility: auto; contain-intrinsic-size: auto 420px; overflow: hidden; display: flex;
  flex-direction: column; }
.clip[hidden] { display: none; }
.clip video { width: 100%; display: block; background: #000; }
.clip .body { padding: 12px 14px 14px; }
.clip .name { display: flex; gap: 8px; justify-content: space-between; align-items: start; margin-bottom: 4px; }
.clip .prompt { font-size: 14px; max-height: 6em; overflow-y: auto; overflow-wrap: anywhere; margin-bottom: 8px; }
.clip dl { display: grid; grid-template-columns: auto 1fr; gap: 1px 12px; margin: 0; font-size: 13px; }
.clip dd { text-align: right; font-variant-numeric: tabular-nums; }
.timeline { width: 100%; min-width: 560px; height: auto; display: block; }
.timeline text { fill: var(--soft); font-size: 11px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 10px 0 0; padding: 0; list-style: none;
  font-size: 13px; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px; }
.message { white-space: pre-wrap; overflow-wrap: anywhere; }
.ids { color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
footer { color: var(--soft); font-size: 13px; margin: 36px 0 30px; overflow-wrap: anywhere; }
a { color: var(--accent); }
@media print { .filters { display: none; } .clip { break-inside: avoid; } }
"""

# Posters load when their card comes near the screen: the attribute `poster` has no lazy form of its own. Without
# scripts the videos still play, from `src`, without a still picture.
JS = """
const cards = [...document.querySelectorAll('.clip')];
const text = document.getElementById('filter-text'), status = document.getElementById('filter-status');
const shown = document.getElementById('shown');
const near = new IntersectionObserver(entries => {
  for (const entry of entries) if (entry.isIntersecting) {
    const video = entry.target.querySelector('video[data-poster]');
    if (video) { video.poster = video.dataset.poster; video.removeAttribute('data-poster'); }
    near.unobserve(entry.target);
  }
}, { rootMargin: '800px' });
cards.forEach(card => near.observe(card));
const words = cards.map(card => card.querySelector('.body').textContent.toLowerCase());
function filter() {
  const wanted = text.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let count = 0;
  cards.forEach((card, i) => {
    const fits = (!status.value || card.dataset.status === status.value) && wanted.every(w => words[i].includes(w));
    card.hidden = !fits; count += fits;
  });
  shown.textContent = count + ' of ' + cards.length + ' clips shown';
}
if (text) { text.addEventListener('input', filter); status.addEventListener('change', filter); filter(); }
"""
